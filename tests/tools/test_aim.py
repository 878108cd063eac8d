"""Does attention lie on objects: the measure against scikit-learn, and what it says of maps known beforehand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import roc_auc_score

from cmt_mae.core.cli import main
from cmt_mae.core.errors import InputError
from cmt_mae.tools.inspect.aim import (
    CENTRE,
    Aim,
    aims_of,
    auc,
    better,
    centre_prior,
    measure,
    object_patches,
    paired,
    read_objects,
    verdict,
)
from cmt_mae.tools.inspect.look import Inspector
from cmt_mae.tools.inspect.networks import Run, open_backbone


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images of 64 px, each with one bright square of 24 px away from the middle, and its mask."""
    root = tmp_path_factory.mktemp("objects")
    rng = np.random.default_rng(0)
    for part in ("images", "masks"):
        (root / part).mkdir()
    for number in range(8):
        pixels = rng.integers(0, 80, (64, 64, 3), dtype=np.uint8)
        top, left = 8 * (number % 2) * 5, 8 * (number // 2 % 2) * 5
        mask = np.zeros((64, 64), np.uint8)
        mask[top : top + 24, left : left + 24] = 255
        pixels[mask > 0] = 250
        Image.fromarray(pixels).save(root / "images" / f"{number}.png")
        Image.fromarray(mask).save(root / "masks" / f"{number}.png")
    return root


@given(
    st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=40).filter(
        lambda rows: len({kind for _, kind in rows}) == 2
    )
)
def test_auc_is_scikit_learns(rows: list[tuple[int, bool]]) -> None:
    scores, kinds = (np.array(part) for part in zip(*rows, strict=True))
    assert auc(scores, kinds) == pytest.approx(roc_auc_score(kinds, scores))


def test_a_map_that_is_the_object_has_1_and_one_that_avoids_it_0(objects: Path) -> None:
    networks = open_backbone("embedded")
    images = read_objects(str(objects), 8)
    assert object_patches(images[0][1], networks).sum() == 9

    def bright(look: Inspector) -> torch.Tensor:
        return look.images.mean(1).unfold(1, 8, 8).unfold(2, 8, 8).mean((3, 4)).flatten(1)

    noise = torch.rand(8, 64, generator=torch.Generator().manual_seed(0))
    found = {
        aim.name: aim
        for aim in measure(
            networks, images,
            {"bright": bright, "dark": lambda look: -bright(look), "chance": lambda _: noise}, {"chance"},
        )
    }  # fmt: skip
    assert found["bright"].auc == 1
    assert found["dark"].auc == 0
    assert found["chance"].auc == pytest.approx(0.5, abs=4 * found["chance"].error + 0.02)
    assert abs(found["chance"].hidden_more or 0) < 0.15
    assert {aim.n for aim in found.values()} == {8}
    assert found[CENTRE].auc < 0.5, "the squares are in the corners"
    assert centre_prior((8, 8)).argmax() in (27, 28, 35, 36)


def test_verdict_and_what_would_be_better() -> None:
    def one(name: str, *each: float, drawn: float | None = None) -> Aim:
        error = float(np.std(each) / (len(each) - 1) ** 0.5)
        return Aim(name, float(np.mean(each)), error, len(each), list(each), drawn)

    blind, spot = one("teacher", 0.4, 0.6, 0.5, drawn=0.0), one(CENTRE, 0.7, 0.72, 0.71)
    other = one("teacher, block before the last", 0.75, 0.95, 0.85)
    worked, why = verdict([blind, other, spot])
    assert not worked
    assert "does not see objects (AUC 0.500 ± 0.058" in why
    assert "n = 3 images" in why
    assert better([blind, other, spot]) is other
    weak = one("teacher", 0.6, 0.62, 0.61, drawn=0.1)
    assert "less well than" in verdict([weak, spot])[1]
    seeing = one("teacher", 0.8, 0.82, 0.81, drawn=0.2)
    assert verdict([seeing, spot])[0]
    assert better([seeing, weak, spot]) is None
    assert paired(seeing, spot) == (pytest.approx(0.1), pytest.approx(0))


def test_of_a_run_and_by_explain(cmt_run: Path, objects: Path, tmp_path: Path) -> None:
    names = [aim.name for aim in aims_of(Run(cmt_run).at(10), read_objects(str(objects), 3))]
    assert names == ["teacher", "student", "both", "teacher, block before the last", CENTRE]
    words = ["explain", "--run", str(cmt_run), "--what", "aim", "--data", str(objects)]
    assert main([*words, "--out", str(tmp_path), "--count", "2", "--progress=false"]) == 0
    assert (tmp_path / "aim.png").is_file()


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        read_objects(str(tmp_path / "nowhere"), 3)
    with pytest.raises(InputError, match="has no objects to look for"):
        read_objects(str(tmp_path), 3)
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "images" / "a.png")
    with pytest.raises(InputError, match="its mask"):
        read_objects(str(tmp_path), 3)
    Image.new("L", (64, 32)).save(tmp_path / "masks" / "a.png")
    with pytest.raises(InputError, match="differ in size"):
        read_objects(str(tmp_path), 3)
    Image.new("L", (64, 64)).save(tmp_path / "masks" / "a.png")
    with pytest.raises(InputError, match="both an object and background"):
        measure(open_backbone("embedded"), read_objects(str(tmp_path), 3), {}, set())
