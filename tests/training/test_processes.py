"""Deterministic algorithms, and what a process says that has lost another."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from cmt_mae.errors import LostProcess
from cmt_mae.training.processes import make_accelerator, stopping_with_the_others


@pytest.fixture
def flags() -> Iterator[None]:
    kept = os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
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
