"""Energy that GPUs have used, by their own counters (NVML); nothing where there are none."""

import torch


class GpuEnergy:
    """Joules used by the GPU of one process, other programs on it included.

    Needs NVIDIA's binding (package nvidia-ml-py) and a GPU from Volta on; without them ``read`` gives None.
    """

    def __init__(self, device: torch.device) -> None:
        self._nvml, self._handle, self._before = None, None, 0
        if device.type != "cuda":
            return
        try:
            import pynvml

            pynvml.nvmlInit()
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            # by its own name, as CUDA_VISIBLE_DEVICES gives the devices other numbers
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}")
            self._before = pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except (ImportError, OSError, AttributeError):
            return
        except Exception as error:
            if type(error).__name__.startswith("NVMLError"):
                return
            raise
        self._nvml = pynvml

    def read(self) -> float | None:
        """Joules since the last call, or since the start; None where nobody counts them."""
        if self._nvml is None:
            return None
        try:
            now = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)  # in mJ
        except self._nvml.NVMLError:
            return None
        used, self._before = (now - self._before) / 1000, now
        return used if used >= 0 else None  # the driver was loaded anew
