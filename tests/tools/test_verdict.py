"""The verdict line: each honest case, from lines written by hand."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmt_mae.core.lock import name_of
from cmt_mae.core.run_reader import RunRecord, read_run
from cmt_mae.core.text import duration
from cmt_mae.tools.diagnose.verdict import judge, needed
from written_run import Write


def verdict(run: Path) -> tuple[str, str]:
    found = judge(read_run(str(run)))
    return found.mood, found.line


FEW = {"probe": {"train": 500, "val": 100}}
"""One standard error of a difference at 30 % of 100 images is sqrt(2 * .3 * .7 / 100) = 6.5 points."""
MANY = {"probe": {"train": 500, "val": 10_000}}


def spread(*steps: int) -> Callable[[int], dict[str, float]]:
    """At these steps the student's features are all alike."""
    return lambda step: {"spread_student": 0.001} if step in steps else {}


CASES: list[tuple[dict[str, Any], str, tuple[str, ...]]] = [
    ({"knn": {0: 30.0, 50: 51.4, 100: 61.2}}, "good",
     ("learning: k-NN 61.2, up 9.8 since the switch (up 31.2 from the untrained student); no collapse",)),
    ({"switch": 100, "knn": {0: 30.0, 100: 40.0}}, "good",
     ("learning: k-NN 40.0, up 10.0 from the untrained student; no collapse",)),
    # stage two: 1 + 10/60 at its first line, 1 + 10/100 at its last
    ({}, "unclear", ("not measured: no k-NN; loss 1.17 → 1.1 in stage 2; no collapse",)),
    ({"knn": {50: 44.0}}, "unclear", ("", "k-NN 44.0, measured once (step 50); loss 1.17")),
    ({"knn": {0: 30.0, 50: 30.2, 100: 29.9}}, "bad",
     ("not learning: k-NN 29.9, down 0.3 since the switch (down 0.1 from the untrained",)),
    ({"knn": {0: 30.0, 50: 30.0, 100: 35.0}, "more_facts": FEW}, "unclear", ("no clear rise:",)),
    ({"knn": {0: 30.0, 50: 30.0, 100: 35.0}, "more_facts": MANY}, "good", ("learning",)),
    ({"knn": {0: 30.0, 50: 60.0, 80: 58.0, 100: 50.0}}, "unclear",
     ("getting worse:", "10.0 below its best, at step 50")),
    ({"knn": {0: 30.0, 50: 60.0, 100: 60.1}}, "",
     ("learning, but level since the switch: k-NN 60.1, up 0.1 since the switch",)),
    ({"knn": {0: 20.0, 50: 40.0, 100: 60.0}, "lines": spread(80, 90, 100)}, "bad",
     ("signs of collapse: since step 80, spread_student 0.001 < 0.02; k-NN",)),
    ({"knn": {0: 20.0, 50: 40.0, 100: 60.0}, "lines": spread(20, 30)}, "unclear",
     ("learning: ", "signs of collapse in 2 lines, steps 20 to 30, over since")),
    ({"knn": {0: 20.0, 100: 60.0}, "lines": lambda step: {"skipped_steps": 3} if step == 10 else {}}, "unclear",
     ("", "3 step(s) of 100 skipped, not finite")),
    ({"lines": lambda _: {"skipped_steps": 10, "loss": math.nan}}, "bad", ("steps that are not finite:",)),
    ({"done": 0}, "unclear", ("nothing logged: no line of metrics.jsonl",)),
]  # fmt: skip


@pytest.mark.parametrize(("given", "mood", "texts"), CASES)
def test_each_honest_case(write: Write, given: dict[str, Any], mood: str, texts: Any) -> None:
    start, *parts = texts
    found, line = verdict(write(**given))
    assert line.startswith(start)
    assert all(part in line for part in parts)
    assert mood in ("", found)
    assert not ("no collapse" in line and "signs of collapse" in line)


def test_what_is_missing_is_named(write: Write) -> None:
    assert "--runtime.probe_data" in judge(read_run(str(write()))).fix
    least = needed(read_run(str(write("c", more_facts=FEW))), 30.0, 30.0)
    assert least == pytest.approx(200 * math.sqrt(2 * 0.21 / 100))


def test_stopped_early_and_running(write: Write) -> None:
    run = write(done=40, knn={0: 20.0, 40: 30.0})
    assert verdict(run)[1].endswith("no collapse; stopped early at step 40 of 100")
    (run / "run.lock").write_text(name_of(os.getpid()))
    assert verdict(run)[1].endswith("running, step 40 of 100")
    os.utime(run / "metrics.jsonl", (1, 1))
    assert "no news for" in verdict(run)[1]


NUMBER = st.one_of(st.floats(allow_nan=True), st.integers(-3, 10**6))
NAMES = st.sampled_from(
    ["loss", "stage", "knn_top1", "spread_student", "entropy_teacher", "skipped_steps", "images_per_second"]
)  # fmt: skip


@given(
    rows=st.lists(st.tuples(st.integers(0, 200), st.dictionaries(NAMES, NUMBER)), max_size=12),
    plan=st.dictionaries(st.sampled_from(["total_steps", "switch_step"]), st.integers(-1, 200)),
)
@settings(max_examples=60, deadline=None)
def test_any_numbers_give_one_line(
    rows: list[tuple[int, dict[str, float]]], plan: dict[str, int]
) -> None:
    """Whatever the file holds: a mood, one line, and no fault."""
    lines = [{"step": float(step), **row} for step, row in rows]
    found = judge(RunRecord(Path("x"), "x", rows=lines, facts={"plan": plan}))
    assert found.mood in ("good", "unclear", "bad")
    assert found.line
    assert "\n" not in found.line


def test_duration() -> None:
    assert [duration(s) for s in (42, 720, 5400, 86400, 200_000)] == [
        "42 s",
        "12 min",
        "1.5 h",
        "24.0 h",
        "2.3 days",
    ]
