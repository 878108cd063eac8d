"""Programs of tests in processes of their own, forked from one that has already imported what they need.

An import of torch and of the package takes longer than what most of them do. The processes have the variables
that torchrun sets; that torchrun itself works is shown by tests/engine.
"""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch

IMPORTED = (
    "cmt_mae.tools.pretrain", "cmt_mae.evaluate.detection", "cmt_mae.evaluate.segmentation",
    "cmt_mae.evaluate.finetune", "cmt_mae.evaluate.knn", "cmt_mae.evaluate.linear",
    "cmt_mae.evaluate.video.evaluate", "benchmarks.scale", "benchmarks.loaders",
)  # fmt: skip


def forks() -> Any:
    """The context of multiprocessing whose processes are forked from the one with the imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    return context


class Running:
    """One program in one process, or in several that work together, as ``subprocess.Popen`` shows a process."""

    def __init__(self, program: Path, words: Sequence[str], processes: int = 1) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        handle, self.log = tempfile.mkstemp(suffix=".log")
        os.close(handle)
        places = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
        self.ranks = []
        for rank in range(processes):
            more = {**places, "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank}
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            environment |= {k: str(v) for k, v in more.items()} if processes > 1 else {}
            given = (str(program), tuple(words), environment, self.log)
            self.ranks.append(forks().Process(target=enter, args=given))
            self.ranks[-1].start()
        self.pid = self.ranks[0].pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """None while all go on or have ended well and some go on; else the status (minus the signal of a kill)."""
        failed = next((p.exitcode for p in self.ranks if p.exitcode), None)
        if failed or not any(p.is_alive() for p in self.ranks):
            self.returncode = failed or 0
        return self.returncode

    def wait(self, timeout: float = 200) -> int:
        """To the end; as soon as one fails the others are killed, and all after ``timeout`` seconds (-1)."""
        end = time.monotonic() + timeout
        while self.poll() is None and time.monotonic() < end:
            alive = [p.sentinel for p in self.ranks if p.is_alive()]
            connection.wait(alive, max(0, end - time.monotonic()))
        if self.returncode is None:
            self.returncode = -1
        self.kill()
        for process in self.ranks:
            process.join()
        return self.returncode

    def communicate(self, timeout: float = 200) -> tuple[str, str]:
        """To the end: nothing, and what all of them wrote."""
        self.wait(timeout)
        text = Path(self.log).read_text()
        os.unlink(self.log)
        return "", text

    def kill(self) -> None:
        for process in self.ranks:
            process.kill()

    def terminate(self) -> None:
        for process in self.ranks:
            process.terminate()


def start(
    program: Path, *words: str, processes: int = 1, timeout: float = 200
) -> "subprocess.CompletedProcess[str]":
    """Run a Python file to its end."""
    running = Running(program, words, processes)
    _, text = running.communicate(timeout)
    return subprocess.CompletedProcess([str(program), *words], running.returncode or 0, "", text)


def enter(program: str, words: tuple[str, ...], environment: dict[str, str], log: str) -> None:
    """The forked process: as if ``python program words`` had been called, its output in a file."""
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = [program, *words]
    sys.path.insert(0, str(Path(program).parent))
    runpy.run_path(program, run_name="__main__")
