"""Time to quality: the rivals' loops train, keep encoders and resume; curves and table say what was found."""

import argparse
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu import colours
from benchmarks.steps import settings

from benchmarks import quality
from cmt_mae.backbones import load_backbone


@pytest.mark.parametrize("name", ["distil", "transformers"])
def test_a_plain_loop_learns_keeps_encoders_and_goes_on_after_a_kill(name: str, tmp_path: Path) -> None:
    data = colours(tmp_path / "data", 8)
    ends: list[Any] = []
    for stop in (False, True):
        run = settings("one" if name == "distil" else "mae", "micro")
        run.data.path, run.out = str(data), str(tmp_path / f"stop_{stop}")
        if stop:  # as killed after its first point
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(quality, "keep_encoder", once(quality.keep_encoder))
                with pytest.raises(KeyboardInterrupt):
                    quality.train_other(name, run, 0, 2)
        points = quality.train_other(name, run, 0, 2)
        assert [p["steps"] for p in points] == [4, 6]
        ends.append(torch.load(Path(run.out) / "last.pt", weights_only=True))
        first, last = (load_backbone(p["backbone"]) for p in points)
        assert last.img_size == (32, 32)
        name_of = next(n for n, p in last.model.named_parameters() if n.endswith("mlp.fc1.weight"))
        weights = [dict(b.model.named_parameters())[name_of] for b in (first, last)]
        assert not torch.equal(*weights)
    assert ends[0]["step"] == ends[1]["step"] == 6


def once(real: Any) -> Any:
    calls: list[int] = []

    def keep(*words: Any) -> Any:
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*words)

    return keep


def test_curves_say_when_a_level_is_reached_and_the_page_says_it_in_words() -> None:
    def run(values: list[float]) -> dict[str, Any]:
        return {
            "points": [
                {"seconds": 10.0 * (n + 1), "steps": n + 1, "knn d": v, "linear d": v + 1}
                for n, v in enumerate(values)
            ]
        }

    entries = {"run/mae/0": run([10, 20, 30]), "run/mae/1": run([12, 22, 32]), "run/fast/0": run([40, 50, 60])}
    start = {"seconds": 0.0, "knn d": 5.0, "linear d": 6.0}
    entries["run/untrained/0"] = {"points": [start]}
    entries["run/mae/1"]["points"].insert(2, {"seconds": 29.0, "steps": 2, "knn d": 0.0})  # one more, near the end
    rows = quality.curve(entries, "mae", "knn d")
    assert [(s, v) for s, v, _ in rows] == [(0, 5), (10, 11), (20, 21), (30, 31)]
    assert rows[1][2] == pytest.approx(math.sqrt(2))
    assert quality.reached(rows, 16) == pytest.approx(15)
    assert quality.reached(rows, 8) == pytest.approx(5)
    assert math.isinf(quality.reached(rows, 40))
    content = {
        "entries": entries, "contestants": ["mae", "fast", "lightly"], "data": "d",
        "measures": ["knn d", "linear d"], "absent": {"lightly": "not installed"}, "quick": False, "seeds": 2,
        "minutes": 1, "scale": "micro64", "batch": 8,
        "hardware": {"processor": "p", "cores": 2}, "command": "c", "photos": 0, "threads": 1,
    }  # fmt: skip
    text = quality.page(content)
    assert "| untrained | 1 | 5.0 | 6.0 |" in text
    assert "| mae | 2 | 31.0 ± 1.4 | 32.0 ± 1.4 |" in text
    assert "| fast | 1 | 60.0 | 61.0 |" in text
    assert "| fast | 30 | 3 | 7 s (0.25 of MAE's time) |" in text
    assert "| lightly | not installed |" in text


def test_rates_are_tuned_on_seed_0_and_contestants_share_student_and_batch(tmp_path: Path) -> None:
    given = argparse.Namespace(
        data="d", teacher="embedded", scale="micro64", batch=16, work=tmp_path, tune=False, minutes=1.0,
        device="cpu", workers=0,
    )
    mine, theirs = (quality.settings(given, name, 1) for name in ("cmt", "transformers"))
    assert mine.student == theirs.student
    assert mine.batch_size == theirs.batch_size == 16
    assert quality.settings(given, "mae", 0, 2.0).optim.blr == 2 * theirs.optim.blr
    half = quality.settings(given, "distil_half", 0)
    assert (half.optim.blr, half.student) == (theirs.optim.blr / 2, theirs.student)
