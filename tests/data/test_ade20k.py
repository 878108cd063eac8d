"""ADE20K's layout: class lists, masks of every kind, wrong pairs, each told in one line; and the crops."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cmt_mae.core.errors import InputError
from cmt_mae.data.ade20k import (
    IGNORED,
    ZeroLabel,
    check_labels,
    check_pair,
    check_pairs,
    open_ade20k,
    read_classes,
    read_image,
    read_mask,
)
from cmt_mae.data.source import BadImage

REAL_HEAD = "Idx \tRatio \tTrain \tVal \tStuff\tName\n"


def layout(root: Path, images: int = 2, classes: str | None = "Name\na\nb\n") -> Path:
    """A data set of 8 x 6 pixels, label 1 at the left and 2 at the right."""
    mask = np.ones((6, 8), dtype=np.uint8)
    mask[:, 4:] = 2
    for split in ("training", "validation"):
        for part in ("images", "annotations"):
            (root / part / split).mkdir(parents=True)
        for i in range(images):
            Image.new("RGB", (8, 6), (i, 50, 90)).save(root / "images" / split / f"{i}.jpg")
            Image.fromarray(mask).save(root / "annotations" / split / f"{i}.png")
    if classes is not None:
        (root / "objectInfo.txt").write_text(classes)
    return root


def write_mask(path: Path, labels: Any, dtype: Any = np.uint8) -> str:
    Image.fromarray(np.array(labels, dtype=dtype)).save(path)
    return str(path)


# --- class lists --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("Name\nsky\nroad\n", ["sky", "road"]),
        (REAL_HEAD + "1\t0.16\t11664\t1172\t1\twall\n2\t0.1\t1\t1\t1\tbuilding, edifice\n",
         ["wall", "building, edifice"]),
        (REAL_HEAD + "2\t0.1\t1\t1\t1\tsky\n1\t0.2\t1\t1\t1\twall\n", ["wall", "sky"]),
        ("Idx,Ratio,Train,Val,Stuff,Name\n1,.1,1,1,1,wall\n2,.1,1,1,0,\"door, double door\"\n",
         ["wall", "door, double door"]),
        ("\ufeffName\r\nsky\r\n\r\nroad\r\n", ["sky", "road"]),
        ("sky\nroad\ntree\n", ["sky", "road", "tree"]),
    ],
)  # fmt: skip
def test_class_lists(tmp_path: Path, text: str, names: list[str]) -> None:
    (tmp_path / "objectInfo150.txt").write_text(text, encoding="utf-8")
    assert read_classes(tmp_path, None) == names


def test_classes_that_are_given(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x\ny\n")
    assert read_classes(tmp_path, str(tmp_path / "mine.txt")) == ["x", "y"]
    assert read_classes(tmp_path, "a, b,c") == ["a", "b", "c"]
    assert read_classes(tmp_path, "3") == ["class 1", "class 2", "class 3"]


@pytest.mark.parametrize(
    ("text", "given", "wanted"),
    [
        (None, None, "no class list"),
        (None, "nowhere.txt", "is no file"),
        (None, "1", "1 class"),
        (None, "99999", "give 2 to"),
        ("Name\nsky\n", None, "1 class"),
        ("", None, "0 class"),
        ("Idx\tName\n1\tsky\n3\troad\n", None, "Idx is not 1, 2"),
        ("Idx\tName\n1\tsky\n2\n", None, "has no name"),
    ],
)
def test_class_lists_that_are_wrong(
    tmp_path: Path, text: str | None, given: str | None, wanted: str
) -> None:
    if text is not None:
        (tmp_path / "objectInfo.txt").write_text(text)
    with pytest.raises(InputError, match=wanted) as caught:
        read_classes(tmp_path, given)
    assert "\n" not in str(caught.value)


# --- masks --------------------------------------------------------------------------------------


def test_labels_become_classes_and_0_and_255_are_ignored(tmp_path: Path) -> None:
    path = write_mask(tmp_path / "m.png", [[0, 1, 2], [255, 3, 1]])
    mask = read_mask(path, 3)
    assert mask.dtype == np.int16
    assert mask.tolist() == [[IGNORED, 0, 1], [IGNORED, 2, 0]]
    assert read_mask(path, 4, "class").tolist() == [[0, 1, 2], [IGNORED, 3, 1]]


def test_palette_grey_rgb_alpha_and_one_bit_masks_are_the_same(tmp_path: Path) -> None:
    labels = np.array([[0, 1, 1], [1, 0, 1]], dtype=np.uint8)
    grey = Image.fromarray(labels)
    palette = Image.fromarray(labels, "P")
    palette.putpalette([9, 9, 9, 200, 30, 30])
    kinds = {"L": grey, "P": palette, "RGB": grey.convert("RGB"), "RGBA": grey.convert("RGBA")}
    kinds |= {"LA": grey.convert("LA"), "1": Image.fromarray(labels.astype(bool))}
    for name, picture in kinds.items():
        path = tmp_path / f"{name}.png"
        picture.save(path)
        with Image.open(path) as again:
            assert again.mode == name
        assert read_mask(str(path), 2).tolist() == (labels.astype(int) - 1).tolist(), name


def test_16_bit_masks_and_more_than_255_classes(tmp_path: Path) -> None:
    path = write_mask(tmp_path / "m.png", [[0, 255, 300], [65535, 1, 256]], np.uint16)
    assert read_mask(path, 300).tolist() == [[-1, 254, 299], [-1, 0, 255]]
    small = write_mask(tmp_path / "s.png", [[255, 65535, 7]], np.uint16)
    assert read_mask(small, 7).tolist() == [[-1, -1, 6]]


def test_colours_and_labels_out_of_range_are_refused(tmp_path: Path) -> None:
    colours = write_mask(tmp_path / "c.png", [[[200, 30, 30], [0, 0, 0]]])
    with pytest.raises(InputError, match=r"c\.png: holds colours, not labels"):
        read_mask(colours, 5)
    path = write_mask(tmp_path / "m.png", [[1, 6]])
    with pytest.raises(InputError, match="label 6 is out of range, the list has 5 classes"):
        read_mask(path, 5)
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(BadImage, match="no mask that can be read"):
        read_mask(str(tmp_path / "b.png"), 5)


# --- pairs --------------------------------------------------------------------------------------


def test_the_fingerprint_follows_the_data_and_not_the_place(tmp_path: Path) -> None:
    one, two = (open_ade20k(layout(tmp_path / name)).fingerprint for name in "ab")
    assert one == two
    assert open_ade20k(tmp_path / "a", "a,c").fingerprint != one
    (tmp_path / "a" / "annotations" / "training" / "0.png").write_bytes(b"x")
    assert open_ade20k(tmp_path / "a").fingerprint != one


def test_grey_images_become_rgb_and_colour_becomes_grey(tmp_path: Path) -> None:
    Image.fromarray(np.array([[10, 200]], dtype=np.uint8)).save(tmp_path / "g.png")
    assert read_image(str(tmp_path / "g.png"), 3).tolist() == [[[10] * 3, [200] * 3]]
    assert read_image(str(tmp_path / "g.png"), 1).shape == (1, 2, 1)


def spoil(root: Path, what: str) -> None:
    """One fault in the training split."""
    images, masks = root / "images" / "training", root / "annotations" / "training"
    if what == "no mask":
        (masks / "1.png").unlink()
    elif what == "two images":
        Image.new("RGB", (8, 6)).save(images / "1.png")
    elif what == "no annotations":
        for path in (root / "annotations" / "validation").iterdir():
            path.unlink()
        (root / "annotations" / "validation").rmdir()
    elif what == "no images":
        for path in images.iterdir():
            path.unlink()
    elif what == "size":
        write_mask(masks / "1.png", np.ones((8, 6)))
    elif what == "label":
        write_mask(masks / "1.png", np.full((6, 8), 3))
    elif what == "broken image":
        (images / "1.jpg").write_bytes(b"no picture")
    elif what == "empty mask":
        (masks / "1.png").write_bytes(b"")


@pytest.mark.parametrize(
    ("what", "wanted"),
    [
        ("no mask", r"1\.jpg: its mask .*1\.png is missing"),
        ("two images", "another image has the same mask"),
        ("no annotations", r"validation: no such folder; ADE20K's layout"),
        ("no images", "no image in it"),
        ("size", r"the mask has 6 x 8 pixels, its image .*1\.jpg 8 x 6"),
        ("label", "label 3 is out of range"),
        ("broken image", r"1\.jpg: no image that can be read"),
        ("empty mask", r"1\.png: no mask that can be read"),
    ],
)
def test_a_fault_is_one_line(tmp_path: Path, what: str, wanted: str) -> None:
    root = layout(tmp_path / "d")
    spoil(root, what)

    def everything() -> None:
        data = open_ade20k(root)
        check_pairs(data, data.train, range(len(data.train)))

    with pytest.raises(InputError, match=wanted) as caught:
        everything()
    assert "\n" not in str(caught.value)


def test_links_to_nothing_pipes_and_long_words(tmp_path: Path) -> None:
    root = layout(tmp_path)
    image = root / "images" / "training" / "0.jpg"
    image.unlink()
    image.symlink_to("nowhere.jpg")
    with pytest.raises(InputError, match=r"0\.jpg: No such file"):
        open_ade20k(root)
    image.unlink()
    os.mkfifo(image)
    data = open_ade20k(root)
    with pytest.raises(InputError, match=r"0\.jpg: .*not a regular file"):
        check_pairs(data, data.train, range(2))
    for words in ("9" * 5000, "x" * 5000):
        with pytest.raises(InputError, match="is no file"):
            read_classes(root, words)


def test_a_turned_photo_has_the_size_of_its_upright_picture(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 8)).save(tmp_path / "i.jpg", exif=exif)
    mask = write_mask(tmp_path / "m.png", np.ones((6, 8)))
    assert read_image(str(tmp_path / "i.jpg"), 3).shape == (6, 8, 3)
    assert check_pair(str(tmp_path / "i.jpg"), mask, 2, None)[1:].tolist() == [0, 48, 0]


def regions(root: Path, label_of: list[int], classes: str) -> Path:
    """Two pictures a split of three regions, 12, 24 and 12 pixels, labelled as told."""
    labels = np.array(label_of, dtype=np.uint8)[np.repeat([[0, 0, 1, 1, 1, 1, 2, 2]], 6, 0)]
    layout(root, classes=classes)
    for path in root.glob("annotations/*/*.png"):
        Image.fromarray(labels).save(path)
    return root


def checked(root: Path, zero_label: ZeroLabel | None) -> list[list[int]]:
    data = open_ade20k(root, zero_label=zero_label)
    counts = [check_pairs(data, pairs, range(2)) for pairs in (data.train, data.val)]
    check_labels(data, *counts)
    return [count.tolist() for count in counts]


THREE = "Name\nwall\nfloor\nbox\n"


@pytest.mark.parametrize(
    ("label_of", "classes", "zero_label", "wanted"),
    [
        # labels 0, 1, 2 read as 1, 2, 3 would score the floor as wall
        ([0, 1, 2], THREE, None, r"25% .* none has the last label 3 \(box\).*--zero_label class if 0 is wall"),
        ([0, 1, 2], THREE, "class", [24, 0, 24, 48, 24]),
        ([0, 1, 2], THREE, "ignored", [24, 24, 48, 24, 0]),  # asserted: no box in these pictures
        ([1, 2, 3], THREE, None, [0, 0, 24, 48, 24]),
        ([0, 3, 1], THREE, None, [24, 24, 24, 0, 48]),
        ([1, 2, 2], THREE, None, [0, 0, 24, 72, 0]),  # nothing is 0
        ([1, 2, 3], THREE, "class", "label 3 is out of range, .* or --zero_label ignored"),
        ([0, 1, 1], "Name\nwall\nfloor\n", None, "--zero_label class if 0 is wall"),
        ([0, 1, 1], "Name\nwall\nfloor\n", "ignored", "all labelled pixels .* are wall"),
        ([0, 255, 255], "Name\nground\nroad\n", None, "no labelled pixel in the training masks"),
        ([0, 255, 255], "Name\nground\nroad\n", "class", "are ground.*255 is always unlabelled"),
    ],
)
def test_labels_that_cannot_mean_what_the_setting_says(
    tmp_path: Path,
    label_of: list[int],
    classes: str,
    zero_label: ZeroLabel | None,
    wanted: str | list[int],
) -> None:
    root = regions(tmp_path, label_of, classes)
    if isinstance(wanted, list):
        assert checked(root, zero_label) == [wanted, wanted]
        return
    with pytest.raises(InputError, match=wanted) as caught:
        checked(root, zero_label)
    assert "\n" not in str(caught.value)


def test_unlabelled_pixels_of_real_data_are_no_class(shared: Path) -> None:
    data = open_ade20k(shared / "data" / "camvid")
    train = check_pairs(data, data.train, range(0, len(data.train), 10))
    assert train[0] > 0
    assert (train[2:] > 0).all()
    check_labels(data, train, train)
