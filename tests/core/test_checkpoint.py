"""Checkpoints are whole or invisible, never run code, and yield to the one before when damaged."""

import errno
import os
import pickle
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cmt_mae.core import files
from cmt_mae.core.checkpoint import (
    forget_after,
    list_checkpoints,
    load_checkpoint,
    load_last,
    mark_best,
    rotate,
    save_checkpoint,
)
from cmt_mae.core.errors import InputError
from cmt_mae.core.files import sha256, sweep, write_atomically, write_json


def state(step: int) -> dict[str, Any]:
    weights = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
    return {"step": step, "learner": {"w": weights}, "note": ["a", 1.5, None]}


def saved(folder: Path, *steps: int) -> list[Path]:
    return [save_checkpoint(folder, step, state(step)) for step in steps]


def same(loaded: dict[str, Any] | None, step: int) -> None:
    assert loaded is not None
    assert loaded["step"] == step
    assert loaded["note"] == ["a", 1.5, None]
    weights: Tensor = loaded["learner"]["w"]
    assert torch.equal(weights, state(step)["learner"]["w"])


def test_the_newest_is_loaded_bit_by_bit(tmp_path: Path) -> None:
    assert load_last(tmp_path) is None
    paths = saved(tmp_path / "checkpoints", 9, 100, 20)
    assert [p.name for p in paths][:1] == ["step_00000009.pt"]
    same(load_last(tmp_path / "checkpoints"), 100)
    assert [p.stem for p in list_checkpoints(tmp_path / "checkpoints")] == [
        "step_00000009", "step_00000020", "step_00000100",
    ]  # fmt: skip
    assert not list((tmp_path / "checkpoints").glob(".*"))  # nothing left aside


def test_the_sidecar_is_the_files_checksum(tmp_path: Path) -> None:
    (path,) = saved(tmp_path, 3)
    theirs = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout
    assert path.with_suffix(".sha256").read_text() == theirs.split()[0] == sha256(path)


@pytest.mark.parametrize("harm", ["flip", "cut", "empty"])
def test_a_damaged_one_yields_to_the_one_before(
    harm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, path = saved(tmp_path, 1, 2)
    content = bytearray(path.read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 1
    path.write_bytes({"flip": bytes(content), "cut": bytes(content[:-40]), "empty": b""}[harm])
    same(load_last(tmp_path), 1)
    warning = capsys.readouterr().err
    assert "step_00000002.pt is damaged" in warning
    assert warning.count("\n") == 1
    with pytest.raises(InputError, match="damaged"):
        load_checkpoint(path)


def test_when_all_are_damaged_nothing_begins_again_in_silence(tmp_path: Path) -> None:
    for path in saved(tmp_path, 1, 2):
        path.write_bytes(b"no")
    with pytest.raises(InputError, match=r"no checkpoint in .* is whole"):
        load_last(tmp_path)


def test_one_without_its_sidecar_is_invisible(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    (tmp_path / "step_00000002.sha256").unlink()
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000001.pt"]
    same(load_last(tmp_path), 1)
    (tmp_path / "step_00000001.sha256").unlink()  # a copy that left the checksums behind
    with pytest.raises(InputError, match=r"\.sha256 file beside it"):
        load_last(tmp_path)


def test_a_checksum_that_is_no_text_is_damage(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    (tmp_path / "step_00000002.sha256").write_bytes(b"\xff\xfe\x00")
    same(load_last(tmp_path), 1)


@pytest.mark.parametrize("moment", ["content", "checksum", "name", "tidying"])
def test_while_a_step_is_written_again_the_earlier_writing_loads(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluations write a step's checkpoint a second time, often the only one that is kept."""
    saved(tmp_path, 2)
    again = {**state(2), "learner": {"w": torch.ones(3)}}
    replaced: list[str] = []
    replace, save = os.replace, torch.save

    def die_at(source: Path, goal: Path) -> None:
        replaced.append(Path(goal).suffix)
        wanted = {"checksum": [".sha256"], "name": [".sha256", ".pt"]}
        if replaced == wanted.get(moment, [".sha256", ".pt", ".sha256"]):
            raise KeyboardInterrupt
        replace(source, goal)

    def die(_: Any, file: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", die_at)
    monkeypatch.setattr(torch, "save", die if moment == "content" else save)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 2, again)
    monkeypatch.undo()
    loaded = load_last(tmp_path)
    if moment == "tidying":
        assert loaded is not None
        assert torch.equal(loaded["learner"]["w"], torch.ones(3))
    else:
        same(loaded, 2)
    save_checkpoint(tmp_path, 2, again)
    assert len((tmp_path / "step_00000002.sha256").read_text()) == 64
    assert not list(tmp_path.glob(".*"))


def test_a_whole_one_that_may_not_be_read_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 1, 2)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(InputError, match=r"step_00000002.pt cannot be read \(Permission denied\)"):
        load_last(tmp_path)


def test_content_and_checksum_are_on_the_disk_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power cut leaves is what was flushed: the order of flushes and names, as the kernel is told."""
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def flush(number: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{number}")).name
        done.append("flush " + name.split(".")[2] if name.startswith(".") else "flush the folder")
        fsync(number)

    def rename(source: Path, goal: Path) -> None:
        done.append(f"name {Path(goal).suffix[1:]}")
        replace(source, goal)

    monkeypatch.setattr(files.os, "fsync", flush)
    monkeypatch.setattr(files.os, "replace", rename)
    saved(tmp_path, 1)
    assert done == [
        "flush sha256", "name sha256", "flush the folder", "flush pt", "name pt", "flush the folder",
    ]  # fmt: skip


def test_those_passed_over_are_forgotten(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3)
    forget_after(tmp_path, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step_00000001.pt",
        "step_00000001.sha256",
    ]


def test_steps_of_nine_digits_are_in_order(tmp_path: Path) -> None:
    saved(tmp_path, 99_999_999, 100_000_000)
    same(load_last(tmp_path), 100_000_000)
    rotate(tmp_path, 1, lambda _: False)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_100000000.pt"]


class Evil:
    """Unpickled, it makes a folder."""

    def __init__(self, where: Path) -> None:
        self.where = where

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.where),)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_code_in_a_checkpoint_is_refused_and_never_run(how: str, tmp_path: Path) -> None:
    saved(tmp_path, 1)
    path, mark = tmp_path / "step_00000002.pt", tmp_path / "was_here"
    if how == "torch":
        torch.save({"step": 2, "learner": Evil(mark)}, path)
    else:
        path.write_bytes(pickle.dumps(Evil(mark), protocol=2))
    path.with_suffix(".sha256").write_text(sha256(path))
    for load, what in ((load_checkpoint, path), (load_last, tmp_path)):
        with pytest.raises(InputError, match=r"refused|cannot be read"):
            load(what)
    assert not mark.exists()
    torch.load(path, weights_only=False) if how == "torch" else pickle.loads(path.read_bytes())
    assert mark.exists()  # the trap does work where code is run


def test_old_ones_are_deleted_but_those_to_keep(tmp_path: Path) -> None:
    saved(tmp_path, 10, 20, 30, 40, 50)
    rotate(tmp_path, 2, {20}.__contains__)
    assert [p.stem for p in list_checkpoints(tmp_path)] == [
        "step_00000020", "step_00000040", "step_00000050",
    ]  # fmt: skip
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".pt"] * 3 + [".sha256"] * 3


def test_the_best_stays_when_its_step_is_deleted(tmp_path: Path) -> None:
    first, second, _ = saved(tmp_path, 1, 2, 3)
    mark_best(first)
    mark_best(second)
    mark_best(second)  # twice, as by a run that is continued
    rotate(tmp_path, 1, lambda _: False)
    assert not second.exists()
    same(load_checkpoint(tmp_path / "best.pt"), 2)
    same(load_last(tmp_path), 3)  # and it is no step of its own
    (tmp_path / "best.pt").write_bytes(b"no")
    with pytest.raises(InputError, match="damaged"):
        load_checkpoint(tmp_path / "best.pt")


@pytest.mark.parametrize("again", [False, True])
def test_a_full_disk_is_one_clear_line_and_leaves_no_trace(again: bool, tmp_path: Path) -> None:
    saved(tmp_path, 1)
    step = 1 if again else 2
    aside = tmp_path / f".step_{step:08d}.pt.{os.getpid()}.tmp"
    aside.symlink_to("/dev/full")  # the kernel's own full disk
    with pytest.raises(
        InputError, match=rf"cannot write .*step_0000000{step}.pt: No space left.*; free space"
    ) as caught:
        saved(tmp_path, step)
    assert "\n" not in str(caught.value)
    same(load_last(tmp_path), 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step_00000001.pt",
        "step_00000001.sha256",
    ]


def test_the_best_without_hard_links_is_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    mark_best(*saved(tmp_path, 7))
    same(load_checkpoint(tmp_path / "best.pt"), 7)
    assert (tmp_path / "best.pt").stat().st_nlink == 1


def test_sweeping_takes_what_dead_processes_left(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    kept = [f".a.pt.{os.getppid()}.tmp", ".notes.tmp", "b.1.tmp", "step_00000001.pt"]
    for name in [*kept, f".a.pt.{dead.pid}.tmp", f".b.json.{os.getpid()}.tmp"]:
        (tmp_path / name).write_text("x")
    sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(kept)
    sweep(tmp_path / "not there")


def test_readers_see_the_old_file_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.json"
    write_json(path, {"step": 1})
    old = path.read_text()
    seen: list[str] = []
    replace = os.replace

    def watched(source: Path, goal: Path) -> None:
        assert Path(source).read_text() == '{\n "step": 2\n}\n'  # whole before it takes the name
        seen.append(path.read_text())
        replace(source, goal)

    monkeypatch.setattr(files.os, "replace", watched)
    write_json(path, {"step": 2})
    assert seen == [old]
    assert path.read_text() == '{\n "step": 2\n}\n'

    def fail(aside: Path) -> None:
        aside.write_text("half")
        raise ValueError("a bug, not a full disk")

    with pytest.raises(ValueError, match="a bug"):
        write_atomically(path, fail)
    assert path.read_text() == '{\n "step": 2\n}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]
