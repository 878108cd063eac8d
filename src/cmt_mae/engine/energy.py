"""Energy that GPUs have used, by their own counters (NVML); nothing where there are none."""

from typing import Any

import torch
from accelerate import Accelerator


class GpuEnergy:
    """Joules used by the GPU of one process, other programs on it included.

    Needs NVIDIA's binding (package nvidia-ml-py) and a GPU from Volta on; without them ``read`` gives None.
    """

    def __init__(self, device: torch.device) -> None:
        self._nvml: Any = None
        self._handle: Any = None
        self._before = 0
        if device.type != "cuda":
            return
        try:
            import pynvml
        except ImportError:
            return
        # by its own name, as CUDA_VISIBLE_DEVICES gives the devices other numbers
        name = str(torch.cuda.get_device_properties(device).uuid)
        try:
            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{name.removeprefix('GPU-')}")
            self._before = pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except pynvml.NVMLError:  # no driver, a part of a GPU (MIG), a GPU without the counter
            return
        self._nvml = pynvml

    def read(self) -> float | None:
        """Joules since the last call, or since the start; None where they are not counted."""
        if self._nvml is None:
            return None
        try:
            now = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)  # in mJ
        except self._nvml.NVMLError:
            return None
        used, self._before = (now - self._before) / 1000, now
        return used if used >= 0 else None  # the driver was loaded anew

    def read_all(self, accelerator: Accelerator) -> float | None:
        """Sum of ``read`` over the processes; None where one of them does not know. Called by all of them."""
        own = self.read()
        if accelerator.num_processes == 1:
            return own
        each = torch.tensor(float("nan") if own is None else own, device=accelerator.device)
        total = float(accelerator.reduce(each))
        return None if total != total else total
