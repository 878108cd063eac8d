"""torch's DataLoader with whole batches as items, and with workers that cannot spoil the run."""

import pickle
import signal
import threading
from collections.abc import Generator, Iterable
from multiprocessing import connection
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from cmt_mae.errors import InputError


class WorkerFailed(InputError):
    """A worker process died or was silent for too long."""


def iterate(
    dataset: Dataset[Any],
    keys: Iterable[Any],
    workers: int,
    pin_memory: bool = False,
    timeout_s: float = 0,
) -> Generator[Any, None, None]:
    """dataset[key] for each key, in order, read ahead by `workers` processes (0: in this one).

    An item that is an InputError is raised here (raised in a worker, torch would wrap it in a
    traceback). Raises WorkerFailed within 5 s of a worker's death, or after timeout_s > 0 without
    an item. The workers are gone when the generator ends or is closed.
    """
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=None,
        sampler=keys,
        collate_fn=_keep,
        num_workers=workers,
        pin_memory=pin_memory,
        timeout=timeout_s if workers else 0,
        worker_init_fn=_start_worker if workers else None,
        prefetch_factor=4 if workers else None,
        generator=torch.Generator(),  # without it torch would draw from the run's global stream
    )
    # torch answers a worker's death by raising from a signal handler, anywhere in the training
    # step. Put back: then the next item notices it, here.
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGCHLD) if main else None
    batches = iter(loader)
    if handler is not None:
        signal.signal(signal.SIGCHLD, handler)
    processes = list(getattr(batches, "_workers", ()))
    try:
        while (item := next(batches, None)) is not None:
            if isinstance(item, InputError):
                raise item
            yield item
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        # A worker that dies while its answer is on the way leaves all kinds of errors behind, and
        # its connection closes a little before its process has ended.
        if processes and not isinstance(error, RuntimeError):
            ended = connection.wait([process.sentinel for process in processes], timeout=2)
            for process in processes:
                if process.sentinel in ended:
                    process.join(timeout=2)
        dead = [str(process.pid) for process in processes if not process.is_alive()]
        if dead:
            what = f"loader worker (process {', '.join(dead)}) died"
        elif "DataLoader timed out" in str(error):
            what = f"no loader worker answered within {timeout_s:g} s"
        else:
            raise
        raise WorkerFailed(f"{what}; check the memory and the disk, or use no workers") from None
    finally:
        del batches  # asks the workers to end
        for process in processes:
            if process.is_alive():  # it hangs, and it does not hear SIGTERM
                process.kill()
                process.join(timeout=5)


def _keep(item: Any) -> Any:
    """Items are whole batches: nothing to collate (torch would turn tuples into lists)."""
    return item


def _start_worker(_: int) -> None:
    """Signals belong to the main process: it writes the checkpoint, then ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
