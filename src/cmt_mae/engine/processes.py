"""The processes of a run: device and precision of each, what they agree on, what one of them prints for all."""

import contextlib
import ctypes
import gc
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedDataParallelKwargs

from cmt_mae.core.errors import InputError, LostProcess
from cmt_mae.core.runs import RunDir
from cmt_mae.core.text import printable

# What gloo and NCCL say when a process at the other end is gone, in lower case.
LOST = ("connection closed by peer", "connection reset by peer", "broken pipe", "connection refused",
        "timed out", "timeout", "remote process exited", "socket closed", "no longer available")  # fmt: skip
# Numbers of glibc's mallopt(3).
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4


def make_accelerator(device: str, precision: str, deterministic: bool = False) -> Accelerator:
    """An Accelerator for ``auto | cpu | cuda | mps`` and ``auto | bf16 | fp32``.

    auto precision: bf16 on GPUs, fp32 on CPU. fp16 is not offered: it overflows in this method (peers.md).
    deterministic: see ``make_deterministic``. The process keeps freed memory from then on (``keep_memory``).
    Raises InputError for a device that is not there.
    """
    if deterministic:
        make_deterministic()
    keep_memory()
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
    with meeting(on_cpu):
        return Accelerator(
            cpu=on_cpu,
            mixed_precision="bf16" if precision == "bf16" else "no",
            kwargs_handlers=[steady_buckets()],
        )


def meeting(on_cpu: bool) -> contextlib.AbstractContextManager[None]:
    """Around what brings the processes of a run together, where there are several."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return contextlib.nullcontext()
    from cmt_mae.engine.meeting import together_in_time

    return together_in_time("gloo" if on_cpu else "nccl")


def steady_buckets() -> DistributedDataParallelKwargs:
    """DDP that adds gradients up in the same order in every step, the first after a start included.

    Else it sorts parameters into new buckets after its first backward pass, and with three processes or more
    the sums of the first step after a resume would be rounded otherwise than in a run that was not stopped.
    """
    return DistributedDataParallelKwargs(find_unused_parameters=True)


def keep_memory() -> bool:
    """Have glibc keep freed memory; returns whether it does: not where MALLOC_... is set, nor elsewhere.

    By default what a step frees goes back to the system and comes back page by page, zeroed, in the next step
    (tests/engine/test_memory.py counts the faults). Kept is what the largest step so
    far needed, as a GPU's allocator does.
    """
    if not sys.platform.startswith("linux") or any(n.startswith("MALLOC_") for n in os.environ):
        return False
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        # never trim; grow by 64 MiB; no mapping of its own for a large block, which would end with it
        settings = ((TRIM_THRESHOLD, -1), (TOP_PAD, 1 << 26), (MMAP_MAX, 0))
        return all(mallopt(number, value) == 1 for number, value in settings)
    return False


def make_deterministic() -> None:
    """The same bits from the same seed on a GPU too; an operation that cannot is refused by torch.

    To be called before the first work on the GPU: cuBLAS reads its setting when it starts.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


@contextlib.contextmanager
def stopping_with_the_others(accelerator: Accelerator, run: Path) -> Iterator[None]:
    """Where another process has ended: print one line and raise LostProcess."""
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if accelerator.num_processes == 1 or not any(word in text.lower() for word in LOST):
            raise
        message = (
            f"process {accelerator.process_index} of {accelerator.num_processes}: another process of this run "
            f"is gone, so this one stops; the last checkpoint in {run} is whole: run the same command to continue"
        )
        print(f"cmt-mae: {message}", file=sys.stderr, flush=True)
        raise LostProcess(message) from error


def leave_processes() -> None:
    """Close the connections to the other processes, and end their threads, before the interpreter ends.

    Models that were wrapped for several processes hold the connections too: the caller has let go of them.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether the flag is up in any process; all of them get the same answer."""
    if accelerator.num_processes == 1:
        return flag
    count = accelerator.reduce(torch.tensor(float(flag), device=accelerator.device))
    return bool(count.item() > 0)


def agree(accelerator: Accelerator, step: int) -> None:
    """Raise InputError, in every process, unless all are about to go on from the same step.

    A network file system may show one machine an older state of the folder.
    """
    if accelerator.num_processes > 1:
        steps = accelerator.gather(torch.tensor([step], device=accelerator.device)).tolist()
        if len(set(steps)) > 1:
            raise InputError(
                f"the processes see checkpoints of different steps ({sorted(set(steps))}): the shared file system "
                "is not up to date everywhere; wait a little and run the same command again"
            )


def peak_memory(device: torch.device) -> float:
    """GB: of the GPU, or of this process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def say(accelerator: Accelerator, text: str) -> None:
    """One line on stderr, from the main process."""
    if accelerator.is_main_process:
        print(printable(text), file=sys.stderr)


def warn(accelerator: Accelerator, run: RunDir, step: int, text: str) -> None:
    """One line on stderr, and in the run's warnings.jsonl for its report."""
    say(accelerator, f"warning: {text}")
    run.append_warning(step, text)
