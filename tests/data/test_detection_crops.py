"""Detection's flips, sizes and crops against torchvision; boxes stay on their masks."""

import copy
from collections.abc import Callable

import numpy as np
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as tv

from cmt_mae.data.detection_crops import (
    Example,
    boxes_of,
    crop,
    drop_lost,
    flip,
    large_scale_jitter,
    multi_scale,
    resize,
    scaled_size,
)


def with_masks(example: Example) -> None:
    """Boxes and masks belong together, whatever has been done to them."""
    count, (height, width) = len(example.boxes), example.size
    assert example.masks.shape == (count, height, width)
    assert example.labels.shape == (count,)
    assert example.masks.dtype == torch.uint8
    if count:
        assert example.boxes.min() >= 0
        assert (example.boxes <= torch.tensor([width, height, width, height])).all()


def example_of(seed: int, height: int, width: int, count: int) -> Example:
    rng = np.random.default_rng(seed)
    masks = torch.zeros((count, height, width), dtype=torch.uint8)
    for mask in masks:
        top, left = int(rng.integers(height)), int(rng.integers(width))
        mask[top : top + int(rng.integers(1, height + 1)), left : left + 9] = 1
    image = torch.from_numpy(rng.integers(0, 256, (3, height, width), dtype=np.uint8))
    labels = torch.from_numpy(rng.integers(1, 9, count))
    return Example(image, boxes_of(masks), labels, masks)


SHAPES = (st.integers(0, 2**32), st.integers(1, 60), st.integers(1, 60), st.integers(0, 4))


@settings(max_examples=40, deadline=None)
@given(*SHAPES, st.integers(1, 90), st.integers(1, 90))
def test_flip_and_resize_equal_torchvision(
    seed: int, h: int, w: int, n: int, new_h: int, new_w: int
) -> None:
    assume((new_h, new_w) != (1, 1))  # torch's own kernel can stop there with an internal assertion
    example = example_of(seed, h, w, n)
    boxes = tv_tensors.BoundingBoxes(example.boxes, format="XYXY", canvas_size=(h, w))
    flipped = flip(example)
    assert torch.equal(flipped.image, tv.horizontal_flip(example.image))
    assert torch.equal(flipped.masks, tv.horizontal_flip(tv_tensors.Mask(example.masks)))
    torch.testing.assert_close(flipped.boxes, tv.horizontal_flip(boxes).as_subclass(torch.Tensor))
    assert torch.equal(flip(flipped).image, example.image)
    resized = resize(example, (new_h, new_w))
    with_masks(resized)
    theirs = tv.resize(boxes, [new_h, new_w]).as_subclass(torch.Tensor)
    torch.testing.assert_close(resized.boxes, theirs, rtol=1e-4, atol=1e-4)
    picture = tv.resize(example.image, [new_h, new_w], antialias=True)
    assert (resized.image.int() - picture.int()).abs().max() <= 1


@settings(max_examples=40, deadline=None)
@given(*SHAPES, st.integers(0, 40), st.integers(0, 40), st.integers(1, 60), st.integers(1, 60))
def test_crop_keeps_boxes_on_their_masks(
    seed: int, h: int, w: int, n: int, top: int, left: int, height: int, width: int
) -> None:
    example = example_of(seed, h, w, n)
    top, left = min(top, h - 1), min(left, w - 1)
    cropped = crop(example, top, left, height, width)
    with_masks(cropped)
    kept = drop_lost(cropped)
    with_masks(kept)
    torch.testing.assert_close(kept.boxes, boxes_of(kept.masks))
    assert len(kept.boxes) == int(cropped.masks.flatten(1).bool().any(1).sum())


def test_sizes_of_the_protocols() -> None:
    """mmdetection's imrescale: 800 / 1333, the long side decides for narrow pictures."""
    assert scaled_size((480, 640), 800, 1333) == (800, 1067)
    assert scaled_size((640, 427), 800, 1333) == (1199, 800)
    assert scaled_size((100, 1000), 800, 1333) == (133, 1333)
    assert scaled_size((1, 3000), 800, 1333) == (1, 1333)
    assert scaled_size((480, 640), 1024, 1024) == (768, 1024)


@settings(max_examples=30, deadline=None)
@given(*SHAPES)
@example(seed=4, h=23, w=23, n=1)  # 23 * (30 / 23) is more than 30 in float32
def test_random_crops(seed: int, h: int, w: int, n: int) -> None:
    example = example_of(seed, h, w, n)
    before = copy.deepcopy(example)

    def drawn(how: Callable[[np.random.Generator], Example]) -> Example:
        one, two = how(np.random.default_rng(seed)), how(np.random.default_rng(seed))
        assert torch.equal(one.image, two.image)
        assert torch.equal(one.boxes, two.boxes)
        with_masks(one)
        assert len(one.boxes) <= n
        return one

    scaled = drawn(lambda rng: multi_scale(example, rng, (20, 30), 50, (24,), (10, 16)))
    assert min(scaled.size) in (20, 30) or max(scaled.size) == 50
    jittered = drawn(lambda rng: large_scale_jitter(example, rng, 32))
    assert max(jittered.size) <= 32
    torch.testing.assert_close(jittered.boxes, boxes_of(jittered.masks))
    assert torch.equal(example.image, before.image)
    assert torch.equal(example.boxes, before.boxes)


def test_multi_scale_uses_all_it_may() -> None:
    """Over many draws: every short side, flips, and DETR's crop in about half."""
    example = example_of(0, 64, 64, 3)
    sizes = set()
    wide = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        drawn = multi_scale(example, rng, (40, 48, 56), 90, (60,), (20, 30))
        sizes.add(min(drawn.size))
        wide += drawn.size[0] != drawn.size[1]  # the scene is square, a crop need not be
    assert {40, 48, 56} <= sizes
    assert 60 < wide < 120
