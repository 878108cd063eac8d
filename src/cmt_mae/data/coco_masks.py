"""The masks of COCO's annotations: polygons and run lengths, checked and rasterised as COCO's tools do it."""

import math
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as coco_mask

from cmt_mae.core.errors import InputError

LARGEST_COORDINATE = 100_000.0
LONGEST_OUTLINE = 1e6
"""Pixels along the polygons of one object: rasterising takes 80 bytes and more for each."""


def mask_of(segmentation: Any, height: int, width: int) -> np.ndarray:
    """A checked polygon list or RLE -> (height, width) uint8, rasterised as COCO's tools do it."""
    array: np.ndarray = coco_mask.decode(rle_of(segmentation, height, width))
    return array


def rle_of(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """COCO's compressed RLE of a segmentation."""
    if isinstance(segmentation, list):
        parts = coco_mask.frPyObjects(segmentation, height, width)
        merged: dict[str, Any] = coco_mask.merge(parts)
        return merged
    if isinstance(segmentation["counts"], list):
        packed: dict[str, Any] = coco_mask.frPyObjects(segmentation, height, width)
        return packed
    plain: dict[str, Any] = segmentation
    return plain


def box_of(segmentation: Any, height: int, width: int) -> list[float]:
    """[x, y, width, height] around a checked segmentation: a polygon's corners, an RLE's pixels."""
    if isinstance(segmentation, list):
        corners = np.concatenate(
            [np.asarray(p, dtype=np.float64).reshape(-1, 2) for p in segmentation]
        )
        low, high = corners.min(0), corners.max(0)
        return [*low.tolist(), *(high - low).tolist()]
    found: list[float] = coco_mask.toBbox(rle_of(segmentation, height, width)).tolist()
    return found


def filled_box(box: list[float], height: int, width: int) -> np.ndarray:
    """(height, width) uint8: 1 in every pixel that the box [x, y, width, height] touches."""
    mask = np.zeros((height, width), dtype=np.uint8)
    left, top = max(0, math.floor(box[0])), max(0, math.floor(box[1]))
    mask[top : max(0, math.ceil(box[1] + box[3])), left : max(0, math.ceil(box[0] + box[2]))] = 1
    return mask


def run_lengths(text: str) -> list[int]:
    """Counts of COCO's compressed RLE: six bits a character, from the third on as differences.

    Raises ValueError for what no encoder writes.
    """
    counts: list[int] = []
    place = 0
    while place < len(text):
        value, shift, more = 0, 0, True
        while more:
            code = ord(text[place]) - 48 if place < len(text) else -1
            if not 0 <= code < 64 or shift > 60:
                raise ValueError("not COCO's run lengths")
            value |= (code & 31) << shift
            more = bool(code & 32)
            place, shift = place + 1, shift + 5
        if code & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
    return counts


def coordinates(values: Any, largest: float = LARGEST_COORDINATE) -> bool:
    """Whether it is a list of finite numbers no larger than ``largest``."""
    return isinstance(values, list) and all(
        isinstance(v, int | float)
        and not isinstance(v, bool)
        and abs(v) <= largest
        and abs(v) < 2**1000
        for v in values
    )


def checked_segmentation(raw: Any, where: str, height: int, width: int) -> Any:
    """Polygons of three corners or more, or an RLE of the image's size."""
    if isinstance(raw, dict):
        if raw.get("size") != [height, width]:
            raise InputError(
                f"{where}: its mask is of size {str(raw.get('size'))[:40]}, its image of "
                f"[{height}, {width}]; the two must be equal"
            )
        counts: Any = raw.get("counts")
        try:
            lengths: Any = run_lengths(counts) if isinstance(counts, str) else counts
            right = all(isinstance(n, int) and 0 <= n <= height * width for n in lengths)
            right = right and sum(lengths) == height * width
        except (TypeError, ValueError):
            right = False
        if not right:
            raise InputError(f"{where}: the run lengths of its mask do not fill {width} x {height}")
        return {"size": [height, width], "counts": counts}
    if not isinstance(raw, list) or not all(coordinates(p) and len(p) % 2 == 0 for p in raw):
        raise InputError(
            f"{where}: 'segmentation' must be polygons [[x, y, x, y, ...], ...] in pixels or an RLE, "
            f"not {raw!r:.60}"
        )
    if sum(map(_outline, raw)) > LONGEST_OUTLINE:
        raise InputError(
            f"{where}: the outline of its mask is over {LONGEST_OUTLINE:g} pixels long; fix it or give an RLE"
        )
    polygons = [polygon for polygon in raw if len(polygon) >= 6]
    if not polygons:
        raise InputError(
            f"{where}: it has no mask (no polygon of three corners or more), and Mask R-CNN needs one "
            "for every box: give it one or remove it"
        )
    return polygons


def _outline(polygon: list[float]) -> float:
    """Length of a polygon, the longer of the two directions for each side."""
    corners = np.asarray(polygon, dtype=np.float64).reshape(-1, 2)
    return float(np.abs(corners - np.roll(corners, 1, axis=0)).max(axis=1, initial=0).sum())
