"""Teacher outputs kept on disk: the same run, each image through the teacher once."""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cmt_mae.core.errors import InputError, Stopped
from cmt_mae.method.teacher import Teacher
from cmt_mae.pretraining.run import pretrain
from cmt_mae.pretraining.stepping import Stepper

from .conftest import Make, as_words, assert_same_state, rows, start

SAME = {"teacher__cache": True, "data__crops": "fixed"}


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batch sizes of every forward pass of the teacher."""
    seen: list[int] = []
    before = Teacher.look

    def counted(self: Teacher, images: Tensor) -> Any:
        seen.append(len(images))
        return before(self, images)

    monkeypatch.setattr(Teacher, "look", counted)
    return seen


@pytest.mark.parametrize("tokens", ["masked", "all+cls"])
def test_losses_are_those_without_it(make: Make, looks: list[int], tokens: str) -> None:
    changes: dict[str, Any] = {"target__tokens": tokens, "epochs": 3}
    pretrain(make("plain", data__crops="fixed", **changes))
    every = len(looks)
    pretrain(make("kept", **SAME, **changes))
    once = len(looks) - every
    # 40 images in 5 batches: an epoch of looks, then two pictures (maps and mask each)
    assert once == 5 + (every - 15)
    plain, kept = (rows(Path(make(out).out)) for out in ("plain", "kept"))
    assert len(plain) == len(kept) == 15
    for one, two in zip(plain, kept, strict=True):
        for name in (
            "loss",
            "loss_teacher",
            "entropy_teacher",
            "class_mass_teacher",
            "gradient_norm",
        ):
            assert two[name] == pytest.approx(one[name], rel=1e-5), name


def test_it_holds_what_the_teacher_says(make: Make) -> None:
    config = make(**SAME)
    pretrain(config)
    folder = Path(config.out) / "teacher_cache"
    assert np.load(folder / "kept_0.npy").all()
    assert np.load(folder / "attention.npy").shape == (40, 16)
    assert np.load(folder / "features.npy").shape == (40, 16, 24)
    mass = np.load(folder / "mass.npy")
    total = np.load(folder / "attention.npy").sum(1) + mass
    np.testing.assert_allclose(total, 1.0, atol=1e-5)


@pytest.mark.parametrize("stop_at", [3, 7])
def test_a_stopped_run_continues_bit_for_bit(
    make: Make, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    """Also where the kept images were noted at a checkpoint in the middle of the first epoch."""
    whole, parts = make("whole", **SAME), make("parts", **SAME)
    pretrain(whole)
    before, taken = Stepper.step, [0]

    def step(self: Stepper, batches: Any, number: int) -> Any:
        taken[0] += 1
        if taken[0] == stop_at:
            raise Stopped("as a kill, between two checkpoints")
        return before(self, batches, number)

    monkeypatch.setattr(Stepper, "step", step)
    with pytest.raises(Stopped):
        pretrain(parts)
    pretrain(parts)
    assert_same_state(Path(whole.out), Path(parts.out))


def test_two_processes_share_it(make: Make) -> None:
    one, two = make("one", **SAME), make("two", **SAME)
    pretrain(one)
    run = start(["pretrain", *as_words(two)], processes=2)
    _, err = run.communicate(timeout=120)
    assert run.returncode == 0, err
    folder = Path(two.out) / "teacher_cache"
    kept = [np.load(folder / f"kept_{rank}.npy") for rank in (0, 1)]
    assert (kept[0] | kept[1]).all()
    for first, second in zip(rows(Path(one.out)), rows(Path(two.out)), strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-5)


def test_random_crops_are_refused(make: Make) -> None:
    with pytest.raises(InputError, match=r"set data\.crops to fixed"):
        pretrain(make(teacher__cache=True))


def test_a_disk_that_is_too_small_is_told_first(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cmt_mae.pretraining import teacher_cache

    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(teacher_cache.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"40 images need .* free: make room"):
        pretrain(make(**SAME))


def test_the_space_is_taken_when_the_files_are_made(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file with holes, written through a map, would end the process by a signal on a full disk."""
    config = make(**SAME)
    pretrain(config)
    facts = (Path(config.out) / "teacher_cache" / "features.npy").stat()
    assert facts.st_blocks * 512 >= facts.st_size

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    other = make("other", **SAME)
    with pytest.raises(InputError, match=r"cannot write .*npy: No space left on device; free space"):
        pretrain(other)
    assert not list((Path(other.out) / "teacher_cache").glob("*.npy"))


def test_a_deleted_file_is_computed_again(make: Make, looks: list[int]) -> None:
    """Its images count as kept no longer: zeros would be taught as the teacher's features."""
    whole, parts = make("whole", epochs=2, **SAME), make("parts", epochs=2, **SAME)
    pretrain(whole)
    pretrain(parts)
    folder = Path(parts.out) / "teacher_cache"
    (folder / "features.npy").unlink()
    newest = max((Path(parts.out) / "checkpoints").iterdir())
    newest.unlink()  # one epoch to go again
    looks.clear()
    pretrain(parts)
    assert looks
    assert_same_state(Path(whole.out), Path(parts.out))


def test_a_new_start_forgets_what_an_earlier_one_kept(make: Make, looks: list[int]) -> None:
    """Without a checkpoint the settings may change, and with them what the teacher sees."""
    config = make(**SAME)
    pretrain(config)
    for path in (Path(config.out) / "checkpoints").iterdir():
        path.unlink()
    looks.clear()
    pretrain(make(seed=config.seed + 1, **SAME))
    assert len(looks) >= 5  # every batch of the first epoch
    fresh = make("fresh", seed=config.seed + 1, **SAME)
    pretrain(fresh)
    assert_same_state(Path(fresh.out), Path(config.out))


def test_numbers_that_are_not_finite_are_not_kept(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, calls = Teacher.features, [0]

    def features(self: Teacher, *given: Any) -> Tensor:
        calls[0] += 1
        return before(self, *given) * (torch.nan if calls[0] == 2 else 1.0)

    monkeypatch.setattr(Teacher, "features", features)
    config = make(**SAME)
    pretrain(config)
    assert sum(row["skipped_steps"] for row in rows(Path(config.out))) == 1
    folder = Path(config.out) / "teacher_cache"
    assert np.isfinite(np.load(folder / "features.npy")).all()
    assert np.load(folder / "kept_0.npy").all()  # the next epoch had them again
