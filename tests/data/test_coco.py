"""COCO's layout: masks and boxes against pycocotools, crops against torchvision, and every bad file."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as reference_mask
from pycocotools.coco import COCO

from cmt_mae.core.errors import InputError
from cmt_mae.data.coco import open_coco, same_classes
from cmt_mae.data.coco_masks import mask_of, run_lengths
from cmt_mae.data.detection_crops import (
    Example,
)
from cmt_mae.data.sample import write_coco

Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes") / "coco"
    write_coco(root, 6, 3)
    return root


@pytest.fixture
def copied(scenes: Path, tmp_path: Path) -> Path:
    """The scenes' folder with files of its own to spoil."""
    for folder in ("annotations", "train2017", "val2017"):
        (tmp_path / folder).mkdir()
        for file in (scenes / folder).iterdir():
            (tmp_path / folder / file.name).write_bytes(file.read_bytes())
    return tmp_path


def change(root: Path, how: Change, split: str = "train") -> None:
    file = root / "annotations" / f"instances_{split}2017.json"
    content = json.loads(file.read_text())
    how(content)
    file.write_text(json.dumps(content))


def with_masks(example: Example) -> None:
    """Boxes and masks belong together, whatever has been done to them."""
    count, (height, width) = len(example.boxes), example.size
    assert example.masks.shape == (count, height, width)
    assert example.labels.shape == (count,)
    assert example.masks.dtype == torch.uint8
    if count:
        assert example.boxes.min() >= 0
        assert (example.boxes <= torch.tensor([width, height, width, height])).all()


# --- reading ---------------------------------------------------------------------------------------


def test_real_coco_equals_pycocotools(shared: Path) -> None:
    split = open_coco(shared / "data" / "coco", "train")
    theirs = COCO(str(split.path))
    assert len(split) == 60
    assert len(split.classes) == 80
    assert split.category_ids == sorted(theirs.cats)
    assert split.category_ids[-1] == 90, "the ids have gaps"
    for index in (0, 7, 31):
        example = split.example(index)
        records = theirs.loadAnns(theirs.getAnnIds(int(split.ids[index])))
        with_masks(example)
        masks = np.stack([theirs.annToMask(record) for record in records])
        assert np.array_equal(example.masks.numpy(), masks)
        boxes = np.array([record["bbox"] for record in records])
        boxes[:, 2:] += boxes[:, :2]
        np.testing.assert_allclose(example.boxes.numpy(), boxes, atol=0.51)
        names = [theirs.cats[record["category_id"]]["name"] for record in records]
        assert [split.classes[k - 1] for k in example.labels] == names


def test_scenes_have_gaps_crowds_and_an_empty_image(scenes: Path) -> None:
    split, val = open_coco(scenes, "train"), open_coco(scenes, "val")
    same_classes(split, val)
    assert split.category_ids == [1, 2, 3, 4, 6, 7, 8, 10, 11, 13]
    assert split.counts[3] == 0
    assert split.crowds >= 1
    empty = split.example(3)
    assert (len(empty.boxes), len(empty.masks), len(empty.labels)) == (0, 0, 0)
    with_masks(empty)
    crowded = [a for a in split.annotations(1) if a["iscrowd"]]
    assert crowded
    assert len(split.example(1).boxes) == len(split.annotations(1)) - len(crowded)
    for a in split.annotations(1):
        height, width = split.sizes[1]
        assert mask_of(a["segmentation"], height, width).sum() == a["area"]
    assert len(split.ground_truth()["annotations"]) == split.counts.sum() + split.crowds


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 40), st.floats(0, 1))
def test_masks_in_every_form_equal_pycocotools(seed: int, h: int, w: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    mask = np.asfortranarray(rng.random((h, w)) < share).astype(np.uint8)
    packed = reference_mask.encode(mask)
    text = packed["counts"].decode()
    lengths = run_lengths(text)
    assert sum(lengths) == h * w
    assert np.array_equal(mask_of({"size": [h, w], "counts": text}, h, w), mask)
    assert np.array_equal(mask_of({"size": [h, w], "counts": lengths}, h, w), mask)
    polygons = [list(rng.uniform(-5, 45, 2 * int(n))) for n in rng.integers(3, 9, 2)]
    theirs = reference_mask.decode(reference_mask.merge(reference_mask.frPyObjects(polygons, h, w)))
    assert np.array_equal(mask_of(polygons, h, w), theirs)


@given(st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=140), max_size=30))
def test_run_lengths_refuse_or_read_any_text(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert all(isinstance(n, int) for n in run_lengths(text))


def test_grey_palette_and_turned_images(copied: Path) -> None:
    split = open_coco(copied, "train")
    height, width = split.sizes[0]
    path = copied / "train2017" / split.names[0]
    Image.new("L", (width, height), 77).save(path)
    assert open_coco(copied, "train").image(0).unique().tolist() == [77]
    Image.new("P", (width, height)).save(path, format="PNG")
    assert open_coco(copied, "train").image(0).shape == (3, height, width)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    upright = split.sizes.index(next(size for size in split.sizes if size[0] != size[1]))
    height, width = split.sizes[upright]
    Image.new("RGB", (height, width)).save(copied / "train2017" / split.names[upright], exif=exif)
    assert open_coco(copied, "train").image(upright).shape == (3, height, width)


def test_fingerprint_follows_annotations_and_images(copied: Path) -> None:
    before = open_coco(copied, "train").fingerprint()
    assert open_coco(copied, "train").fingerprint() == before
    change(copied, lambda c: c["annotations"].pop())
    after = open_coco(copied, "train").fingerprint()
    assert after != before
    split = open_coco(copied, "train")
    Image.new("RGB", split.sizes[2][::-1]).save(copied / "train2017" / split.names[2])
    assert open_coco(copied, "train").fingerprint() != after


def test_other_names_and_places(copied: Path) -> None:
    (copied / "images").mkdir()
    (copied / "train2017").rename(copied / "images" / "train")
    file = copied / "annotations" / "instances_train2017.json"
    file.rename(file.with_name("instances_train.json"))
    assert len(open_coco(copied, "train")) == 6
    (copied / "annotations" / "instances_train_b.json").write_text("{}")
    with pytest.raises(InputError, match="several files of train"):
        open_coco(copied, "train")


# --- what is wrong ---------------------------------------------------------------------------------


def put(key: str, value: Any, rows: str = "annotations", at: int = 0) -> Change:
    return lambda content: content[rows][at].update({key: value})


WRONG: dict[str, tuple[Change, str]] = {
    "absent": (put("file_name", "gone.jpg", "images"), r"names 1 image\(s\) that are not in"),
    "outside": (put("file_name", "../x.jpg", "images"), "must be a path below the images"),
    "absolute": (put("file_name", "/etc/passwd", "images"), "must be a path below the images"),
    "zero byte": (put("file_name", "a\0b", "images"), r"names 1 image\(s\) that are not in"),
    "other size": (put("width", 4000, "images"), "its boxes and masks are for another picture"),
    "huge size": (put("width", 10**9, "images"), "'width' must be an integer in 1.."),
    "huge pixels": (
        lambda c: c["images"][0].update(width=10**8, height=10**8),
        "over the limit",
    ),
    "float size": (put("height", 1.5, "images"), "'height' must be an integer"),
    "text id": (put("id", "one", "images"), "'id' must be an integer"),
    "giant id": (put("id", 10**40, "images"), "'id' must be an integer"),
    "same image twice": (lambda c: c["images"].append(c["images"][0]), "its id is there twice"),
    "same box twice": (lambda c: c["annotations"].append(c["annotations"][0]), "there twice"),
    "same class twice": (lambda c: c["categories"].append(c["categories"][0]), "there twice"),
    "no name": (lambda c: c["categories"][0].pop("name"), "it has no 'name'"),
    "no such image": (put("image_id", 999), "its image 999 is not in the list of images"),
    "no such class": (put("category_id", 5), "its category 5 is not in the list of categories"),
    "bool class": (put("category_id", True), "'category_id' must be an integer"),
    "crowd 2": (put("iscrowd", 2), "'iscrowd' must be an integer in 0..1"),
    "box of 3": (put("bbox", [1, 2, 3]), r"'bbox' must be \[x, y, width, height\]"),
    "box of text": (put("bbox", ["1", 2, 3, 4]), "'bbox' must be"),
    "negative box": (put("bbox", [1, 2, -3, 4]), "'bbox' must be"),
    "nan box": (put("bbox", [float("nan"), 2, 3, 4]), "'bbox' must be"),
    "endless box": (put("bbox", [float("inf"), 2, 3, 4]), "'bbox' must be"),
    "giant box": (put("bbox", [10**400, 2, 3, 4]), "'bbox' must be"),
    "negative area": (put("area", -1), "'area' must be"),
    "nan area": (put("area", float("nan")), "'area' must be"),
    "no mask": (lambda c: c["annotations"][0].pop("segmentation"), "it has no mask .*remove all"),
    "empty mask": (put("segmentation", []), "it has no mask .*remove all"),
    "no mask and no box": (
        lambda c: [a.pop(k) for a in c["annotations"] for k in ("segmentation", "bbox")],
        "'bbox' must be",
    ),
    "heaps alone": (
        lambda c: [a.update(iscrowd=1) for a in c["annotations"]],
        "no annotation of a single object",
    ),
    "line": (put("segmentation", [[1, 1, 5, 5]]), "it has no mask"),
    "odd polygon": (put("segmentation", [[1, 1, 5, 5, 2, 8, 9]]), "'segmentation' must be"),
    "giant polygon": (put("segmentation", [[1, 1, 1e30, 5, 2, 8]]), "'segmentation' must be"),
    "endless outline": (
        put("segmentation", [[0, 0, *[1e5, 1e5, 0, 0] * 6]]),
        "the outline of its mask is over 1e\\+06 pixels long",
    ),
    "mask of another size": (
        put("segmentation", {"size": [7, 9], "counts": [63]}),
        r"its mask is of size \[7, 9\], its image of",
    ),
    "short run lengths": (
        put("segmentation", {"size": [64, 64], "counts": [5, 5]}),
        "the run lengths of its mask do not fill 64 x 64",
    ),
    "mad run lengths": (
        put("segmentation", {"size": [64, 64], "counts": "~~~~~~"}),
        "the run lengths of its mask do not fill",
    ),
    "negative run lengths": (
        put("segmentation", {"size": [64, 64], "counts": [-1, 64 * 64 + 1]}),
        "the run lengths of its mask do not fill",
    ),
    "list for record": (lambda c: c["annotations"].insert(0, [1]), "'image_id' must be an integer"),
    "no images": (lambda c: c["images"].clear(), "the list 'images' is empty"),
    "no classes": (lambda c: c["categories"].clear(), "the list 'categories' is empty"),
    "no annotations": (lambda c: c.pop("annotations"), "has no list 'annotations'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_annotations_are_one_line(copied: Path, name: str) -> None:
    how, text = WRONG[name]
    change(copied, how)
    with pytest.raises(InputError) as caught:
        open_coco(copied, "train")
    assert re.search(text, str(caught.value))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "[" * 100_000, '{"images": 3}', "\udcff"])
def test_no_json(copied: Path, content: str) -> None:
    file = copied / "annotations" / "instances_train2017.json"
    file.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=r"is no JSON|has no list"):
        open_coco(copied, "train")


def test_more_masks_than_fit_into_the_memory(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = open_coco(copied, "train")
    most = max(int(n) * h * w for n, (h, w) in zip(split.counts, split.sizes, strict=True))
    monkeypatch.setattr("cmt_mae.data.coco.LARGEST_MASKS", most)
    open_coco(copied, "train")
    monkeypatch.setattr("cmt_mae.data.coco.LARGEST_MASKS", most - 1)
    with pytest.raises(InputError, match=r"objects of \d+ x \d+ pixels; their masks would"):
        open_coco(copied, "train")


def test_pipes_are_not_waited_for(copied: Path) -> None:
    file = copied / "annotations" / "instances_train2017.json"
    image = copied / "train2017" / open_coco(copied, "train").names[0]
    image.unlink()
    os.mkfifo(image)
    with pytest.raises(InputError, match=r"is no image \(not a regular file\)"):
        open_coco(copied, "train")
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(InputError, match="not a regular file"):
        open_coco(copied, "train")


def test_missing_files_and_folders(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no folder"):
        open_coco(tmp_path / "nowhere", "train")
    with pytest.raises(InputError, match=r"no annotation file .*instances_test2017\.json"):
        open_coco(copied, "test")
    broken = copied / "train2017" / open_coco(copied, "train").names[0]
    broken.write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"is no image"):
        open_coco(copied, "train")
    (copied / "train2017").rename(copied / "elsewhere")
    with pytest.raises(InputError, match=r"the images of .* are missing"):
        open_coco(copied, "train")


def test_an_image_that_ends_early_is_named(copied: Path) -> None:
    split = open_coco(copied, "train")
    path = copied / "train2017" / split.names[0]
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(InputError, match=re.escape(split.names[0])):
        open_coco(copied, "train").image(0)


def test_splits_with_other_classes(copied: Path) -> None:
    change(copied, lambda c: c["categories"].append({"id": 99, "name": "new"}), "val")
    with pytest.raises(InputError, match=r"different categories \(ids \[99\]\)"):
        same_classes(open_coco(copied, "train"), open_coco(copied, "val"))


def test_area_and_crowd_are_filled_in(copied: Path) -> None:
    before = open_coco(copied, "train")

    def forget(content: dict[str, Any]) -> None:
        for number, a in enumerate(content["annotations"]):
            a.pop("area")
            a["iscrowd"] = bool(a["iscrowd"])
            if not a["iscrowd"] and number % 2:
                a.pop("iscrowd")

    change(copied, forget)
    after = open_coco(copied, "train")
    assert after.ground_truth() == before.ground_truth()


def test_boxes_come_from_masks_where_they_are_missing(shared: Path, tmp_path: Path) -> None:
    """COCO's own boxes are those of its polygons, to two decimals; those of run lengths are pycocotools'."""
    shutil.copytree(shared / "data" / "coco", tmp_path / "coco")
    before = open_coco(tmp_path / "coco", "val")
    masks: dict[int, Any] = {}

    def forget(content: dict[str, Any]) -> None:
        for number, a in enumerate(content["annotations"]):
            del a["bbox"]
            if number % 5 == 0 and isinstance(a["segmentation"], list):
                size = next(
                    (i["height"], i["width"]) for i in content["images"] if i["id"] == a["image_id"]
                )
                rle = reference_mask.merge(reference_mask.frPyObjects(a["segmentation"], *size))
                masks[a["id"]] = rle
                a["segmentation"] = {"size": [*size], "counts": rle["counts"].decode()}

    change(tmp_path / "coco", forget, "val")
    after = open_coco(tmp_path / "coco", "val").ground_truth()["annotations"]
    for old, new in zip(before.ground_truth()["annotations"], after, strict=True):
        if old["id"] in masks:
            assert new["bbox"] == reference_mask.toBbox(masks[old["id"]]).tolist()
        elif not old["iscrowd"]:
            assert new["bbox"] == pytest.approx(old["bbox"], abs=0.011)
    assert masks


def test_data_without_masks(copied: Path) -> None:
    before = open_coco(copied, "train")

    def forget(content: dict[str, Any]) -> None:
        for number, a in enumerate(content["annotations"]):
            a.pop("area")
            a["segmentation"] = []
            if number % 2:
                a.pop("segmentation")

    change(copied, forget)
    after = open_coco(copied, "train")
    assert before.has_masks
    assert not after.has_masks
    for index in range(len(before)):
        one, two = before.example(index), after.example(index)
        assert torch.equal(one.boxes, two.boxes)
        assert (two.masks >= one.masks).all()  # a filled box covers what is in it
    first = after.ground_truth()["annotations"][0]
    assert "segmentation" not in first
    assert first["area"] == pytest.approx(first["bbox"][2] * first["bbox"][3])
