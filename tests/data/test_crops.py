"""Crops against torchvision and Pillow."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import chisquare, ks_2samp
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from cmt_mae.data.centre import center_crop, resize, resized_crop
from cmt_mae.data.crops import crop_box, cut, resize_into, sample_rng


def picture(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Smooth colours with some noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 6, channels), dtype=np.uint8)
    planes = [Image.fromarray(coarse[:, :, c]).resize((width, height)) for c in range(channels)]
    noise = rng.integers(-20, 20, (height, width, channels))
    return np.clip(np.stack([np.asarray(p) for p in planes], 2) + noise, 0, 255).astype(np.uint8)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal up to rounding, without a bias: torch may take rows before columns, Pillow never."""
    assert a.shape == b.shape
    gap = a.astype(int) - b.astype(int)
    return bool(np.abs(gap).max() <= 2 and np.abs(gap).mean() < 0.3 and abs(gap.mean()) < 0.03)


@pytest.mark.parametrize(("height", "width"), [(100, 150), (300, 90)])
def test_boxes_have_the_law_of_torchvision(height: int, width: int) -> None:
    scale, ratio, count = (0.2, 1.0), (3 / 4, 4 / 3), 4000
    ours = np.array(
        [crop_box(sample_rng(0, 0, i), height, width, scale, ratio) for i in range(count)]
    )
    torch.manual_seed(0)
    transform = v2.RandomResizedCrop(8, scale=scale, ratio=ratio)
    image = tvf.to_image(np.zeros((height, width), np.uint8))
    drawn = [transform.make_params([image]) for _ in range(count)]
    theirs = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in drawn])
    for get in (
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 3] / b[:, 2],
        lambda b: b[:, 0] / np.maximum(height - b[:, 2], 1),
        lambda b: b[:, 1] / np.maximum(width - b[:, 3], 1),
        lambda b: b[:, 0] + b[:, 2],
        lambda b: b[:, 1] * b[:, 3],
    ):
        assert ks_2samp(get(ours), get(theirs)).pvalue > 1e-3
    assert abs((ours == theirs[0]).all(1).mean() - (theirs == theirs[0]).all(1).mean()) < 0.03


@pytest.mark.parametrize(("height", "width"), [(4, 400), (400, 4), (1, 50), (1, 1)])
def test_fallback_is_torchvisions(height: int, width: int) -> None:
    scale = (0.99, 1.0) if height * width > 1 else (0.2, 1.0)
    image = tvf.to_image(np.zeros((height, width), np.uint8))
    p = v2.RandomResizedCrop(8, scale=scale).make_params([image])
    box = crop_box(sample_rng(1, 2, 3), height, width, scale)
    assert box == (p["top"], p["left"], p["height"], p["width"])


@given(
    st.integers(0, 2**32),
    st.integers(1, 700),
    st.integers(1, 700),
    st.floats(0.01, 1),
    st.floats(0.1, 1),
)
@settings(max_examples=100, deadline=None)
def test_boxes_lie_inside(seed: int, height: int, width: int, low: float, narrow: float) -> None:
    top, left, h, w = crop_box(sample_rng(seed, 0, 0), height, width, (low, 1), (narrow, 1))
    assert 0 <= top <= top + h <= height
    assert 0 <= left <= left + w <= width
    assert h > 0
    assert w > 0


@pytest.mark.parametrize("size", [(64, 64), (128, 128), (48, 96), (7, 5)])
def test_resized_crop_is_pillows(size: tuple[int, int]) -> None:
    image = picture(120, 160)
    for box in [(0, 0, 120, 160), (13, 27, 70, 88), (100, 150, 9, 10), (5, 5, 1, 1)]:
        expected = tvf.resized_crop(
            Image.fromarray(image), *box, list(size), interpolation=v2.InterpolationMode.BICUBIC
        )
        assert same(resized_crop(image, box, size), np.asarray(expected))


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_each_channel_is_resized_alone(channels: int) -> None:
    image = picture(50, 40, channels)
    box = (3, 4, 30, 31)
    whole = resized_crop(image, box, (16, 16))
    for c in range(channels):
        assert same(whole[:, :, c], resized_crop(image[:, :, [c]], box, (16, 16))[:, :, 0])


@pytest.mark.parametrize("shape", [(120, 160), (160, 121), (33, 33), (500, 64), (64, 501)])
@pytest.mark.parametrize(("size", "ratio"), [(64, 256 / 224), (31, 1.0), (32, 1.25)])
def test_center_crop_is_torchvisions(shape: tuple[int, int], size: int, ratio: float) -> None:
    image = picture(*shape)
    transform = v2.Compose(
        [
            v2.Resize(round(size * ratio), interpolation=v2.InterpolationMode.BICUBIC),
            v2.CenterCrop(size),
        ]
    )
    expected = np.asarray(transform(Image.fromarray(image)))
    assert same(center_crop(image, (size, size), ratio), expected)


def test_rectangular_center_crop_takes_the_middle() -> None:
    image = np.zeros((40, 120, 3), np.uint8)
    image[:, 40:80] = 200  # the middle third is just the aspect 1:1 that is cut
    assert (center_crop(image, (20, 20), 1.0)[:, 2:-2] == 200).all()
    wide = center_crop(image, (20, 60), 1.0)
    assert wide.shape == (20, 60, 3)
    assert (wide[:, 23:37] == 200).all()
    assert (wide[:, :17] == 0).all()


def test_a_long_strip_stays_small() -> None:
    for shape in [(1, 200_000, 3), (200_000, 1, 3)]:
        image = np.full(shape, 7, np.uint8)
        assert (center_crop(image, (64, 64)) == 7).all()


@given(*[st.integers(0, 2**63 - 1)] * 3)
@settings(max_examples=30, deadline=None)
def test_sample_streams_depend_on_all_three(seed: int, epoch: int, index: int) -> None:
    first = sample_rng(seed, epoch, index).random(4).tolist()
    assert sample_rng(seed, epoch, index).random(4).tolist() == first
    for other in [(seed + 1, epoch, index), (seed, epoch + 1, index), (seed, epoch, index + 1)]:
        assert sample_rng(*other).random(4).tolist() != first


def test_a_generator_used_again_begins_the_stream_anew() -> None:
    used = sample_rng(1, 2, 3)
    used.random(3, dtype=np.float32)  # leaves half a word over
    used.integers(7)
    for seed, epoch, index in [(4, 5, 6), (2**63 - 1, 2**63, 0), (0, 0, 2**40)]:
        new = sample_rng(seed, epoch, index)
        assert sample_rng(seed, epoch, index, again=used) is used
        assert np.array_equal(used.random(5, dtype=np.float32), new.random(5, dtype=np.float32))
        assert used.random(9).tolist() == new.random(9).tolist()
        assert used.integers(1000, size=5).tolist() == new.integers(1000, size=5).tolist()


@pytest.mark.parametrize("channels", [1, 3, 4, 7])
@pytest.mark.parametrize("size", [(16, 16), (7, 40), (30, 31)])
def test_resizing_into_a_batch(channels: int, size: tuple[int, int]) -> None:
    piece = cut(picture(50, 40, channels), (3, 4, 30, 31))
    for layout in (torch.channels_last, torch.contiguous_format):
        batch = torch.full((3, channels, *size), 9, dtype=torch.uint8).to(memory_format=layout)
        resize_into(piece, batch[1:2])
        assert torch.equal(batch[1], resize(piece, size))
        assert (batch[[0, 2]] == 9).all()
        assert batch.is_contiguous(memory_format=layout)


def test_neighbouring_samples_are_independent() -> None:
    draws = np.array([sample_rng(0, 0, i).random(3) for i in range(3000)])
    correlation = np.corrcoef(np.concatenate([draws[:-1], draws[1:]], axis=1).T)
    assert np.abs(correlation - np.eye(6)).max() < 5 / math.sqrt(3000)
    counts = np.histogram(draws, bins=20, range=(0, 1))[0]
    assert chisquare(counts).pvalue > 1e-3


def test_read_only_images_bring_no_warning() -> None:
    image = picture(20, 20)
    image.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resized_crop(image, (0, 0, 20, 20), (8, 8))
