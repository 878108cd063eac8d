"""The segmentation protocols' augmentation (spec 8), all randomness from the sample's own stream.

Resize by a random ratio, crop that no class fills, flip, photometric distortion, padding: what mmseg's
pipelines Resize, RandomCrop, RandomFlip, PhotoMetricDistortion and Pad do, in this order.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cmt_mae.data.ade20k import IGNORED

CROP_TRIES = 10
BRIGHTNESS, CONTRAST, SATURATION, HUE = 32, (0.5, 1.5), (0.5, 1.5), 18


def resized_size(height: int, width: int, scale: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of an image that is made as large as fits into ``scale`` = (longer, shorter side)."""
    longer, shorter = scale
    factor = min(longer / max(height, width), shorter / min(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W, C) uint8 -> (*size, C) uint8: bilinear without antialiasing, pixel centres aligned (as OpenCV)."""
    if image.shape[:2] == size:
        return image
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    resized = F.interpolate(tensor, size=size, mode="bilinear", align_corners=False)
    return resized[0].permute(1, 2, 0).numpy()


def resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W) -> size: row i is row floor(i * H / size) of the original (OpenCV's nearest)."""
    rows, columns = (np.arange(n) * old // n for n, old in zip(size, mask.shape, strict=True))
    return mask[rows[:, None], columns[None, :]]


def crop_corner(
    mask: np.ndarray, crop: int, rng: np.random.Generator, most: float
) -> tuple[int, int]:
    """(top, left) of a crop of at most crop x crop pixels, uniform among the places.

    Up to 10 times another place is drawn where fewer than two classes show, or one of them has at least
    ``most`` of the labelled pixels; the last one drawn is taken unseen. most >= 1: the first place.
    """
    height, width = mask.shape
    for attempt in range(CROP_TRIES + 1):
        top = int(rng.integers(max(height - crop, 0) + 1))
        left = int(rng.integers(max(width - crop, 0) + 1))
        if most >= 1 or attempt == CROP_TRIES:
            break
        part = mask[top : top + crop, left : left + crop]
        counts = np.bincount(part.ravel().astype(np.int64) - IGNORED)[
            1:
        ]  # IGNORED is counted first
        if (counts > 0).sum() > 1 and counts.max() < most * counts.sum():
            break
    return top, left


def distort(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Photometric distortion of (H, W, C) uint8: each step with probability 1/2.

    Brightness +- 32; contrast x .5 to 1.5 before or after the colours; saturation (of HSV) x .5 to 1.5; hue
    turned by up to 36 degrees. Colours are only changed in images of 3 channels.
    """
    bright, contrast_first, contrast, saturate, turn = rng.random(5) < 0.5
    beta = rng.uniform(-BRIGHTNESS, BRIGHTNESS)
    alpha, saturation = rng.uniform(*CONTRAST), rng.uniform(*SATURATION)
    hue = int(rng.integers(-HUE, HUE))  # of 180: OpenCV's unit
    if bright:
        image = _scaled(image, 1.0, beta)
    if contrast and contrast_first:
        image = _scaled(image, alpha, 0.0)
    if image.shape[2] == 3:
        if saturate:
            image = saturated(image, saturation)
        if turn and hue:
            image = turned(image, hue / 180)
    if contrast and not contrast_first:
        image = _scaled(image, alpha, 0.0)
    return image


def _scaled(image: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """alpha * image + beta, clipped and cut off to uint8."""
    table = np.arange(256, dtype=np.float32) * np.float32(alpha) + np.float32(beta)
    return table.clip(0, 255).astype(np.uint8)[image]


def saturated(image: np.ndarray, factor: float) -> np.ndarray:
    """(H, W, 3) uint8 with its HSV saturation times ``factor``, at most 1; hue and value stay.

    With V = max: c -> V - k (V - c), where k = factor, or V / (V - min) where the saturation would pass 1.
    """
    pixels = image.astype(np.float32)
    value = pixels.max(axis=2, keepdims=True)
    depth = value - pixels.min(axis=2, keepdims=True)
    k = np.minimum(np.float32(factor), value / np.maximum(depth, 1))
    return (value - k * (value - pixels) + np.float32(0.5)).clip(0, 255).astype(np.uint8)


def turned(image: np.ndarray, share: float) -> np.ndarray:
    """(H, W, 3) uint8 with its hue turned by ``share`` of the circle, in Pillow's HSV of 8 bits.

    (The protocol's OpenCV has 180 hues, Pillow 256; torchvision's exact turn takes ten times as long.)
    """
    hsv = np.array(Image.fromarray(np.ascontiguousarray(image)).convert("HSV"))
    hsv[:, :, 0] += np.uint8(round(share * 256) % 256)  # wraps around
    return np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))


@dataclass(frozen=True)
class SegmentationCrop:
    """Training crops of an image and its mask."""

    crop: int
    """Side in pixels."""
    scale: tuple[int, int]
    """Longer and shorter side that an image is fitted into at ratio 1."""
    ratio: tuple[float, float]
    """Smallest and largest factor of ``scale``."""
    most: float
    """Share of the labelled pixels that one class may have (cat_max_ratio)."""
    fill: tuple[int, ...]
    """Colour of the padding, 0..255 a channel."""

    def __call__(
        self, image: np.ndarray, mask: np.ndarray, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """(H, W, C) uint8, (H, W) int16 -> (C, crop, crop) uint8, (crop, crop) int16; padding is IGNORED."""
        ratio = rng.uniform(*self.ratio)
        scale = (max(1, int(self.scale[0] * ratio)), max(1, int(self.scale[1] * ratio)))
        size = resized_size(mask.shape[0], mask.shape[1], scale)
        mask = resize_mask(mask, size)
        top, left = crop_corner(mask, self.crop, rng, self.most)
        box = (slice(top, top + self.crop), slice(left, left + self.crop))
        image, mask = resize_image(image, size)[box], mask[box]
        if rng.random() < 0.5:
            image, mask = image[:, ::-1], mask[:, ::-1]
        image = distort(image, rng)
        height, width = mask.shape
        picture = np.empty((self.crop, self.crop, image.shape[2]), dtype=np.uint8)
        picture[:] = np.array(self.fill, dtype=np.uint8)
        labels = np.full((self.crop, self.crop), IGNORED, dtype=np.int16)
        picture[:height, :width], labels[:height, :width] = image, mask
        return torch.from_numpy(picture).permute(2, 0, 1), torch.from_numpy(labels)
