"""What a run directory survives: torn and damaged files, a folder left half made, a full disk."""

import json
import resource
from pathlib import Path
from typing import Any

import pytest

from cmt_mae.core.checkpoint import save_checkpoint
from cmt_mae.core.continuing import refuse_other_settings
from cmt_mae.core.errors import InputError
from cmt_mae.core.run_reader import read_metrics
from cmt_mae.core.runs import RunDir
from cmt_mae.engine.trackers import Trackers


def open_run(path: Path, **settings: Any) -> RunDir:
    return RunDir(str(path), {"seed": 0, **settings}, (), writes=True)


def test_a_start_killed_before_its_first_file_can_be_made_again(tmp_path: Path) -> None:
    (tmp_path / "run.lock").write_text("pid 1")
    (tmp_path / ".config.yaml.4194000.tmp").write_text("see")
    run = open_run(tmp_path)
    run.claim()
    run.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "run.lock"]
    (tmp_path / "config.yaml").unlink()
    (tmp_path / "photo.jpg").write_text("mine")
    with pytest.raises(InputError, match="holds no run"):
        open_run(tmp_path)


@pytest.mark.parametrize("name", ["config.yaml", "run.json"])
@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"{", b"- 1", b""])
def test_a_damaged_file_is_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    run = open_run(tmp_path)
    run.claim()
    run.close()
    save_checkpoint(run.checkpoints, 1, {"step": 1})
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name) as caught:
        open_run(tmp_path).known_facts()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "tail", [b'{"step": 3, "lo', b"\x00" * 50, b"\xff\xfe", b"[1]\n", b'{"a": 1}']
)
def test_a_torn_line_of_metrics_is_left_out(tmp_path: Path, tail: bytes) -> None:
    run = open_run(tmp_path)
    run.claim()
    for step in (1, 2):
        run.append_metrics({"step": step})
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(tail)
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]
    run.cut_metrics(1)
    run.append_metrics({"step": 2})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_a_whole_last_line_without_its_end_is_not_glued_to_the_next(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    run.claim()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    run.cut_metrics(2)
    run.append_metrics({"step": 3})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]


def test_warnings_are_kept_as_long_as_their_steps(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    run.claim()
    for step in (1, 2, 3):
        run.append_warning(step, f"at step {step}")
    run.cut_metrics(2)  # the run goes on from step 2
    run.append_warning(3, "again")
    texts = [row["text"] for row in read_metrics(tmp_path, "warnings.jsonl")]
    assert texts == ["at step 1", "at step 2", "again"]
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_full_disk_under_metrics_or_curves_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run(tmp_path)
    run.claim()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5, before[1]))  # the kernel's own refusal
    try:
        with pytest.raises(InputError, match=r"cannot write .*metrics.jsonl: File too large"):
            run.append_metrics({"step": 1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "metrics.jsonl").stat().st_size == 5  # torn, as a full disk leaves it
    assert run.read_metrics() == []

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    trackers = Trackers(run, "none", {}, 0)
    monkeypatch.setattr(type(trackers.board), "add_scalar", full)
    monkeypatch.setattr(type(trackers.board), "close", full)
    with pytest.raises(InputError, match=r"cannot write .*tensorboard: No space left"), trackers:
        trackers.write({"step": 1, "loss": 1.0})
    with (
        pytest.raises(InputError, match=r"cannot write .*tensorboard"),
        Trackers(run, "none", {}, 0),
    ):
        pass


def test_a_taken_folder_gets_no_checkpoint(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    run.claim()
    run.settle()
    (tmp_path / "run.lock").write_text("pid 5 on elsewhere")
    with pytest.raises(InputError, match="taken over"):
        run.settle()


def test_a_folder_that_cannot_be_read_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_text("x")

    def refuse(_: Path) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(InputError, match="cannot be read: Permission denied"):
        open_run(tmp_path)


def test_a_setting_that_a_run_is_older_than_had_its_default(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    run.claim()
    run.close()
    save_checkpoint(run.checkpoints, 1, {"step": 1})
    now = {"seed": 0, "new": 1}
    with pytest.raises(InputError, match=r"new: 2 -> 1"):
        RunDir(str(tmp_path), now, (), writes=True, defaults={"new": 2})
    RunDir(str(tmp_path), now, (), writes=True, defaults={"new": 1})


def test_a_checkpoint_of_a_run_with_other_settings_is_refused(tmp_path: Path) -> None:
    run = open_run(tmp_path, epochs=4, blr=0.1)
    refuse_other_settings(run, {"step": 1})  # version 0.1 kept no settings in it
    refuse_other_settings(run, {"step": 1, "settings": {"seed": 0, "blr": 0.1, "epochs": 2}})  # before --extend
    with pytest.raises(InputError, match=r"belongs to another run, other, .*blr: 0.2 -> 0.1"):
        refuse_other_settings(run, {"step": 1, "run": "other", "settings": {"seed": 0, "blr": 0.2}})
