"""ADE20K's layout: class lists, masks of every kind, wrong pairs, each told in one line; and the crops."""

import colorsys
import os
import random
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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
from cmt_mae.data.crops import sample_rng
from cmt_mae.data.decode import BadImage
from cmt_mae.data.sample import SEMANTIC_CLASSES, write_ade20k
from cmt_mae.data.segmentation_crops import (
    SegmentationCrop,
    crop_corner,
    distort,
    resize_image,
    resize_mask,
    resized_size,
    saturated,
    turned,
)

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


def test_the_list_of_generated_scenes_and_of_camvid(tmp_path: Path, shared: Path) -> None:
    write_ade20k(tmp_path / "s", 1, 1)
    assert read_classes(tmp_path / "s", None) == list(SEMANTIC_CLASSES)
    camvid = read_classes(shared / "data" / "camvid", None)
    assert (len(camvid), camvid[0], camvid[-1]) == (11, "sky", "bicyclist")


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


def test_a_good_data_set(tmp_path: Path) -> None:
    data = open_ade20k(layout(tmp_path / "d"))
    assert (len(data.train), len(data.val), data.classes) == (2, 2, ("a", "b"))
    assert Path(data.train.images[1]).name == "1.jpg"
    assert Path(data.train.masks[1]).name == "1.png"
    assert check_pairs(data, data.train, range(2)).tolist() == [0, 0, 48, 48]


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


def test_what_systems_leave_beside_images_is_left_out(tmp_path: Path) -> None:
    root = layout(tmp_path)
    before = open_ade20k(root)
    images = root / "images" / "training"
    (images / "._0.jpg").write_bytes(b"\x00\x05\x16\x07 Mac OS X")
    (images / ".ipynb_checkpoints").mkdir()
    Image.new("RGB", (8, 6)).save(images / ".ipynb_checkpoints" / "0-checkpoint.jpg")
    assert open_ade20k(root) == before


def test_a_missing_folder() -> None:
    with pytest.raises(InputError, match="no such folder"):
        open_ade20k("/nowhere/at/all")


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


# --- crops --------------------------------------------------------------------------------------


def test_sizes_are_those_of_the_protocol() -> None:
    """mmcv: factor = min(2048 / longer, 512 / shorter), int(side * factor + .5)."""
    assert resized_size(512, 683, (2048, 512)) == (512, 683)
    assert resized_size(768, 1024, (2048, 512)) == (512, 683)
    assert resized_size(100, 1000, (2048, 512)) == (205, 2048)
    assert resized_size(360, 480, (512, 128)) == (128, 171)
    assert resized_size(1, 5000, (100, 25)) == (1, 100)


@pytest.mark.parametrize("size", [(130, 175), (31, 40), (60, 100), (60, 83)])
def test_resizing_is_opencvs(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (60, 83, 3), dtype=np.uint8)
    wanted = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
    assert np.abs(resize_image(image, size).astype(int) - wanted).max() <= 1  # its fixed point
    mask = image[:, :, 0]
    nearest = cv2.resize(mask, size[::-1], interpolation=cv2.INTER_NEAREST)
    assert np.array_equal(resize_mask(mask, size), nearest)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40), st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_a_crop_lies_in_the_image(height: int, width: int, crop: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.integers(-1, 3, (height, width)).astype(np.int16)
    top, left = crop_corner(mask, crop, rng, 0.75)
    assert 0 <= top <= max(0, height - crop)
    assert 0 <= left <= max(0, width - crop)


def test_a_crop_that_one_class_fills_is_drawn_again() -> None:
    mask = np.zeros((8, 200), dtype=np.int16)
    mask[:, 100:] = 1  # only places around the border show two classes
    accepted, drawn_once = [], []
    for seed in range(300):
        _, left = crop_corner(mask, 40, np.random.default_rng(seed), 0.75)
        accepted.append(left)
        drawn_once.append(crop_corner(mask, 40, np.random.default_rng(seed), 1.0)[1])

    def good(places: list[int]) -> float:
        # both classes, and at most 75 %: 30 of the 40 columns
        return float(np.mean([70 < left < 90 for left in places]))

    chance = 19 / 161
    assert good(drawn_once) == pytest.approx(chance, abs=0.06)
    assert good(accepted) == pytest.approx(1 - (1 - chance) ** 11, abs=0.08)


@pytest.mark.parametrize(("first", "draws"), [(4, 1), (9, 11)])
def test_ignored_pixels_do_not_count_in_the_share(first: int, draws: int) -> None:
    """4 and 2 labelled pixels of 100: taken at once; 9 and 2: 82 %, so all the tries are used up."""
    tile = np.full((10, 10), IGNORED, dtype=np.int16)
    tile[0, :first], tile[1, :2] = 0, 1
    rng, same = np.random.default_rng(0), np.random.default_rng(0)
    crop_corner(np.tile(tile, (1, 4)), 10, rng, 0.75)  # every place shows the same
    for _ in range(draws):
        same.integers(1)
        same.integers(31)
    assert rng.bit_generator.state == same.bit_generator.state


def test_saturation_is_that_of_hsv() -> None:
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (1, 400, 3), dtype=np.uint8)
    pixels[0, 0], pixels[0, 1] = (0, 0, 0), (7, 7, 7)
    for factor in (0.5, 1.0, 1.4):
        found = saturated(pixels, factor)[0]
        for one, new in zip(pixels[0] / 255, found, strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*one)
            wanted = colorsys.hsv_to_rgb(hue, min(1.0, saturation * factor), value)
            assert np.abs(new - 255 * np.array(wanted)).max() <= 0.51


def test_hue_is_turned_as_opencv_turns_it() -> None:
    image = np.random.default_rng(2).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    for shift in (-18, 7, 17):
        moved = hsv.copy()
        moved[:, :, 0] = (moved[:, :, 0].astype(int) + shift) % 180
        wanted = cv2.cvtColor(moved, cv2.COLOR_HSV2RGB).astype(int)
        apart = np.abs(turned(image, shift / 180) - wanted)
        assert apart.mean() < 1.5  # two roundings to 8 bits; a turn moves colours by 30 and more
        assert np.abs(image - wanted).mean() > 8


class Chosen:
    """A generator that answers as it is told: which steps are taken, then what they draw."""

    def __init__(self, steps: list[float], draws: list[float], hue: int) -> None:
        self.steps, self.draws, self.hue = steps, draws, hue

    def random(self, n: int) -> np.ndarray:
        assert n == len(self.steps)
        return np.array(self.steps)

    def uniform(self, *_: float) -> float:
        return self.draws.pop(0)

    def integers(self, *_: int) -> int:
        return self.hue


def test_distortion_by_hand() -> None:
    image = np.array([[[0, 100, 200]]], dtype=np.uint8)
    never, always = 0.9, 0.1

    def with_steps(*steps: float) -> list[int]:
        rng: Any = Chosen(list(steps), [20.0, 1.5, 0.5], 0)
        return distort(image, rng).ravel().tolist()

    assert with_steps(never, never, never, never, never) == [0, 100, 200]
    assert with_steps(always, never, never, never, never) == [20, 120, 220]
    assert with_steps(never, never, always, never, never) == [0, 150, 255]  # 300 is clipped
    # contrast first: (20, 120, 220) * 1.5, clipped, then half the saturation; or the other way round
    assert with_steps(always, always, always, always, never) == [143, 218, 255]
    assert with_steps(always, never, always, always, never) == [180, 255, 255]
    grey: Any = Chosen([always] * 5, [20.0, 1.5, 0.5], 9)
    assert distort(image[:, :, :1], grey).tolist() == [[[30]]]


def crops(**changes: Any) -> SegmentationCrop:
    options: dict[str, Any] = {
        "crop": 32, "scale": (128, 32), "ratio": (0.5, 2.0), "most": 0.75, "fill": (1, 2, 3),
    }  # fmt: skip
    return SegmentationCrop(**(options | changes))


def test_a_sample_follows_from_its_own_stream_alone() -> None:
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    mask = (image[:, :, 0] // 64).astype(np.int16)

    def draw(epoch: int) -> list[Any]:
        random.seed(epoch)
        np.random.seed(epoch)
        torch.manual_seed(epoch)
        pixels, labels = crops()(image, mask, sample_rng(0, 5, 7))
        return [pixels, labels]

    for one, two in zip(draw(1), draw(2), strict=True):
        assert torch.equal(one, two)
    other, _ = crops()(image, mask, sample_rng(0, 6, 7))
    assert not torch.equal(other, draw(1)[0])


def test_image_and_mask_stay_together_and_the_rest_is_padding() -> None:
    """The mask is a function of the image: left half dark and class 0, right half bright and class 1."""
    image = np.full((40, 60, 3), 30, dtype=np.uint8)
    image[:, 30:] = 220
    mask = np.zeros((40, 60), dtype=np.int16)
    mask[:, 30:] = 1
    flipped = padded = 0
    for index in range(60):
        pixels, labels = crops(most=1.0)(image, mask, sample_rng(0, 0, index))
        assert pixels.shape == (3, 32, 32)
        assert labels.shape == (32, 32)
        outside = labels == IGNORED
        padded += bool(outside.any())
        assert (pixels[:, outside] == torch.tensor([[1], [2], [3]])).all()
        dark, bright = pixels[0][labels == 0].float(), pixels[0][labels == 1].float()
        if len(dark) and len(bright):
            assert dark.mean() < bright.mean()
            flipped += int(labels[0, 0]) == 1
    assert padded > 5
    assert 10 < flipped < 50
