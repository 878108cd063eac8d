"""The sample data of the package: counts, layouts, and that the repository's generator makes the same pictures."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmt_mae.core.errors import InputError
from cmt_mae.data.ade20k import open_ade20k
from cmt_mae.data.coco import open_coco
from cmt_mae.data.davis import open_davis
from cmt_mae.data.decode import decode_image
from cmt_mae.data.sample import (
    CLASSES,
    MOST_FRAMES,
    MOST_SCENES,
    SEMANTIC_CLASSES,
    write_ade20k,
    write_coco,
    write_davis,
    write_imagefolder,
)
from cmt_mae.data.sources import open_split

ROOT = Path(__file__).parents[2]


def test_class_folders(tmp_path: Path) -> None:
    """Balanced, split apart, and of the side that is asked for."""
    write_imagefolder(tmp_path / "a", 30, 20)
    train, val = (open_split(str(tmp_path / "a"), split) for split in ("train", "val"))
    assert train.classes == val.classes == list(CLASSES)
    assert np.bincount([train.label(i) or 0 for i in range(30)]).tolist() == [3] * 10
    assert len({train.read(i) for i in range(30)} | {val.read(i) for i in range(20)}) == 50
    image = decode_image(train.read(0))
    assert image.shape == (96, 96, 3)
    assert image.std() > 10
    write_imagefolder(tmp_path / "b", 1, 0, 40)
    (small,) = (tmp_path / "b").rglob("*.webp")
    assert Image.open(small).size == (40, 40)


def test_every_picture_of_the_other_layouts_agrees_with_its_truth(tmp_path: Path) -> None:
    write_coco(tmp_path / "coco", **MOST_SCENES)
    write_ade20k(tmp_path / "ade", **MOST_SCENES)
    write_davis(tmp_path / "davis")
    ade = open_ade20k(tmp_path / "ade")
    assert ade.classes == SEMANTIC_CLASSES
    for split, masks in (("train", ade.train.masks), ("val", ade.val.masks)):
        coco = open_coco(tmp_path / "coco", split)
        for index, path in enumerate(masks):
            semantic = np.asarray(Image.open(path))
            example = coco.example(index)
            assert example.image.shape[1:] == semantic.shape
            for mask, label, box in zip(example.masks, example.labels, example.boxes, strict=True):
                inside = mask.numpy().astype(bool)
                assert (semantic[inside] == int(label)).all(), "the same picture, the same thing"
                rows, columns = np.nonzero(inside)
                edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                assert box.tolist() == [float(edge) for edge in edges]
    videos = open_davis(str(tmp_path / "davis"))
    assert [len(video.frames) for video in videos] == [MOST_FRAMES] * 2


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give 0 to 2000"):
        write_imagefolder(tmp_path / "a", 2001, 1)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").touch()
    with pytest.raises(InputError, match="holds something already"):
        write_davis(tmp_path / "b")


def test_the_generator_makes_them() -> None:
    """A picture of each zip, byte for byte but for the codec: decoded, within its rounding."""
    program = """
import io, sys, zipfile
import numpy as np
from PIL import Image
import make
files = [("images.zip", make.labelled(("val", 3))), ("scenes.zip", next(make.annotated("val"))),
         ("videos.zip", next(make.videos()))]
for name, (path, data) in files:
    with zipfile.ZipFile(make.OUT / name) as archive:
        two = [np.asarray(Image.open(io.BytesIO(d))).astype(int) for d in (data, archive.read(path))]
    assert abs(two[0] - two[1]).mean() < 1, name
"""
    folder = ROOT / "sample"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=folder, timeout=60)
