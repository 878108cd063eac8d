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
from multiprocessing import connection
from pathlib import Path
from typing import Any

IMPORTED = ("cmt_mae.evaluate.detection", "cmt_mae.evaluate.segmentation", "cmt_mae.evaluate.finetune",
            "cmt_mae.evaluate.knn", "cmt_mae.evaluate.linear", "cmt_mae.evaluate.video.evaluate",
            "benchmarks.scale", "benchmarks.loaders")  # fmt: skip


def forks() -> Any:
    """The context of multiprocessing whose processes are forked from the one with the imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    return context


def start(
    program: Path, *words: str, processes: int = 1, timeout: float = 200
) -> "subprocess.CompletedProcess[str]":
    """Run a Python file to its end, in one process or several that work together.

    Returns the first status that is not 0 (minus the signal of a killed one) and what all of them wrote.
    As soon as one fails the others are killed, and all of them after ``timeout`` seconds.
    """
    context = forks()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    handle, log = tempfile.mkstemp(suffix=".log")
    os.close(handle)
    places = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
    started = []
    for rank in range(processes):
        more = {**places, "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank}
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment |= {k: str(v) for k, v in more.items()} if processes > 1 else {}
        started.append(context.Process(target=enter, args=(str(program), words, environment, log)))
        started[-1].start()
    end = time.monotonic() + timeout
    left = list(started)
    while left and time.monotonic() < end and not any(p.exitcode for p in started):
        connection.wait([p.sentinel for p in left], end - time.monotonic())
        left = [p for p in left if p.is_alive()]
    status = next((p.exitcode for p in started if p.exitcode), -1 if left else 0)
    for process in left:
        process.kill()
        process.join()
    text = Path(log).read_text()
    os.unlink(log)
    return subprocess.CompletedProcess([str(program), *words], status, "", text)


def enter(program: str, words: tuple[str, ...], environment: dict[str, str], log: str) -> None:
    """The forked process: as if ``python program words`` had been called, its output in a file."""
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [program, *words]
    sys.path.insert(0, str(Path(program).parent))
    runpy.run_path(program, run_name="__main__")
