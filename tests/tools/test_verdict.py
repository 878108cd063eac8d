"""The verdict line: each honest case, from lines written by hand."""

import math
import os
from pathlib import Path

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


def test_learning_as_in_the_issue(write: Write) -> None:
    run = write(knn={0: 30.0, 50: 51.4, 100: 61.2})
    line = "learning: k-NN 61.2, up 9.8 since the switch (up 31.2 from the untrained student); no collapse"
    assert verdict(run) == ("good", line)


def test_one_stage_is_measured_from_the_first(write: Write) -> None:
    run = write(switch=100, knn={0: 30.0, 100: 40.0})
    line = "learning: k-NN 40.0, up 10.0 from the untrained student; no collapse"
    assert verdict(run) == ("good", line)


def test_not_measured(write: Write) -> None:
    mood, line = verdict(write())
    assert mood == "unclear"
    # stage two: 1 + 10/60 at its first line, 1 + 10/100 at its last
    assert line == "not measured: no k-NN; loss 1.17 → 1.1 in stage 2; no collapse"
    assert "--runtime.probe_data" in judge(read_run(str(write("b")))).fix


def test_measured_once(write: Write) -> None:
    assert "k-NN 44.0, measured once (step 50); loss 1.17" in verdict(write(knn={50: 44.0}))[1]


def test_not_learning(write: Write) -> None:
    mood, line = verdict(write(knn={0: 30.0, 50: 30.2, 100: 29.9}))
    assert mood == "bad"
    assert line.startswith(
        "not learning: k-NN 29.9, down 0.3 since the switch (down 0.1 from the untrained"
    )


def test_a_rise_that_chance_could_make(write: Write) -> None:
    """100 images: one standard error of a difference at 30 % is sqrt(2 * .3 * .7 / 100) = 6.5 points."""
    few = {"probe": {"train": 500, "val": 100}}
    mood, line = verdict(write(knn={0: 30.0, 50: 30.0, 100: 35.0}, more_facts=few))
    assert (mood, line.split(":")[0]) == ("unclear", "no clear rise")
    many = {"probe": {"train": 500, "val": 10_000}}
    assert verdict(write("b", knn={0: 30.0, 50: 30.0, 100: 35.0}, more_facts=many))[0] == "good"
    assert needed(read_run(str(write("c", more_facts=few))), 30.0, 30.0) == pytest.approx(
        200 * math.sqrt(2 * 0.21 / 100)
    )


def test_getting_worse(write: Write) -> None:
    mood, line = verdict(write(knn={0: 30.0, 50: 60.0, 80: 58.0, 100: 50.0}))
    assert (mood, line.split(":")[0]) == ("unclear", "getting worse")
    assert "10.0 below its best, at step 50" in line


def test_level_since_the_switch(write: Write) -> None:
    line = verdict(write(knn={0: 30.0, 50: 60.0, 100: 60.1}))[1]
    assert line.startswith(
        "learning, but level since the switch: k-NN 60.1, up 0.1 since the switch"
    )


def test_collapse_now_outweighs_a_rising_knn(write: Write) -> None:
    run = write(
        knn={0: 20.0, 50: 40.0, 100: 60.0},
        lines=lambda step: {"spread_student": 0.001} if step >= 80 else {},
    )
    mood, line = verdict(run)
    assert mood == "bad"
    assert line.startswith("signs of collapse: since step 80, spread_student 0.001 < 0.02; k-NN")


def test_collapse_that_is_over(write: Write) -> None:
    run = write(
        knn={0: 20.0, 50: 40.0, 100: 60.0},
        lines=lambda step: {"spread_student": 0.001} if step in (20, 30) else {},
    )
    mood, line = verdict(run)
    assert mood == "unclear"
    assert line.startswith("learning: ")
    assert "signs of collapse in 2 lines, steps 20 to 30, over since" in line
    assert "no collapse" not in line


def test_skipped_steps(write: Write) -> None:
    lines = {10: {"skipped_steps": 3}}
    mood, line = verdict(write(knn={0: 20.0, 100: 60.0}, lines=lambda step: lines.get(step, {})))
    assert (mood, "3 step(s) of 100 skipped, not finite" in line) == ("unclear", True)
    mood, line = verdict(write("b", lines=lambda _: {"skipped_steps": 10, "loss": math.nan}))
    assert (mood, line.split(":")[0]) == ("bad", "steps that are not finite")


def test_stopped_early_and_running(write: Write) -> None:
    run = write(done=40, knn={0: 20.0, 40: 30.0})
    assert verdict(run)[1].endswith("no collapse; stopped early at step 40 of 100")
    (run / "run.lock").write_text(name_of(os.getpid()))
    assert verdict(run)[1].endswith("running, step 40 of 100")
    os.utime(run / "metrics.jsonl", (1, 1))
    assert "no news for" in verdict(run)[1]


def test_nothing_logged(write: Write) -> None:
    run = write(done=0)
    assert verdict(run) == ("unclear", "nothing logged: no line of metrics.jsonl")


NUMBER = st.one_of(st.floats(allow_nan=True), st.integers(-3, 10**6))
NAMES = st.sampled_from(
    [
        "loss",
        "stage",
        "knn_top1",
        "spread_student",
        "entropy_teacher",
        "skipped_steps",
        "images_per_second",
    ]
)


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
