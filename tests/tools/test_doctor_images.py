"""What `cmt-mae doctor` says of images, counted by hand."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmt_mae.tools.diagnose.images import check_images


def jpeg(seed: int, size: tuple[int, int] = (40, 30)) -> bytes:
    """A picture of noise."""
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, format="JPEG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """train: 20 images, two of them broken, three copies of another, one grey; val: one of train's, a new one."""
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
    train = tmp_path / "train"
    for number in range(14):
        (train / "ab"[number % 2] / f"{number:02}.jpg").write_bytes(jpeg(number))
    for number in range(3):
        (train / "a" / f"copy{number}.jpg").write_bytes(jpeg(0))
    (train / "b" / "torn.jpg").write_bytes(jpeg(99)[:700])
    Image.new("RGB", (50, 60), (9, 9, 9)).save(train / "a" / "grey.png")
    (train / "b" / "empty.jpg").write_bytes(b"")
    (tmp_path / "val" / "a" / "seen.jpg").write_bytes(jpeg(5))
    (tmp_path / "val" / "b" / "new.jpg").write_bytes(jpeg(50))
    return tmp_path


def test_images_are_counted_by_hand(folder: Path) -> None:
    facts, found = check_images(str(folder), 3, 0, progress=False)
    train = facts["splits"]["train"]
    assert (train["images"], train["looked_at"]) == (20, 20)
    assert (train["broken"], train["copies"], train["one_colour"]) == (2, 3, 1)
    assert {name for name, _ in train["broken_examples"]} == {"b/torn.jpg", "b/empty.jpg"}
    copies = ["a/00.jpg", "a/copy0.jpg", "a/copy1.jpg", "a/copy2.jpg"]
    assert [sorted(one) for one in train["copies_examples"]] == [copies]
    assert train["height"] == [30, 30, 60]
    assert train["width"] == [40, 40, 50]
    assert facts["classes"] == {"count": 2, "least": ["b", 9], "most": ["a", 11]}
    assert facts["in_both_splits"] == [["b/05.jpg", "a/seen.jpg"]]
    assert sorted(one.what for one in found) == [
        "broken images", "one-colour images", "the same image many times", "validation images in the training set",
    ]  # fmt: skip


def test_a_sample_says_that_it_is_one_and_stays_within_it(folder: Path) -> None:
    facts, found = check_images(str(folder), 3, 7, progress=False)
    assert facts["splits"]["train"]["looked_at"] == 7
    for one in found:
        if one.what in ("broken images", "the same image many times"):
            assert "a sample of 7 of 20 images" in one.why


def test_mean_and_std_of_the_images_against_numpy(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    arrays = [
        np.repeat(np.repeat(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), 4, 0), 4, 1)
        for _ in range(6)
    ]
    for number, array in enumerate(arrays):
        Image.fromarray(array).save(tmp_path / f"{number}.png")
    split = check_images(str(tmp_path), 3, 0, progress=False)[0]["splits"]["train"]
    pixels = np.stack(arrays).reshape(-1, 3) / 255
    np.testing.assert_allclose(split["mean"], pixels.mean(0), atol=2e-3)
    np.testing.assert_allclose(split["std"], pixels.std(0), atol=2e-3)
