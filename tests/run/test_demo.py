"""The demo at reduced size, on scenes and on own images."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmt_mae.core.cli import main
from cmt_mae.data.sample import write_imagefolder


def test_demo_measures_all_four_and_continues(tmp_path: Path, teacher_file: Path) -> None:
    out = tmp_path / "demo"
    words = ["demo", "--out", str(out), "--images", "200", "--epochs", "0.7", "--workers", "0",
             "--teacher", str(teacher_file), "--progress", "false"]  # fmt: skip
    assert main(words) == 0
    content = json.loads((out / "demo.json").read_text())
    assert set(content["results"]) == {"untrained", "mae", "cmt", "teacher"}
    assert "What differs" in (out / "report.html").read_text()
    for row in content["results"].values():
        assert 0 <= row["knn"] <= 100
        assert 0 <= row["linear"] <= 100
    steps = [
        json.loads(line)["step"]
        for line in (out / "cmt" / "metrics.jsonl").read_text().splitlines()
    ]
    assert main(words) == 0  # again: nothing is trained twice
    assert len((out / "cmt" / "metrics.jsonl").read_text().splitlines()) == len(steps)
    assert json.loads((out / "demo.json").read_text())["results"] == content["results"]


@pytest.mark.parametrize("labelled", [True, False])
def test_demo_on_own_images(tmp_path: Path, teacher_file: Path, labelled: bool) -> None:
    own = tmp_path / "own"
    if labelled:
        write_imagefolder(own, 110, 10, 48)
        own = own / "train"  # class folders without a held-out part: the demo holds some out
    else:
        own.mkdir()
        noise = np.random.default_rng(0)
        for number in range(70):
            Image.fromarray(noise.integers(0, 255, (50, 60, 3), np.uint8)).save(
                own / f"{number}.png"
            )
    out = tmp_path / "demo"
    words = ["demo", "--out", str(out), "--data", str(own), "--epochs", "1", "--workers", "0",
             "--batch-size", "32", "--teacher", str(teacher_file), "--progress", "false"]  # fmt: skip
    assert main(words) == 0
    content = json.loads((out / "demo.json").read_text())
    assert bool(content["results"]) is labelled
    assert list((out / "cmt" / "pictures").glob("*.png"))
