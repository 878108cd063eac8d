"""Segmentation's resizing, crops and distortions against OpenCV, colorsys and hand-worked pixels."""

import colorsys
import random
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmt_mae.data.ade20k import IGNORED
from cmt_mae.data.crops import sample_rng
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
