"""The teacher's outputs kept on disk, for photos and for fixed crops: each picture through the teacher once."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from cmt_mae.core.errors import InputError, Stopped
from cmt_mae.data.centre import load_image
from cmt_mae.data.sources import open_split
from cmt_mae.engine.trainer import Trainer
from cmt_mae.method.teacher import Teacher
from cmt_mae.pretraining import assembly, teacher_store
from cmt_mae.pretraining.teacher_store import AT_ONCE, TeacherStore
from cmt_mae.tools.pretrain import pretrain
from tiny import Make, as_words, assert_same_state, rows, start

CROPS = {"teacher__cache": True, "data__crops": "fixed"}
PHOTO = {"teacher__view": "photo"}
BOTH = pytest.mark.parametrize("kept", [CROPS, PHOTO], ids=["crops", "photo"])


def folder_of(out: str | Path) -> Path:
    (folder,) = (Path(out) / "teacher_cache").iterdir()
    return folder


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of every forward pass of the teacher."""
    seen: list[tuple[int, ...]] = []
    before = Teacher.run_to_last

    def counted(self: Teacher, images: Tensor) -> Any:
        seen.append(tuple(images.shape))
        return before(self, images)

    monkeypatch.setattr(Teacher, "run_to_last", counted)
    return seen


def stop_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """As a kill, between two checkpoints, before the number-th step of this process."""
    before, taken = Trainer.step, [0]

    def step(self: Trainer, batches: Any, which: int) -> Any:
        taken[0] += 1
        if taken[0] == number:
            raise Stopped("")
        return before(self, batches, which)

    monkeypatch.setattr(Trainer, "step", step)


@pytest.mark.parametrize("tokens", ["masked", "all+cls"])
def test_with_fixed_crops_the_losses_are_those_without_it(
    make: Make, looks: list[Any], tokens: str
) -> None:
    changes: dict[str, Any] = {"target__tokens": tokens, "epochs": 3}
    pretrain(make("plain", data__crops="fixed", **changes))
    every = len(looks)
    pretrain(make("kept", **CROPS, **changes))
    assert (every, len(looks) - every) == (15, 5)  # 40 images in 5 batches: an epoch of looks
    plain, kept = (rows(Path(make(out).out)) for out in ("plain", "kept"))
    assert len(plain) == len(kept) == 15
    for one, two in zip(plain, kept, strict=True):
        for name in ("loss", "loss_teacher", "entropy_teacher", "gradient_norm"):
            assert two[name] == pytest.approx(one[name], rel=1e-5), name


def test_of_a_photo_it_holds_what_the_teacher_puts_out_for_it(
    make: Make, looks: list[Any], images: Path
) -> None:
    """Against the network itself on the whole photo; it has run once a photo, whatever the crops were."""
    config = make(epochs=3, **PHOTO)
    pretrain(config)
    # 40 photos in batches of 8, filled up to AT_ONCE
    assert [shape for shape in looks if shape[0] == AT_ONCE] == [(AT_ONCE, 3, 48, 48)] * 5
    source = open_split(str(images), "train")
    stats = assembly.statistics(config, source)
    teacher, _ = assembly.build_teacher(config, stats)
    assert teacher is not None
    photo = torch.from_numpy(load_image(source, 7, 3)).permute(2, 0, 1)[None]
    photo = torch.nn.functional.interpolate(photo, (48, 48), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(part).view(1, 3, 1, 1) for part in stats)
    with torch.no_grad():
        wanted = teacher.outputs((photo / 255 - mean) / std, "mean", False)
    facts = json.loads((folder_of(config.out) / "store.json").read_text())
    store = TeacherStore(
        folder_of(config.out), teacher, pictures=40, heads="mean", class_token=False, keep_as="fp16",
        made_by=facts,
    )  # fmt: skip
    store.open()
    found = store.outputs(torch.tensor([7]), None, torch.tensor([], dtype=torch.int64))
    torch.testing.assert_close(found.features, wanted.features, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.attention, wanted.attention)
    assert store.count() == 40
    assert facts["view"] == "photo"
    assert facts["input_size"] == [48, 48]


@BOTH
def test_a_run_stopped_twice_continues_bit_for_bit(
    make: Make, monkeypatch: pytest.MonkeyPatch, kept: dict[str, Any]
) -> None:
    """Also where pictures of steps that are taken again are there already, or are damaged."""
    whole, parts = make("whole", **kept), make("parts", **kept)
    pretrain(whole)
    for stopped_at in (3, 7):
        with monkeypatch.context() as patch:
            stop_at(patch, stopped_at)
            with pytest.raises(Stopped):
                pretrain(parts)
    outputs = folder_of(parts.out) / "outputs.bin"
    os.truncate(outputs, outputs.stat().st_size // 2)
    pretrain(parts)
    assert_same_state(Path(whole.out), Path(parts.out))
    assert outputs.read_bytes() == (folder_of(whole.out) / "outputs.bin").read_bytes()


def test_two_processes_share_it(make: Make) -> None:
    """What they keep together is what one process keeps, bit for bit."""
    one, two = make("one", **PHOTO), make("two", **PHOTO)
    pretrain(one)
    run = start(["pretrain", *as_words(two)], processes=2)
    _, err = run.communicate(timeout=120)
    assert run.returncode == 0, err
    for name in ("sums.bin", "outputs.bin"):
        first, second = (folder_of(config.out) / name for config in (one, two))
        assert first.read_bytes() == second.read_bytes()
    for first_row, second_row in zip(rows(Path(one.out)), rows(Path(two.out)), strict=True):
        assert second_row["loss"] == pytest.approx(first_row["loss"], rel=1e-5)


def test_another_run_reads_it(make: Make, tmp_path: Path, looks: list[Any]) -> None:
    """Another seed has other crops, of the same photos; with workers, which ask the store themselves."""
    shared: dict[str, Any] = {**PHOTO, "teacher__cache_folder": str(tmp_path / "shared")}
    pretrain(make("first", **shared))
    before = len(looks)
    config = make("second", seed=1, data__workers=2, **shared)
    pretrain(config)
    assert not [shape for shape in looks[before:] if shape[0] == AT_ONCE]
    assert not (Path(config.out) / "teacher_cache").exists()
    fresh = make("fresh", seed=1, **PHOTO)
    pretrain(fresh)
    assert_same_state(Path(fresh.out), Path(config.out))


@BOTH
def test_what_changes_the_outputs_has_a_store_of_its_own(
    make: Make, images: Path, kept: dict[str, Any]
) -> None:
    source = open_split(str(images), "train")

    def made_by(**changes: Any) -> dict[str, Any]:
        config = make(**{**kept, **changes})
        teacher, backbone = assembly.build_teacher(config, assembly.IMAGENET)
        assert teacher is not None
        assert backbone is not None
        return teacher_store.what_outputs_follow_from(
            config, teacher, source, Accelerator(cpu=True), backbone.digest
        )

    first = made_by()
    for change in (
        {"teacher__attention_block": 0}, {"teacher__feature": "last_k", "teacher__last_k": 2},
        {"teacher__keep_as": "int8"}, {"teacher__project_to": 8}, {"mask__heads": "max"},
        {"target__tokens": "all+cls"}, {"teacher__channels": [0, 0, 0]},
    ):  # fmt: skip
        assert made_by(**change) != first, change
    crops_alone = ({"seed": 1}, {"data__scale": [0.5, 1.0]}, {"data__flip": False})
    for change in crops_alone:
        assert (made_by(**change) != first) == (kept is CROPS), change
    if kept is PHOTO:
        assert made_by(teacher__view_size=24) != first
    assert made_by(batch_size=4, optim__blr=1.0, mask__ratio=0.5) == first


def test_random_crops_are_refused_without_photos(make: Make) -> None:
    with pytest.raises(InputError, match=r"set data\.crops to fixed, or teacher\.view to photo"):
        pretrain(make(teacher__cache=True))


def test_a_disk_that_is_too_small_is_told_first(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(teacher_store.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"40 pictures need 0\.0 GB .* free: make room"):
        pretrain(make(**PHOTO))


def test_the_space_is_taken_when_the_files_are_made(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file with holes, written through a map, would end the process by a signal on a full disk."""
    config = make(epochs=0.2, **PHOTO)
    pretrain(config)
    facts = (folder_of(config.out) / "outputs.bin").stat()
    assert facts.st_blocks * 512 >= facts.st_size

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        InputError, match=r"cannot write .*bin: No space left on device; free space"
    ):
        pretrain(make("other", **PHOTO))


def test_numbers_that_are_not_finite_are_not_kept(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, calls = Teacher.features, [0]

    def features(self: Teacher, *given: Any) -> Tensor:
        calls[0] += 1
        return before(self, *given) * (torch.nan if calls[0] == 2 else 1.0)

    monkeypatch.setattr(Teacher, "features", features)
    config = make(**PHOTO)
    pretrain(config)
    assert sum(row["skipped_steps"] for row in rows(Path(config.out))) == 1
    assert np.fromfile(
        folder_of(config.out) / "sums.bin", np.uint32
    ).all()  # the next epoch had them


@pytest.mark.parametrize(("keep_as", "largest"), [("fp32", 0.0), ("fp16", 5e-4), ("int8", 1e-2)])
def test_error_of_what_is_kept(make: Make, tmp_path: Path, keep_as: Any, largest: float) -> None:
    """Relative error (root mean square) of features that were written and read back."""
    teacher, _ = assembly.build_teacher(make(**PHOTO), assembly.IMAGENET)
    assert teacher is not None
    pictures = torch.randn(20, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = teacher.outputs(pictures, "mean", True)
    store = TeacherStore(
        tmp_path / "store", teacher, pictures=20, heads="mean", class_token=True, keep_as=keep_as, made_by={}
    )  # fmt: skip
    store.create()
    store.open()
    found = store.outputs(torch.arange(20), pictures, torch.arange(20))
    again = store.outputs(torch.arange(20), None, torch.tensor([], dtype=torch.int64))
    assert torch.equal(found.features, again.features)
    error = (found.features - wanted.features).norm() / wanted.features.norm()
    assert error <= largest + 1e-6
    torch.testing.assert_close(found.attention, wanted.attention)
