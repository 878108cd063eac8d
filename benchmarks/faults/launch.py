"""Commands of cmt-mae in processes that can be hurt: forks of this one, new interpreters, torchrun.

A trial costs a second because its process is forked from one that has imported everything and run no training;
from there on it is what ``python -m cmt_mae`` is: the command's words go through ``cmt_mae.core.cli.main``. With
``real=True`` it is that command, and torchrun for two processes.
"""

import contextlib
import ctypes
import os
import re
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from benchmarks.faults import hooks
from benchmarks.timing import free_port, torchrun_places
from cmt_mae.core.cli import main

MEMORY = 6 << 30
"""Bytes of address space that a judged command may add to what it starts with."""
CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f]")
"""What may drive a terminal; line breaks and tabs are no part of it."""
HUNG = 999
"""Status of a command that was still running at its time limit."""

# imported here, so that a forked process need not
for _module in (
    "cmt_mae.tools.pretrain", "cmt_mae.evaluate.finetune", "cmt_mae.evaluate.segmentation",
    "cmt_mae.evaluate.linear", "cmt_mae.evaluate.knn", "cmt_mae.tools.report",
    "cmt_mae.data.pack", "torch.utils.tensorboard",
    "matplotlib.pyplot", "jsonargparse", "torch.distributed", "torch.nn.parallel",
):  # fmt: skip
    __import__(_module)


@dataclass
class Launch:
    """One start of a command: of one or several processes."""

    words: list[str]
    log: Path
    processes: int = 1
    real: bool = False
    """A new interpreter (or torchrun) instead of a fork; no faults and counters then."""
    kill_at: hooks.KillAt | None = None
    prepare: Callable[[int], None] | None = None
    """Called in every forked process with its rank, before the command."""
    counters: hooks.Counters = field(default_factory=hooks.Counters)
    pids: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    began: float = 0.0

    def start(self) -> "Launch":
        """Processes run on their own from here."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.began = time.monotonic()
        if self.real:
            torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.processes}"]
            words = [*(torchrun if self.processes > 1 else []), "-m", "cmt_mae", *self.words]
            with open(self.log, "ab") as log:
                process = subprocess.Popen(
                    [sys.executable, *words], stdout=log, stderr=log, start_new_session=True, env=one_thread()
                )
            self.pids = [process.pid]
            return self
        port = free_port()
        for rank in range(self.processes):
            self.pids.append(fork(lambda rank=rank: self._run(rank, port), self.log))
        return self

    def _run(self, rank: int, port: int) -> int:
        os.environ.update(torchrun_places(rank, self.processes, port))
        torch.set_num_threads(1)  # as one_thread(): another number of threads rounds differently
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()  # a row may have run something in this process before: alone
        fault = self.kill_at if self.kill_at is not None and self.kill_at.rank == rank else None
        if rank == 0 or fault is not None:
            hooks.watch(self.counters, fault, out_of(self.words))
        hooks.few_pictures()
        if self.prepare is not None:
            self.prepare(rank)
        return main(self.words)

    def until(self, ready: Callable[[], bool], limit_s: float = 60) -> bool:
        """Wait until something is so; False where the command ended, or the time, first."""
        end = time.monotonic() + limit_s
        while self.running() and time.monotonic() < end:
            if ready():
                return True
            time.sleep(0.002)
        return False

    def kill(self, which: int = 0, number: int = signal.SIGKILL) -> None:
        """Send a signal to one of the processes; one that has ended is left alone."""
        if which < len(self.pids) and alive(self.pids[which]):
            os.kill(self.pids[which], number)

    def running(self) -> bool:
        """Whether none of the processes has ended."""
        return all(alive(pid) for pid in self.pids)

    def finish(self, limit_s: float = 180) -> list[int]:
        """Exit statuses, -N for signal N. As torchrun, ends the others soon after one was killed."""
        self.statuses = [0] * len(self.pids)
        end, left = time.monotonic() + limit_s, set(range(len(self.pids)))
        while left:
            for one in sorted(left):
                pid, status = os.waitpid(self.pids[one], os.WNOHANG)
                if pid:
                    self.statuses[one] = os.waitstatus_to_exitcode(status)
                    left.discard(one)
                    if self.statuses[one] == -signal.SIGKILL:
                        end = min(end, time.monotonic() + 0.3)
            if left and time.monotonic() > end:
                for one in left:
                    os.kill(self.pids[one], signal.SIGKILL)
            time.sleep(0.002)
        return self.statuses

    def said(self) -> str:
        """Everything on stdout and stderr so far, this start's and earlier ones'."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def last(self) -> str:
        """The end of it, for a failure's line."""
        return self.said()[-300:]


@dataclass
class Ended:
    """How a judged command ended."""

    status: int
    """Exit status; -N for signal N; ``HUNG``."""
    out: str
    err: str
    seconds: float = 0.0

    def line(self) -> str:
        """The error's line, or the end of stderr."""
        lines = [line for line in self.err.splitlines() if line.startswith("cmt-mae: ")]
        return lines[-1] if lines else self.err[-200:]

    def fault(self) -> str:
        """What is wrong with it: it must be 0, or 2 with one line, and never a traceback; "" where it is right."""
        lines = self.err.splitlines()
        told = [line for line in lines if line.startswith("cmt-mae: ")]
        if "Traceback" in self.err:
            return f"a traceback: {self.err[-200:]}"
        if CONTROL.search(self.err) or CONTROL.search(self.out):
            return "control characters"
        if self.status == 0:
            return "an error and status 0" if told else ""
        if self.status != 2:
            return f"status {self.status}: {self.err[-200:]}"
        if len(told) != 1 or lines[-1] != told[0]:
            return f"{len(told)} lines of error of {len(lines)} lines"
        return ""


def judged(
    words: list[str], folder: Path, limit_s: float = 60, prepare: Callable[[], None] | None = None
) -> Ended:
    """A command in a fork with bounded memory and time."""
    places = [folder / name for name in (".stdout", ".stderr")]

    def work() -> int:
        for number, place in enumerate(places, start=1):
            os.dup2(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
        # pytest has put others in their place
        sys.stdout = open(1, "w", errors="backslashreplace", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", errors="backslashreplace", closefd=False)  # noqa: SIM115
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        if prepare is not None:
            prepare()
        return main(words)

    begin = time.monotonic()
    status = wait(fork(work, folder / ".forked"), limit_s)
    out, err = (place.read_text(errors="backslashreplace") for place in places)
    return Ended(status, out, err, time.monotonic() - begin)


def in_fork(work: Callable[[], None], log: Path, limit_s: float = 120) -> None:
    """Run ``work`` in a fork: this process stays without threads of torch. Raises RuntimeError where it fails."""
    if wait(fork(work, log), limit_s) != 0:
        raise RuntimeError(f"in a fork: {log.read_text()[-2000:]}")


def fork(work: Callable[[], Any], log: Path) -> int:
    """Run ``work`` in a fork whose output goes to ``log``; its int becomes the exit status."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout = open(1, "w", errors="backslashreplace", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", errors="backslashreplace", closefd=False)  # noqa: SIM115
        os.setsid()
        status = work() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
            ctypes.CDLL(None).fflush(None)
        os._exit(status)


def wait(pid: int, limit_s: float) -> int:
    """Exit status of a child; killed and ``HUNG`` at the limit."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.003)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return HUNG


def alive(pid: int) -> bool:
    """Whether a child of ours has not ended yet (without collecting its status)."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def descendants(pid: int) -> list[int]:
    """Children of a process of ours, theirs, and so on."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                parents.setdefault(parent, []).append(int(entry.name))
    found, open_ends = [], [pid]
    while open_ends:
        below = parents.get(open_ends.pop(), [])
        found += below
        open_ends += below
    return found


def out_of(words: list[str]) -> Path:
    """The folder that a command writes."""
    named = [w.removeprefix("--out=") for w in words if w.startswith("--out=")]
    return Path(named[0] if named else words[1])


def one_thread() -> dict[str, str]:
    """The environment of a command of its own."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}
