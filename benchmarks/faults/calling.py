"""One command of cmt-mae, called and judged: in this process, or in a fork that may crash, hang or eat memory."""

import contextlib
import ctypes
import io
import os
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cmt_mae.core.cli import main

MEMORY = 6 << 30
"""Bytes of address space that a forked command may add to what it starts with."""
CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f]")
"""What may drive a terminal; line breaks and tabs are no part of it."""


@dataclass
class Outcome:
    """How a command ended."""

    status: int
    """Exit status; -N for signal N; 999: it was still running at its time limit."""
    out: str
    err: str

    def line(self) -> str:
        """The error's line, or the end of stderr."""
        lines = [line for line in self.err.splitlines() if line.startswith("cmt-mae: ")]
        return lines[-1] if lines else self.err[-200:]


class Hang(BaseException):
    """Raised in a command that takes too long."""


def fault_in(outcome: Outcome, alone: bool = False) -> str | None:
    """What is wrong with an ending: it must be 0, or 2 with one line, and never a traceback.

    alone: that line is all there is on stderr.
    """
    lines = outcome.err.splitlines()
    told = [line for line in lines if line.startswith("cmt-mae: ")]
    if "Traceback" in outcome.err:
        return "a traceback"
    if CONTROL.search(outcome.err) or CONTROL.search(outcome.out):
        return "control characters"
    if outcome.status == 0:
        return "an error and status 0" if told else None
    if outcome.status != 2:
        return f"status {outcome.status}"
    if len(told) != 1 or lines[-1] != told[0] or (alone and len(lines) != 1):
        return f"{len(told)} lines of error of {len(lines)} lines"
    return None


def call(words: list[str], limit_s: int = 20) -> Outcome:
    """In this process: for commands that end before any work."""
    out, err = io.StringIO(), io.StringIO()

    def ring(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(limit_s)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(words)
    except Hang:
        status = 999
    except BaseException:
        traceback.print_exc(file=err)
        status = 998
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return Outcome(status, out.getvalue(), err.getvalue())


def call_forked(
    words: list[str], folder: Path, limit_s: float = 60, prepare: Callable[[], None] | None = None
) -> Outcome:
    """In a fork with bounded memory and time, from a process that has run no torch code yet."""
    places = [folder / name for name in (".stdout", ".stderr")]
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        status = 998
        try:
            for number, place in enumerate(places, start=1):
                os.dup2(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
            # pytest has put others in their place
            sys.stdout = open(1, "w", errors="backslashreplace", closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", errors="backslashreplace", closefd=False)  # noqa: SIM115
            used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
            if prepare is not None:
                prepare()
            status = main(words)
        except BaseException:
            traceback.print_exc()
        finally:
            flush()
            os._exit(status)
    status = wait(pid, limit_s)
    out, err = (place.read_text(errors="backslashreplace") for place in places)
    return Outcome(status, out, err)


def flush() -> None:
    """Python's buffers, and those of C and C++."""
    sys.stdout.flush()
    sys.stderr.flush()
    ctypes.CDLL(None).fflush(None)


def wait(pid: int, limit_s: float) -> int:
    """Exit status of a child; killed and 999 at the limit."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.003)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return 999


def in_fork(work: Callable[[], None], limit_s: float = 120) -> None:
    """Run ``work`` in a fork: this process stays without threads of torch."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            with open(os.devnull, "w") as null, contextlib.redirect_stderr(null):
                work()
            status = 0
        finally:
            flush()
            os._exit(status)
    if (status := wait(pid, limit_s)) != 0:
        raise RuntimeError(f"preparation ended with status {status}")


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Relative paths of commands lead here."""
    before = os.getcwd()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
