"""One place that knows accelerate: device, precision, processes."""

import contextlib
import os
import resource
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedDataParallelKwargs

from cmt_mae.core.errors import InputError, LostProcess
from cmt_mae.engine.memory import keep_memory

# What gloo and NCCL say when a process at the other end is gone, in lower case.
LOST = ("connection closed by peer", "connection reset by peer", "broken pipe", "connection refused",
        "timed out", "timeout", "remote process exited", "socket closed", "no longer available")  # fmt: skip
MEETING_S = 300.0
"""How long the processes of a run may take to find each other at its start."""


def make_accelerator(device: str, precision: str, deterministic: bool = False) -> Accelerator:
    """An Accelerator for ``auto | cpu | cuda | mps`` and ``auto | bf16 | fp32``.

    auto precision: bf16 on GPUs, fp32 on CPU. fp16 is not offered: it overflows in this method (peers.md).
    deterministic: see ``make_deterministic``. The process keeps freed memory from then on (``keep_memory``).
    Raises InputError for unknown names and for a device that is not there.
    """
    if device not in ("auto", "cpu", "cuda", "mps"):
        raise InputError(f"device '{device}' is unknown: use auto, cpu, cuda or mps")
    if precision not in ("auto", "bf16", "fp32"):
        raise InputError(f"precision '{precision}' is unknown: use auto, bf16 or fp32")
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


def steady_buckets() -> DistributedDataParallelKwargs:
    """DDP that adds gradients up in the same order in every step, the first after a start included.

    Else it sorts parameters into new buckets after its first backward pass, and with three processes or more
    the sums of the first step after a resume would be rounded otherwise than in a run that was not stopped.
    """
    return DistributedDataParallelKwargs(find_unused_parameters=True)


@contextlib.contextmanager
def meeting(on_cpu: bool) -> Iterator[None]:
    """Around what brings the processes of a run together: after a restart too, and not for ever."""
    with meeting_in_time(MEETING_S):
        meet_after_restart("gloo" if on_cpu else "nccl")
        yield


@contextlib.contextmanager
def meeting_in_time(seconds: float) -> Iterator[None]:
    """End this process, with a line and status 75, where the processes do not find each other in time.

    gloo waits for ever for one that does not come. Ended, torchrun starts them again, or the user does.
    """
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1 or torch.distributed.is_initialized()

    def give_up() -> None:
        print(
            f"cmt-mae: the processes of this run did not find each other within {seconds:g} s (process "
            f"{os.environ.get('RANK', '?')} of {os.environ['WORLD_SIZE']}): run the same command again",
            file=sys.stderr,
            flush=True,
        )
        os._exit(75)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    if not alone:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def meet_after_restart(backend: str) -> None:
    """Bring processes together that torchrun has started again on one machine; nothing else.

    torchrun keeps one store for all starts of a job (torch 2.14), in which the addresses of processes that are
    gone still stand: this start gets names of its own there. Over several machines the count of restarts is not
    the same everywhere; there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun does it (docs/scale.md).
    """
    place = os.environ
    restarts, world = (
        int(place.get("TORCHELASTIC_RESTART_COUNT", "0")),
        place.get("WORLD_SIZE", "1"),
    )
    shared = place.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not restarts or not shared or world != place.get("LOCAL_WORLD_SIZE"):
        return
    if not torch.distributed.is_initialized():
        store = torch.distributed.TCPStore(
            place["MASTER_ADDR"], int(place["MASTER_PORT"]), int(world), is_master=False
        )
        torch.distributed.init_process_group(
            backend,
            store=torch.distributed.PrefixStore(f"start_{restarts}", store),
            rank=int(place["RANK"]),
            world_size=int(world),
        )


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
    """Say in one line, and raise LostProcess, where another process has gone and its part does not come."""
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
    """Close the connections to the other processes before the interpreter tears them down in any order."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
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
