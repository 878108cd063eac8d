"""FSDP over two real processes: the run that one process makes, in files that any process count reads."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cmt_mae.core.checkpoint import load_last
from cmt_mae.tools.pretrain import pretrain
from tiny import Make, as_words, rows, start


def test_two_sharded_processes_make_the_run_of_one(make: Make) -> None:
    """Both stages: losses, weights, momentum student, and checkpoints of whole tensors."""
    changes = {"runtime__parallel": "fsdp", "student__drop_path": 0.0}
    one, two = make("one", **changes), make("two", **changes)
    pretrain(one)
    run = start(["pretrain", *as_words(two)], processes=2)
    _, err = run.communicate(timeout=200)
    assert run.returncode == 0, err
    first, second = rows(Path(one.out)), rows(Path(two.out))
    assert [row["step"] for row in first] == [row["step"] for row in second]
    for a, b in zip(first, second, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
    for name in ("backbone", "backbone_momentum"):
        files = [load_file(Path(c.out) / f"{name}.safetensors") for c in (one, two)]
        assert files[0].keys() == files[1].keys()
        for key in files[0]:
            if not key.endswith("qkv.bias"):  # the keys' bias has no effect: Adam steps on rounding
                torch.testing.assert_close(files[1][key], files[0][key], atol=1e-4, rtol=1e-3)
    state = load_last(Path(two.out) / "checkpoints")
    assert state is not None
    shapes = {name: value.shape for name, value in state["learner"].items()}
    whole = load_last(Path(one.out) / "checkpoints")
    assert whole is not None
    assert shapes == {name: value.shape for name, value in whole["learner"].items()}
