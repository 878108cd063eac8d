"""Whole images and centre crops: what evaluations see of each image, exactly once."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from cmt_mae.core.errors import InputError
from cmt_mae.core.settings import TIMEOUT_S
from cmt_mae.data.crops import Box, cut
from cmt_mae.data.loader import decoded, empty_batch
from cmt_mae.data.source import BadImage, Source
from cmt_mae.data.steps import few, iterate, order


def load_image(source: Source, index: int, channels: int) -> np.ndarray:
    """Image `index` as uint8 (H, W, channels). Raises BadImage; InputError for a pack made with
    other channels."""
    return decoded(source.read(index), channels, source.limits)


def resize(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize (1, C, h, w) uint8 to (C, *size) uint8: bicubic, antialiased, rounded and clamped."""
    if image.shape[-2:] == size:
        return image[0]
    return F.interpolate(image, size=size, mode="bicubic", antialias=True)[0]


def resized_crop(image: np.ndarray, box: Box, size: tuple[int, int]) -> np.ndarray:
    """Cut `box` out of `image` (H, W, C) uint8 and resize it to (*size, C) uint8."""
    return resize(cut(image, box), size).permute(1, 2, 0).numpy()


def center_crop(
    image: np.ndarray, size: tuple[int, int], resize_ratio: float = 256 / 224
) -> np.ndarray:
    """The evaluation crop: shorter side to round(size * resize_ratio), then the centre `size`.

    `image` (H, W, C) uint8 -> (*size, C) uint8. For a rectangular size the image is scaled so that
    it just covers round(size * resize_ratio). Equals torchvision's Resize + CenterCrop.
    """
    height, width = image.shape[:2]
    th, tw = round(size[0] * resize_ratio), round(size[1] * resize_ratio)
    # A strip of 1 x 100000 would grow without bound: its far ends never reach the crop, drop them.
    if width * th > 8 * height * tw:
        keep = max(1, 8 * height * tw // th)
        image = image[:, (width - keep) // 2 : (width - keep) // 2 + keep]
    elif height * tw > 8 * width * th:
        keep = max(1, 8 * width * th // tw)
        image = image[(height - keep) // 2 : (height - keep) // 2 + keep]
    height, width = image.shape[:2]
    if th * width >= tw * height:
        new = (th, max(tw, int(th * width / height)))
    else:
        new = (max(th, int(tw * height / width)), tw)
    whole = resize(cut(image, (0, 0, height, width)), new)
    top, left = round((new[0] - size[0]) / 2.0), round((new[1] - size[1]) / 2.0)
    inner = whole[:, top : top + size[0], left : left + size[1]]
    return np.ascontiguousarray(inner.permute(1, 2, 0).numpy())


class _Centre:
    """Item = one evaluation batch, given its indexes."""

    def __init__(
        self, source: Source, size: tuple[int, int], channels: int, resize_ratio: float
    ) -> None:
        self.source, self.size = source, size
        self.channels, self.resize_ratio = channels, resize_ratio

    def names_of(self, key: np.ndarray) -> str:
        return few([self.source.name(index) for index in key[:4].tolist()])

    def __getitem__(self, indexes: np.ndarray) -> Any:
        images = empty_batch(len(indexes), self.channels, self.size)
        labels = torch.full((len(indexes),), -1, dtype=torch.int64)
        for row, index in enumerate(indexes.tolist()):
            try:
                image = load_image(self.source, index, self.channels)
            except BadImage as error:
                return InputError(
                    f"{self.source.name(index)}: {error}; evaluation counts every image, so fix "
                    "or remove it"
                )
            except InputError as error:
                return error
            images[row] = torch.from_numpy(
                center_crop(image, self.size, self.resize_ratio).transpose(2, 0, 1)
            )
            label = self.source.label(index)
            labels[row] = -1 if label is None else label
        return images, labels, torch.from_numpy(indexes)


def eval_batches(
    source: Source,
    *,
    size: tuple[int, int],
    channels: int = 3,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    resize_ratio: float = 256 / 224,
    timeout_s: float = TIMEOUT_S,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Centre crops of every image exactly once over all ranks; rank r takes r, r + world, ...

    Yields images uint8 (B, C, H, W), channels last in memory, labels int64 (B,) (-1: none) and
    indexes int64 (B,); the last batch may be smaller, a rank without images yields nothing.
    timeout_s as in pretrain_batches. Raises InputError naming the first image that cannot be read.
    """
    mine = np.arange(rank, len(source), world, dtype=np.int64)
    keys = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    items = _Centre(source, size, channels, resize_ratio)
    yield from iterate(items, lambda done: keys[done:], workers, timeout_s=timeout_s)


def readable(source: Source, channels: int, count: int, looked_at: int = 1000) -> list[int]:
    """The first `count` images of a source that can be read, out of its first `looked_at`."""
    found: list[int] = []
    for index in range(min(len(source), looked_at)):
        if len(found) == count:
            break
        try:
            load_image(source, index, channels)
        except BadImage:
            continue
        found.append(index)
    return found


def channel_stats(
    source: Source, channels: int, limit: int = 2000, seed: int = 0
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, in 0..1, over at most `limit` images drawn by seed.

    Every image weighs the same, whatever its size. Broken images are left out.
    """
    chosen = order(len(source), seed, 0)[:limit]
    first, second, count = np.zeros(channels), np.zeros(channels), 0
    for index in chosen.tolist():
        try:
            image = load_image(source, index, channels)
        except BadImage:
            continue
        pixels = image.reshape(-1, channels).astype(np.float64) / 255
        first += pixels.mean(axis=0)
        second += (pixels**2).mean(axis=0)
        count += 1
    if not count:
        raise InputError("no image can be read; check the data")
    mean = first / count
    std = np.sqrt(np.maximum(second / count - mean**2, 0))
    return tuple(mean.tolist()), tuple(std.tolist())
