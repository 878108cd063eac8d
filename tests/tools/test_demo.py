"""The demo at reduced size, on the sample images and on own ones."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmt_mae.core.cli import main
from cmt_mae.data.sample import write_imagefolder


def test_demo_measures_all_four_and_continues(
    tmp_path: Path, teacher_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    words = ["demo", "--out", str(out), "--images", "64", "--epochs", "2", "--batch-size", "32", "--workers",
             "0", "--teacher", str(teacher_file), "--progress", "false"]  # fmt: skip
    assert main(words) == 0
    content = json.loads((out / "demo.json").read_text())
    rows = content["results"]
    assert list(rows) == ["untrained", "mae", "cmt", "teacher"]
    for row in rows.values():
        assert 0 <= row["knn"] <= 100
        assert 0 <= row["linear"] <= 100
        assert row["images"] == 32
    said = " ".join(capsys.readouterr().out.split())
    for row in rows.values():
        assert f"{row['knn']:.1f} ± " in said
    assert f"{rows['cmt']['knn'] - rows['mae']['knn']:+.1f} (" in said
    assert f"Its teacher stands at {rows['teacher']['knn']:.1f}" in said
    page = (out / "report.html").read_text()
    assert "What differs" in page
    assert "no k-NN" not in page
    for row in rows.values():  # the same numbers as in the table
        assert f"{row['knn']:.1f}" in page
    metrics = (out / "cmt" / "metrics.jsonl").read_bytes()
    assert main(words) == 0  # again: nothing is trained twice
    assert (out / "cmt" / "metrics.jsonl").read_bytes() == metrics
    assert json.loads((out / "demo.json").read_text())["results"] == rows


@pytest.mark.parametrize("labelled", [True, False])
def test_demo_on_own_images(tmp_path: Path, teacher_file: Path, labelled: bool) -> None:
    own = tmp_path / "own"
    if labelled:
        write_imagefolder(own, 110, 0, 48)
        own = own / "train"  # class folders without a held-out part: the demo holds some out
    else:
        own.mkdir()
        noise = np.random.default_rng(0)
        for number in range(40):
            pixels = noise.integers(0, 255, (50, 60, 3), np.uint8)
            Image.fromarray(pixels).save(own / f"{number}.png")
    out = tmp_path / "demo"
    words = ["demo", "--out", str(out), "--data", str(own), "--epochs", "1", "--workers", "0",
             "--batch-size", "32", "--teacher", str(teacher_file), "--progress", "false"]  # fmt: skip
    assert main(words) == 0
    content = json.loads((out / "demo.json").read_text())
    assert bool(content["results"]) is labelled
    if labelled:
        assert content["results"]["cmt"]["images"] == 20  # two of eleven of each class
        facts = json.loads((out / "cmt" / "run.json").read_text())
        assert facts["data"]["images"] == 90, "what is measured on is not trained on"
    assert list((out / "cmt" / "pictures").glob("*.png"))
