"""The fault harness: rows that must hold do hold, and broken promises are noticed."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from benchmarks.faults import __main__ as harness
from benchmarks.faults import files, inputs, launch, tested
from benchmarks.faults.lab import Broken, Lab, NotHere, Row
from benchmarks.faults.launch import CONTROL, HUNG, Ended, judged
from benchmarks.faults.same import apart, differences
from hypothesis import given
from hypothesis import strategies as st

from cmt_mae.core import cli
from cmt_mae.core.text import one_line, printable

REPOSITORY = Path(__file__).parents[2]
HELD = (
    "kill -9: pretrain, 2 processes", "kill -9 inside pack", "SIGTERM, SIGINT, SIGHUP: pretrain, 1",
    "a second signal", "full disk", "code in weights", "fuzzed settings", "tiny data", "not finite once: teacher",
)  # fmt: skip
"""Parts of names of rows; together they reach every module of the harness."""


def test_a_selection_of_rows_holds_and_is_written_down(tmp_path: Path) -> None:
    """In an interpreter that has run no torch code: forks of this one would hang."""
    words = [sys.executable, "-m", "benchmarks.faults", "--quick", "--out", str(tmp_path), "--only", *HELD]
    done = subprocess.run(words, capture_output=True, text=True, cwd=REPOSITORY, timeout=540, check=False)
    content = json.loads((tmp_path / "faults.json").read_text())
    failed = {name: row["failures"] for name, row in content["rows"].items() if row["failures"]}
    assert failed == {}
    assert done.returncode == 0
    assert len(content["rows"]) == len(HELD)
    assert all(row["quick"] and row["commit"] for row in content["rows"].values())
    page = (tmp_path / "faults.md").read_text()
    assert "| code in weights (quick) |" in page
    assert " 0 fail" in page


def test_the_table_covers_what_was_promised() -> None:
    names = [row.name for row in harness.TABLE]
    assert len(names) == len(set(names)) > 45
    for part in (
        "SIGSTOP", "clock", "process group", "inside report", "inside export", "closed pipe", "SIGHUP",
        "full disk", "workers", "processes", "fuzzed", "tiny", "collapse", "checkpoints deleted", "huge header",
        "two packs", "two trainings", "another teacher",
    ):  # fmt: skip
        assert any(part in name for name in names), part
    assert {row.name for row in harness.chosen_rows(["full disk", "tiny"])} == {"full disk", "tiny data"}


def test_rows_that_run_tests_name_tests_that_are_there() -> None:
    for promise, file, names in tested.TESTS.values():
        text = (REPOSITORY / "tests" / file).read_text()
        assert promise
        assert all(f"\ndef {name}(" in text for name in names), file


def test_a_broken_promise_an_error_of_the_harness_and_a_missing_machine_are_told_apart(
    tmp_path: Path,
) -> None:
    def breaks(_: Lab, rng: random.Random) -> None:
        raise Broken(f"lost {rng.random() < 2}")

    def absent(_: Lab, __: random.Random) -> None:
        raise NotHere("needs root")

    lab = Lab(tmp_path)
    rows = {}
    for name, trial in (("a", breaks), ("b", absent), ("c", lambda *_: 1 / 0), ("d", lambda *_: None)):
        rows[name] = harness.run(Row(name, "holds", trial, 2), lab, 0)
    assert [row["state"] for row in rows.values()] == ["FAIL", "not here", "FAIL", "PASS"]
    assert rows["a"]["failures"] == ["trial 0: lost True", "trial 1: lost True"]
    assert "the harness: ZeroDivisionError" in rows["c"]["failures"][0]
    about = {"command": "c", "versions": {"python": "3", "torch": "2"}, "hardware": {"processor": "p", "cores": 2}}
    page = harness.page({**about, "rows": rows})
    assert "1 rows pass, 2 fail, 1 cannot be made" in page
    assert "- b: needs root" in page


def test_any_bit_that_differs_between_two_runs_is_noticed(tmp_path: Path) -> None:
    from cmt_mae.core.checkpoint import save_checkpoint

    for name in ("whole", "other"):
        run = tmp_path / name
        save_checkpoint(run / "checkpoints", 1, {"step": 1, "w": torch.tensor([1.0, 2.0])})
        (run / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5, "images_per_second": 3}\n')
    assert differences(tmp_path / "whole", tmp_path / "other") == []
    lines = tmp_path / "other" / "metrics.jsonl"
    lines.write_text('{"step": 1, "loss": 0.6, "images_per_second": 4}\n')
    assert differences(tmp_path / "whole", tmp_path / "other") == ["metrics.jsonl: the line of step 1"]
    lines.write_text('{"step": 1, "loss": 0.5, "images_per_second": 4}\n')
    save_checkpoint(tmp_path / "other" / "checkpoints", 1, {"step": 1, "w": torch.tensor([1.0, -2.0])})
    (tmp_path / "other" / "more.txt").write_text("x")
    assert len(differences(tmp_path / "whole", tmp_path / "other")) == 2
    assert apart({"a": torch.tensor(0.0)}, {"a": torch.tensor(-0.0)}) == ["/a"]


@pytest.mark.parametrize(
    ("ended", "fault"),
    [
        (Ended(0, "", ""), ""),
        (Ended(2, "", "progress\ncmt-mae: no\n"), ""),
        (Ended(2, "", "cmt-mae: no\ncmt-mae: no\n"), "2 lines"),
        (Ended(2, "", "cmt-mae: no\nmore\n"), "1 lines of error of 2"),
        (Ended(2, "", ""), "0 lines"),
        (Ended(1, "", "cmt-mae: a fault\n"), "status 1"),
        (Ended(-11, "", ""), "status -11"),
        (Ended(2, "", "Traceback (most recent\ncmt-mae: no\n"), "traceback"),
        (Ended(2, "", "cmt-mae: \x1b[2J\n"), "control"),
        (Ended(0, "", "cmt-mae: no\n"), "status 0"),
    ],
)
def test_an_ending_is_judged(ended: Ended, fault: str) -> None:
    assert bool(ended.fault()) == bool(fault)
    assert fault in ended.fault()


def test_a_crash_a_hang_and_too_much_memory_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "dispatch", lambda _: os.abort())
    assert judged([], tmp_path).status == -6
    monkeypatch.setattr(cli, "dispatch", lambda _: time.sleep(30))
    assert judged([], tmp_path, limit_s=0.3).status == HUNG
    assert inputs.called([], limit_s=1).status == HUNG
    monkeypatch.setattr(cli, "dispatch", lambda _: bytearray(2 * launch.MEMORY))
    outcome = judged([], tmp_path)
    assert outcome.status == 2
    assert "out of memory" in outcome.line()
    monkeypatch.setattr(cli, "dispatch", lambda _: 1 / 0)
    monkeypatch.setenv("CMT_MAE_DEBUG", "1")
    assert "a traceback" in inputs.called([]).fault()


def test_code_in_weights_would_run(tmp_path: Path) -> None:
    made, marker = tmp_path / "made", tmp_path / "marker"
    made.mkdir()
    found = {path.name: path for path in files.containers(made, marker)}
    assert len(found) == 6
    assert not marker.exists()
    torch.load(found["zip.pth"], weights_only=False)
    assert marker.exists()


@given(st.text(), st.integers(1, 50))
def test_text_is_fit_to_be_shown(text: str, limit: int) -> None:
    shown = printable(text)
    assert not CONTROL.search(shown)
    assert "\n" not in shown
    assert all(c.isprintable() for c in shown)
    assert printable(shown) == shown
    assert len(one_line(text, limit)) <= limit + 3
