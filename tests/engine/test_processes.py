"""Deterministic algorithms, and what a process says that has lost another."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from cmt_mae.core.errors import LostProcess
from cmt_mae.engine.processes import make_accelerator, stopping_with_the_others


@pytest.fixture
def flags() -> Iterator[None]:
    kept = os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    torch.use_deterministic_algorithms(False)  # what another test of this process may have left
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    if kept is not None:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = kept


@pytest.mark.usefixtures("flags")
def test_deterministic_is_asked_of_torch_cudnn_and_cublas() -> None:
    make_accelerator("cpu", "fp32")
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    make_accelerator("cpu", "fp32", deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


class Two(Accelerator):
    """As if a second process stood beside this one."""

    def __init__(self) -> None: ...

    num_processes = property(lambda _: 2)
    process_index = property(lambda _: 1)


def test_a_lost_process_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    text = "[gloo/pair.cc:554] Connection closed by peer [127.0.0.1]:4711\nmore"
    with (
        pytest.raises(LostProcess, match="process 1 of 2: another process of this run is gone"),
        stopping_with_the_others(Two(), Path("runs/a")),
    ):
        raise RuntimeError(text)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "runs/a is whole: run the same command to continue" in said


@pytest.mark.parametrize("alone", [True, False])
def test_other_errors_stay_what_they_are(alone: bool) -> None:
    accelerator = make_accelerator("cpu", "fp32") if alone else Two()
    text = "Connection closed by peer" if alone else "shapes cannot be multiplied"
    with pytest.raises(RuntimeError, match=text), stopping_with_the_others(accelerator, Path("x")):
        raise RuntimeError(text)


def test_a_process_that_nobody_meets_ends_in_one_line() -> None:
    """Rank 0 of two whose rank 1 never comes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = (
        "from cmt_mae.engine import meeting, processes\n"
        "meeting.MEETING_S = 1.0\n"
        "processes.make_accelerator('cpu', 'fp32')\n"
    )
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env={**os.environ, **place}
    )  # fmt: skip
    assert done.returncode == 75
    (line,) = (text for text in done.stderr.splitlines() if text.startswith("cmt-mae: "))
    assert "did not find each other within 1 s (process 0 of 2)" in line


def run_under_torchrun(program: str, *words: str) -> str:
    """What a program beside this file wrote."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words]
    path = str(Path(__file__).with_name(program))
    done = subprocess.run([*launch, path], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_processes_meet_again_after_a_restart_by_torchrun() -> None:
    """torch 2.14 leaves the addresses of the dead in the store that both starts use."""
    written = run_under_torchrun("restart_program.py", "--nproc-per-node=2", "--max-restarts=1")
    assert written.count("sum 2.0") == 2


def test_three_processes_add_up_in_the_same_order_after_a_resume() -> None:
    """DDP would sort its buckets anew after the first step, and round otherwise from then on.

    And no thread of a connection outlives ``leave_processes``: torch would now and then abort while Python ends.
    """
    said = run_under_torchrun("order_program.py", "--nproc-per-node=3")
    assert said.count("equal True, threads of connections left 0") == 3
