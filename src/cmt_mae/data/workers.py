"""torch's DataLoader with processes that cannot spoil the run."""

import atexit
import contextlib
import errno
import fcntl
import logging
import math
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from multiprocessing import connection, queues
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from cmt_mae.core.errors import InputError
from cmt_mae.core.text import printable

if TYPE_CHECKING:
    from cmt_mae.data.steps import Items

MAX_RESTARTS = 3
"""Restarts of the workers without an item in between, after which the run stops."""
_PIPE_BYTES = 2**20
_LOOK_S = 1.0  # seconds between two looks at whether the workers live
_NO_ROOM = 77  # exit status of a worker that cannot hand over what it has made
_SILENT = "DataLoader timed out"  # torch's words
_LIVE: set[BaseProcess] = set()


# how many workers there are is a setting
warnings.filterwarnings("ignore", message="This DataLoader will create")


class WorkerFailed(InputError):
    """A worker process died or was silent for too long."""


def read_ahead(
    items: "Items",
    keys_from: Callable[[int], Iterable[Any]],
    workers: int,
    pin_memory: bool,
    timeout_s: float,
) -> Generator[Any, None, None]:
    """items[key] for each key, in order, read ahead by `workers` processes.

    keys_from(n): the keys from the n-th on. Workers that die, or are silent for timeout_s (0: for
    ever), are started again where they were, so the items are those of an undisturbed run; after
    MAX_RESTARTS times in a row an InputError names the images.
    An item that is an InputError is raised here. The workers are gone when the generator ends.
    """
    done = failures = 0
    while True:
        found = once(items, keys_from(done), workers, pin_memory, timeout_s)
        try:
            for item in found:
                failures = 0
                done += 1
                yield item
            return
        except WorkerFailed as error:
            failures += 1
            what = f"{error} (it was to read {items.names_of(next(iter(keys_from(done))))})"
            if failures > MAX_RESTARTS:
                raise InputError(f"{failures} times in a row: {what}") from None
            logging.getLogger(__name__).warning(
                "%s; the workers are started again", printable(what)
            )
        finally:
            found.close()


def once(
    items: "Items", keys: Iterable[Any], workers: int, pin_memory: bool, timeout_s: float
) -> Generator[Any, None, None]:
    """As `read_ahead`, but raises WorkerFailed, within 2 s of a worker's death or of its time limit."""
    loader: DataLoader[Any] = DataLoader(
        items,  # type: ignore[arg-type]  # a Dataset in all but name
        batch_size=None,
        sampler=keys,
        collate_fn=_keep,
        num_workers=workers,
        pin_memory=pin_memory,
        # torch looks after its workers only when its time limit ends: ours is kept by _fetch
        timeout=min(_LOOK_S, timeout_s / 4 or _LOOK_S),
        worker_init_fn=_start_worker,
        prefetch_factor=4,
        generator=torch.Generator(),  # without it torch would draw from the run's global stream
    )
    # torch answers a worker's death by raising from a signal handler, anywhere in the training
    # step. Put back: then the next item notices it, here.
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGCHLD) if main else None
    batches = iter(loader)
    if handler is not None:
        signal.signal(signal.SIGCHLD, handler)
    processes: list[BaseProcess] = list(getattr(batches, "_workers", ()))
    _LIVE.update(processes)
    _widen(batches)
    deadline = _Deadline(processes, timeout_s)
    count = 0
    try:
        while True:
            item = _fetch(batches, deadline)
            if item is None:
                return
            if isinstance(item, InputError):
                raise item
            count += 1
            yield item
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        what = _failure(error, processes, count, deadline)
        if what is None:
            raise
        raise WorkerFailed(f"{what}; check the memory and the disk, or use no workers") from None
    finally:
        deadline.over.set()
        del batches  # makes the workers end
        for process in processes:
            if process.is_alive():  # it hangs, and it ignores SIGTERM
                process.kill()
                process.join(timeout=5)
        _LIVE.difference_update(processes)


@atexit.register
def _end_workers() -> None:
    """Workers of a generator that was not closed (an error ended the program): Python would send them
    SIGTERM, which they ignore, and wait for them for ever. Runs before that."""
    for process in _LIVE:
        process.kill()


def _fetch(batches: Iterator[Any], deadline: "_Deadline") -> Any:
    """The next item, None at the end. Raises what torch makes of a worker that died or is late."""
    with deadline:
        while True:
            try:
                return next(batches, None)
            except RuntimeError as error:
                if _SILENT not in str(error) or deadline.left() <= 0:
                    raise


class _Deadline:
    """Kills all workers when fetching one item takes longer than it may: `with deadline: next(...)`.

    torch's own time limit ends where an answer begins to arrive. But tensors are handed over by a
    thread of the worker that made them, and a worker that was stopped meanwhile would be waited for
    without end; only its death breaks the connection.
    """

    def __init__(self, processes: list[BaseProcess], seconds: float) -> None:
        self.processes, self.seconds = processes, seconds
        self.over, self.passed = threading.Event(), False
        self.begun: float | None = None
        if processes and seconds:
            threading.Thread(target=self._watch, daemon=True).start()

    def __enter__(self) -> None:
        self.begun = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.begun = None

    def left(self) -> float:
        """Seconds."""
        begun = self.begun
        if begun is None or not self.seconds:
            return math.inf
        return begun + self.seconds - time.monotonic()

    def _watch(self) -> None:
        while not self.over.wait(min(_LOOK_S, self.seconds / 4)):
            if self.left() < -_LOOK_S:  # later than _fetch, whose way is the quieter one
                self.passed = True
                for process in self.processes:
                    process.kill()
                return


def _failure(
    error: Exception, processes: list[BaseProcess], count: int, deadline: _Deadline
) -> str | None:
    """What happened to the workers after `count` items; None where the error is not about them."""
    if deadline.passed or _SILENT in str(error):
        number = count % len(processes)  # torch hands the keys out in turn
        return (
            f"loader worker {number} (process {processes[number].pid}) gave no answer within "
            f"{deadline.seconds:g} s"
        )
    # A worker that dies while its answer is on the way leaves all kinds of errors behind, and its
    # connection closes a little before its process has ended.
    if not isinstance(error, RuntimeError):
        ended = connection.wait([process.sentinel for process in processes], timeout=2)
        for process in processes:
            if process.sentinel in ended:
                process.join(timeout=2)
    dead = [(number, p) for number, p in enumerate(processes) if not p.is_alive()]
    if dead:
        number, process = dead[0]
        return f"loader worker {number} (process {process.pid}) died ({_cause(process.exitcode)})"
    return None


def _cause(code: int | None) -> str:
    """How a process ended."""
    if code == _NO_ROOM:
        return "no room in shared memory: make /dev/shm larger, docker run --shm-size=8g"
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit status {code}"


def _widen(batches: Any) -> None:
    """Room for all answers in the pipe: one that is written in parts could be cut by a death, and its
    other half would be waited for without end."""
    with contextlib.suppress(OSError, AttributeError):
        pipe = batches._worker_result_queue._writer.fileno()
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)


def _keep(item: Any) -> Any:
    """Items are whole batches: nothing to collate (torch would turn tuples into lists)."""
    return item


def _start_worker(_: int) -> None:
    """Signals belong to the main process: it writes the checkpoint, then ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    queues.Queue._on_queue_feeder_error = staticmethod(_give_up)  # type: ignore[attr-defined]


def _give_up(error: Exception, _: object) -> None:
    """An answer could not be sent. Python would print a traceback and drop it, and it would be waited for."""
    full = "shared memory" in str(error) or getattr(error, "errno", 0) == errno.ENOSPC
    if not full:
        traceback.print_exception(error)
        sys.stderr.flush()
    os._exit(_NO_ROOM if full else 1)
