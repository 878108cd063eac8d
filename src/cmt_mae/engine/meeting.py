"""How several processes of a run find each other at its start."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

import torch

# Its functions have the process group that there is at its import as a default argument. DDP loads it, and
# they would keep the group and its threads beyond `leave_processes`: now and then torch aborts while Python ends.
import torch.distributed.nn

MEETING_S = 300.0
"""How long they may take."""


@contextlib.contextmanager
def together_in_time(backend: str) -> Iterator[None]:
    """Around what brings the processes of a run together: after a restart too, and not for ever."""
    with meeting_in_time(MEETING_S):
        meet_after_restart(backend)
        yield


@contextlib.contextmanager
def meeting_in_time(seconds: float) -> Iterator[None]:
    """End this process, with a line and status 75, where the processes do not find each other in time.

    gloo waits for ever for one that does not come. Ended, torchrun starts them again, or the user does.
    """
    together = torch.distributed.is_initialized()

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
    if not together:
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
