"""Adapting a published network: its settings are those of the recipe, and the table says what was found."""

import argparse
from pathlib import Path
from typing import Any

from benchmarks import adapt

GIVEN = argparse.Namespace(
    teacher="embedded", work=Path("runs"), train_size=64, epochs=4.0, batch=8, blr=4e-4
)


def test_rows_differ_in_start_and_loss_alone() -> None:
    runs = {row: adapt.settings(GIVEN, row, Path("images"), 1) for row in adapt.ROWS}
    assert {row: run.init_from for row, run in runs.items()} == {
        "adapted": "teacher", "collab": "teacher", "mae": "teacher", "scratch": "",
    }  # fmt: skip
    assert {row: run.target.source for row, run in runs.items()} == {
        "adapted": "teacher", "collab": "collab", "mae": "pixel", "scratch": "teacher",
    }  # fmt: skip
    assert len({(r.epochs, r.optim.blr, r.batch_size, r.seed, r.student.size()) for r in runs.values()}) == 1


def test_the_table_gives_mean_and_spread_of_every_reading() -> None:
    def entry(cls: float) -> dict[str, Any]:
        return {"metrics": {"cls/top1": cls, "mean/top1": 70.0, "cls+mean/top1": 80.0, "top1": 80.0}, "val": 400}

    content = {
        "entries": {"d/teacher/0": entry(76.0), "d/adapted/0": entry(78.0), "d/adapted/1": entry(80.0)},
        "data": ["d"], "rows": ["adapted", "mae"], "quick": False, "epochs": 10, "blr": 4e-4, "train_size": 64,
        "size": 64, "command": "c", "hardware": {"processor": "p", "cores": 2, "date": "2026-11-28"},
    }  # fmt: skip
    text = adapt.page(content)
    assert "| d | teacher | 1 | 76.0 | 70.0 | 80.0 | 80.0 |" in text
    assert "| d | adapted | 2 | 79.0 ± 1.4 | 70.0 ± 0.0 | 80.0 ± 0.0 | 80.0 ± 0.0 |" in text
    assert "d: 400 images" in text
    assert "| d | mae" not in text
