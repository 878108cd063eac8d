"""One place that knows accelerate: device, precision, processes."""

import resource

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState

from cmt_mae.errors import InputError


def make_accelerator(device: str, precision: str) -> Accelerator:
    """An Accelerator for ``auto | cpu | cuda | mps`` and ``auto | bf16 | fp32``.

    auto precision: bf16 on GPUs, fp32 on CPU. fp16 is not offered: it overflows in this method (peers.md).
    Raises InputError for unknown names and for a device that is not there.
    """
    if device not in ("auto", "cpu", "cuda", "mps"):
        raise InputError(f"device '{device}' is unknown: use auto, cpu, cuda or mps")
    if precision not in ("auto", "bf16", "fp32"):
        raise InputError(f"precision '{precision}' is unknown: use auto, bf16 or fp32")
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if (device == "cuda" and not cuda) or (device == "mps" and not mps):
        raise InputError(f"device '{device}' is not available on this machine: use auto or cpu")
    on_cpu = device == "cpu" or (device == "auto" and not cuda and not mps)
    if precision == "auto":
        precision = "fp32" if on_cpu else "bf16"
    if not PartialState._shared_state.get("distributed_type"):
        AcceleratorState._reset_state(reset_partial_state=True)
    else:  # another call in this process: precision may differ, the process group stays
        AcceleratorState._reset_state()
        if (PartialState().device.type == "cpu") != on_cpu:
            AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=on_cpu, mixed_precision="bf16" if precision == "bf16" else "no")


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether the flag is up in any process; all of them get the same answer."""
    if accelerator.num_processes == 1:
        return flag
    count = accelerator.reduce(torch.tensor(float(flag), device=accelerator.device))
    return bool(count.item() > 0)


def peak_memory(device: torch.device) -> float:
    """GB: of the GPU, or of this process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
