"""Settings of the method that are off by default, and the numbers that tell whether it works, in real runs."""

from pathlib import Path
from typing import Any

import pytest

from cmt_mae.core.errors import InputError
from cmt_mae.tools.pretrain import pretrain
from tiny import EVERY, Make, rows


def test_what_every_run_logs_of_how_it_works(cmt_run: Path) -> None:
    metrics = rows(cmt_run)
    assert "explained_teacher" not in metrics[0]  # there is no mean yet
    assert "half_lives" not in metrics[4]
    for row in metrics[1:]:
        assert row["explained_teacher"] < 1
        assert row["other_image_loss"] - row["image_gain"] == pytest.approx(row["loss"], rel=1e-4)
    for row in metrics[6:]:
        assert row["explained_momentum"] < 1
        assert row["rank_target_momentum"] > 1
    # m .996 -> 1 by a cosine: half of .004 on average
    assert metrics[-1]["half_lives"] == pytest.approx(5 * 0.002 / 0.693, abs=0.004)


def test_half_lives_of_stage_two_and_a_head_that_starts_at_zero(make: Make, cmt_run: Path) -> None:
    """Nothing predicted costs 1 with layer_norm targets: what a momentum head at zero starts with."""
    config = make(momentum__half_lives=4.0, momentum__zero_head=True)
    pretrain(config)
    metrics = rows(Path(config.out))
    assert metrics[-1]["half_lives"] == pytest.approx(4.0)
    assert metrics[6]["half_lives"] == pytest.approx(1.6)
    assert metrics[5]["loss_momentum"] == pytest.approx(1.0, abs=1e-3)
    assert rows(cmt_run)[5]["loss_momentum"] > 1.05


def test_all_of_them_in_parts(make: Make) -> None:
    """Continued after a stop, and on two processes: test_loop.py."""
    one, parts = make("one", **EVERY), make("parts", **EVERY, runtime__micro_batch=2)
    pretrain(one)
    pretrain(parts)
    for first, second in zip(rows(Path(one.out)), rows(Path(parts.out)), strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target__momentum_last_k": 3}, r"momentum_last_k 3: the student has 2 blocks"),
        ({"mask__student_block": 2}, r"student_block 2: the student has 2 blocks, give -2 to 1"),
        ({"teacher__attention_block": -4}, r"attention block -4 is not there"),
        ({"teacher__feature": "last_k", "teacher__last_k": 9}, r"teacher\.last_k 9: the teacher has"),
        ({"mask__other_image": True, "runtime__micro_batch": 1}, r"takes 1 images at a time: give an even"),
        ({"target__source": "pixel", "target__tokens": "masked+cls"}, r"masked\+cls needs a network"),
        ({"teacher__project_to": 99}, r"project_to 99: the features have 24 channels"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_a_step(
    make: Make, changes: dict[str, Any], words: str
) -> None:
    config = make(**changes)
    with pytest.raises(InputError, match=words):
        pretrain(config)
    assert not Path(config.out).exists()
