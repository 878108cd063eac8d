"""Alarms of collapse: silent in recorded healthy runs, loud where a number says nothing any more."""

import json
from pathlib import Path

import pytest

from cmt_mae.engine.collapse import limit_of, signs

RECORDED = Path(__file__).resolve().parents[2] / "benchmarks" / "faults" / "healthy_runs.json"


def test_recorded_healthy_runs_are_silent() -> None:
    runs = json.loads(RECORDED.read_text())["runs"]
    rows = [row for run in runs.values() for row in run]
    assert len(rows) == 62
    assert sum(limit_of(name) is not None for row in rows for name in row) > 200
    assert [signs(row) for row in rows if signs(row)] == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("spread_target_momentum", 0.001),
        ("spread_prediction_teacher", 0.0001),
        ("spread_student", 0.0),
        ("rank_target_teacher", 1.01),
        ("image_share_momentum", 0.0001),
        ("entropy_collab", 0.01),
    ],
)
def test_each_number_has_an_alarm(name: str, value: float) -> None:
    (sign,) = signs({"step": 3, "loss": 0.0, name: value})
    assert sign.startswith(f"{name} {value:.2g} < ")
    assert signs({name: 10.0, "note": "x"}) == []


def test_nan_is_no_sign_of_collapse() -> None:
    assert signs({"spread_student": float("nan")}) == []
