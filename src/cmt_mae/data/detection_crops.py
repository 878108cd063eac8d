"""Pictures with boxes and masks, and what training does to them: resize, crop, flip (spec section 7).

Every random number comes from the generator that is handed in, so a sample follows from (seed, epoch,
index) alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]

MIN_SIDE = 1.0
"""Pixels: a box that is thinner in the picture the detector sees is no longer trained on."""


@dataclass
class Example:
    """One picture with its N objects."""

    image: Tensor
    """(C, H, W) uint8."""
    boxes: Tensor
    """(N, 4) float32: left, top, right, bottom in pixels, 0..W and 0..H."""
    labels: Tensor
    """(N,) int64, 1..K."""
    masks: Tensor
    """(N, H, W) uint8, 0 or 1."""

    @property
    def size(self) -> Size:
        """Height and width."""
        return int(self.image.shape[1]), int(self.image.shape[2])


def scaled_size(size: Size, short: float, longest: float) -> Size:
    """Height and width with the short side at ``short``, or less where the long one would pass ``longest``."""
    height, width = size
    scale = min(short / min(size), longest / max(size))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def resize_image(image: Tensor, size: Size) -> Tensor:
    """(C, h, w) uint8 -> (C, *size) uint8: bilinear, antialiased when made smaller."""
    if tuple(image.shape[1:]) == size:
        return image
    resized: Tensor = F.interpolate(
        image[None], size=size, mode="bilinear", align_corners=False, antialias=True
    )
    return resized[0]


def resize(example: Example, size: Size) -> Example:
    """All of it at another size; masks take their nearest pixel."""
    if example.size == size:
        return example
    (h, w), (new_h, new_w) = example.size, size
    factors = torch.tensor([new_w / w, new_h / h, new_w / w, new_h / h])
    masks = example.masks.new_zeros((0, *size))
    if len(example.masks):
        masks = F.interpolate(example.masks[None], size=size, mode="nearest-exact")[0]
    return replace(
        example,
        image=resize_image(example.image, size),
        # w * (new_w / w) may round to a little more than new_w
        boxes=(example.boxes * factors).minimum(torch.tensor([new_w, new_h, new_w, new_h])),
        masks=masks,
    )


def flip(example: Example) -> Example:
    """Left and right exchanged."""
    width = example.size[1]
    left, top, right, bottom = example.boxes.unbind(1)
    return replace(
        example,
        image=example.image.flip(2),
        boxes=torch.stack([width - right, top, width - left, bottom], dim=1),
        masks=example.masks.flip(2),
    )


def crop(example: Example, top: int, left: int, height: int, width: int) -> Example:
    """The part of at most height x width pixels at (top, left). Boxes are cut at its border; all stay."""
    rows, columns = slice(top, top + height), slice(left, left + width)
    image = example.image[:, rows, columns]
    h, w = image.shape[1:]
    boxes = example.boxes - torch.tensor([left, top, left, top])
    limits = torch.tensor([w, h, w, h], dtype=boxes.dtype)
    return replace(
        example,
        image=image,
        boxes=boxes.clamp(min=0).minimum(limits),
        masks=example.masks[:, rows, columns],
    )


def boxes_of(masks: Tensor) -> Tensor:
    """(N, H, W) -> (N, 4) float32: the tightest boxes; all 0 for an empty mask."""
    boxes = torch.zeros((len(masks), 4))
    for box, mask in zip(boxes, masks, strict=True):
        rows, columns = mask.bool().any(1).nonzero(), mask.bool().any(0).nonzero()
        if len(rows):
            box[:] = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])[:, 0]
    return boxes


def drop_lost(example: Example) -> Example:
    """Without the objects that a crop has cut away or a resize has made too small."""
    sides = example.boxes[:, 2:] - example.boxes[:, :2]
    keep = (sides >= MIN_SIDE).all(1) & example.masks.flatten(1).bool().any(1)
    return replace(
        example,
        image=example.image.contiguous(),
        boxes=example.boxes[keep],
        labels=example.labels[keep],
        masks=example.masks[keep].contiguous(),
    )


def multi_scale(
    example: Example,
    rng: np.random.Generator,
    short_sides: Sequence[int],
    longest: int,
    crop_shorts: Sequence[int] = (),
    crop_range: tuple[int, int] = (384, 600),
) -> Example:
    """Flip with probability 1/2; a random short side; before it, half of the time, DETR's crop.

    The crop: to a short side of ``crop_shorts``, then a piece whose height and width are uniform in
    ``crop_range`` (at most the picture), which may hold no object. Without ``crop_shorts`` there is none.
    Source: CAE's Mask R-CNN configuration (spec 7).
    """
    if rng.random() < 0.5:
        example = flip(example)
    if len(crop_shorts) and rng.random() < 0.5:
        example = resize(example, scaled_size(example.size, rng.choice(crop_shorts), longest))
        low, high = crop_range
        h, w = (int(rng.integers(min(s, low), min(s, high) + 1)) for s in example.size)
        top = int(rng.integers(example.size[0] - h + 1))
        left = int(rng.integers(example.size[1] - w + 1))
        example = crop(example, top, left, h, w)
    example = resize(example, scaled_size(example.size, rng.choice(short_sides), longest))
    return drop_lost(example)


def large_scale_jitter(
    example: Example,
    rng: np.random.Generator,
    size: int,
    scale: tuple[float, float] = (0.1, 2.0),
    measure_masks: bool = True,
) -> Example:
    """Flip with probability 1/2, a scale uniform in ``scale`` times ``size``, a crop of at most size x size.

    Boxes are measured anew on the cropped masks, unless ``measure_masks`` is False (data without any).
    Source: detectron2's LSJ loader for ViTDet (spec 7);
    what is smaller than size x size is padded later, with zeros after normalisation.
    """
    if rng.random() < 0.5:
        example = flip(example)
    target = size * (scale[0] + (scale[1] - scale[0]) * rng.random())
    example = resize(example, scaled_size(example.size, target, target))
    place = rng.random()  # one number for both sides, as there
    top, left = (int(place * max(0, side - size)) for side in example.size)
    example = crop(example, top, left, size, size)
    if measure_masks:
        example = replace(example, boxes=boxes_of(example.masks))
    return drop_lost(example)
