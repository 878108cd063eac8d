"""J and F of DAVIS: overlap of regions and of outlines (spec 9.3; checked against 12.6)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cmt_mae.core.errors import InputError

Ids = NDArray[np.uint8]
Maps = NDArray[np.bool_]
Scores = NDArray[np.float64]

BOUND = 0.008
"""How far outlines may lie apart, as a share of the frame's diagonal."""


def jaccard(predicted: Maps, truth: Maps, void: Maps | None = None) -> Scores:
    """J: intersection over union of each of N pairs of masks; 1 where both are empty.

    Args:
        predicted, truth: bool (N, H, W).
        void: bool (N, H, W) or (H, W): pixels that do not count.

    Returns:
        (N,) in 0..1.
    """
    if void is not None:
        predicted, truth = predicted & ~void, truth & ~void
    both = np.count_nonzero(predicted & truth, axis=(1, 2))
    either = np.count_nonzero(predicted | truth, axis=(1, 2))
    return np.where(either == 0, 1.0, both / np.maximum(either, 1))


def boundary_measure(
    predicted: Maps, truth: Maps, void: Maps | None = None, bound: float = BOUND
) -> Scores:
    """F: harmonic mean of precision and recall of the outlines' pixels of N pairs of masks.

    An outline pixel counts as found if the other outline has one within ceil(bound * diagonal)
    pixels (a disc). 1 where neither mask has an outline, 0 where one has none.

    Args, returns: as ``jaccard``.
    """
    if void is not None:
        predicted, truth = predicted & ~void, truth & ~void
    radius = math.ceil(bound * math.hypot(*truth.shape[1:]))
    lines = np.stack([outlines(predicted), outlines(truth)], axis=1)
    return np.array([_outline_f(pair, radius) for pair in lines])


def _outline_f(pair: Maps, radius: int) -> float:
    """F of two outlines (2, H, W): the predicted and the true one."""
    counts = np.count_nonzero(pair, axis=(1, 2))
    if not counts.all():
        return float(counts.any() == 0)
    rows, columns = np.flatnonzero(pair.any((0, 2))), np.flatnonzero(pair.any((0, 1)))
    pair = pair[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]  # nothing lies outside
    matched = np.count_nonzero(pair & dilate(pair[::-1], radius), axis=(1, 2))
    precision, recall = matched / counts
    total = precision + recall
    return float(2 * precision * recall / total) if total else 0.0


def outlines(masks: Maps) -> Maps:
    """One-pixel outlines of N masks (N, H, W): pixels unlike their right, lower or lower right neighbour.

    In the last row only the right neighbour counts, in the last column only the lower one; the
    corner has none (seg2bmap of davis2017-evaluation).
    """
    edges = np.zeros_like(masks)
    edges[:, :, :-1] |= masks[:, :, :-1] ^ masks[:, :, 1:]
    edges[:, :-1] |= masks[:, :-1] ^ masks[:, 1:]
    edges[:, :-1, :-1] |= masks[:, :-1, :-1] ^ masks[:, 1:, 1:]
    return edges


def dilate(maps: Maps, radius: int) -> Maps:
    """N maps (N, H, W), every true pixel grown to a disc of dx^2 + dy^2 <= radius^2.

    The disc is taken line by line: widened to each half width in turn, shifted up and down.
    """
    height, width = maps.shape[1:]
    grown = np.zeros_like(maps)
    wide, half = maps.copy(), 0
    for dy in range(min(radius, height - 1), -1, -1):
        wanted = math.isqrt(radius * radius - dy * dy)
        for dx in range(half + 1, min(wanted, width - 1) + 1):
            wide[:, :, dx:] |= maps[:, :, :-dx]
            wide[:, :, :-dx] |= maps[:, :, dx:]
        half = max(half, wanted)
        grown[:, dy:] |= wide[:, : height - dy]
        grown[:, : height - dy] |= wide[:, dy:]
    return grown


def score_frame(predicted: Ids, truth: Ids, objects: Sequence[int]) -> tuple[Scores, Scores]:
    """J and F of each object in one frame, both (O,).

    Args:
        predicted, truth: uint8 (H, W) of object ids, void already background.
        objects: ids to score; an object that is nowhere predicted has an empty mask.

    Raises:
        InputError: sizes differ, or an id is predicted that is none of the objects.
    """
    if predicted.shape != truth.shape:
        raise InputError(
            f"a predicted mask has {predicted.shape[1]} x {predicted.shape[0]} pixels, the true one "
            f"{truth.shape[1]} x {truth.shape[0]}; masks must have the frames' size"
        )
    extra = sorted(set(np.unique(predicted).tolist()) - {0, *objects})
    if extra:
        raise InputError(
            f"the predicted mask holds object {extra[0]}, but the sequence has only {list(objects)}"
        )
    ids = np.array(objects, dtype=np.uint8)[:, None, None]
    masks, true = predicted == ids, truth == ids
    return jaccard(masks, true), boundary_measure(masks, true)


def statistics(values: Sequence[float] | Scores) -> tuple[float, float, float]:
    """Mean, recall (share of frames above .5) and decay (first quarter less last) of one object's frames.

    The quarters are davis2017-evaluation's: they share their border frames (spec 12.6).

    Args:
        values: one number in 0..1 a frame, at least one.
    """
    scores = np.asarray(values, dtype=np.float64)
    ends = np.round(np.linspace(1, len(scores), 5) + 1e-10).astype(int) - 1
    first, last = scores[ends[0] : ends[1] + 1], scores[ends[3] : ends[4] + 1]
    return float(scores.mean()), float((scores > 0.5).mean()), float(first.mean() - last.mean())
