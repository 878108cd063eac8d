"""Prediction of whole images by overlapping windows, as mmseg's slide mode does it (spec 8: 512 / 341)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOWS_AT_A_TIME = 8
CLASSES_AT_A_TIME = 16


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """First pixels of the windows along a side: every ``stride``, the last one moved back to the border.

    One window from 0 where the side is not longer than it.
    """
    count = max(length - window + stride - 1, 0) // stride + 1
    return [max(min(i * stride, length - window), 0) for i in range(count)]


def slide_logits(
    predict: Callable[[Tensor], Tensor], image: Tensor, classes: int, window: int, stride: int
) -> Tensor:
    """(classes, H, W) float32: at each pixel the mean over the windows that see it.

    predict: (B, C, h, w) -> logits (B, classes, h, w), at most WINDOWS_AT_A_TIME of equal size at a time.
    image: (C, H, W), normalised. window, stride: sides in pixels, stride at most the window.
    """
    height, width = image.shape[-2:]
    corners = [
        (top, left)
        for top in window_starts(height, window, stride)
        for left in window_starts(width, window, stride)
    ]
    total = torch.zeros((classes, height, width), device=image.device)
    seen = torch.zeros((1, height, width), device=image.device)
    for first in range(0, len(corners), WINDOWS_AT_A_TIME):
        some = corners[first : first + WINDOWS_AT_A_TIME]
        boxes = [(slice(t, t + window), slice(x, x + window)) for t, x in some]
        logits = predict(torch.stack([image[:, rows, columns] for rows, columns in boxes]))
        for (rows, columns), one in zip(boxes, logits.float(), strict=True):
            total[:, rows, columns] += one
            seen[:, rows, columns] += 1
    return total / seen


def resized_argmax(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """(K, h, w) -> (*size) int64: the largest class after bilinear resizing (align_corners False).

    A few classes at a time: 150 of them at 3000 x 2000 pixels would be 3.6 GB. Ties: the lower class.
    """
    best = torch.full(size, -torch.inf, device=logits.device)
    label = torch.zeros(size, dtype=torch.int64, device=logits.device)
    for first in range(0, len(logits), CLASSES_AT_A_TIME):
        part = logits[None, first : first + CLASSES_AT_A_TIME]
        if part.shape[-2:] != size:
            part = F.interpolate(part, size=size, mode="bilinear", align_corners=False)
        value, index = part[0].max(dim=0)
        label = torch.where(value > best, index + first, label)
        best = torch.maximum(value, best)
    return label
