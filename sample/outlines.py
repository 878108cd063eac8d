"""Masks in COCO's two forms: polygons along pixel borders, and run lengths."""

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
Point = tuple[int, int]


def run_lengths(mask: Mask) -> dict[str, list[int]]:
    """COCO's uncompressed RLE: {"size": [H, W], "counts": zeros, ones, zeros, ... down columns}."""
    flat = np.concatenate([[False], mask.ravel(order="F")])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate([[0], changes, [mask.size]]))
    return {"size": [int(n) for n in mask.shape], "counts": [int(n) for n in counts]}


def polygons(mask: Mask) -> list[list[float]]:
    """COCO polygons [x, y, x, y, ...] whose union is the mask, corner by corner of its pixels.

    Their areas sum to the number of pixels. COCO's polygons have no holes, so a mask with a hole is
    cut along a column through it, and its halves are outlined.
    """
    loops = _loops(mask)
    holes = [loop for loop in loops if _area(loop) < 0]
    if not holes:
        return [[float(c) for point in loop for c in point] for loop in loops]
    columns = [x for x, _ in holes[0]]
    cut = (min(columns) + max(columns)) // 2
    right = polygons(mask[:, cut:])
    for polygon in right:
        polygon[::2] = [x + cut for x in polygon[::2]]
    return polygons(mask[:, :cut]) + right


def _area(loop: list[Point]) -> float:
    """Shoelace area, positive for an outer border."""
    x, y = np.array(loop, dtype=np.float64).T
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)


def _loops(mask: Mask) -> list[list[Point]]:
    """Closed borders of a mask as corner points, the mask on the right hand (y runs down)."""
    padded = np.pad(mask, 1)
    inside = padded[1:-1, 1:-1]
    # A unit step along the border for each pixel side without neighbour: its start and direction.
    sides = [
        (inside & ~padded[:-2, 1:-1], (0, 0), (1, 0)),
        (inside & ~padded[1:-1, 2:], (1, 0), (0, 1)),
        (inside & ~padded[2:, 1:-1], (1, 1), (-1, 0)),
        (inside & ~padded[1:-1, :-2], (0, 1), (0, -1)),
    ]
    left: dict[tuple[Point, Point], None] = {}  # a dict, for the order of insertion
    for side, (right, down), direction in sides:
        for y, x in np.argwhere(side).tolist():
            left[(x + right, y + down), direction] = None
    steps, loops = set(left), []
    while left:
        first = here, heading = next(iter(left))  # the start of an upper side: always a corner
        loop = [here]
        while True:
            del left[here, heading]
            here = (here[0] + heading[0], here[1] + heading[1])
            # Right turn first: where two pixels touch at a corner, each keeps its own border.
            turns = ((-heading[1], heading[0]), heading, (heading[1], -heading[0]))
            step = next(turn for turn in turns if (here, turn) in steps)
            if (here, step) == first:
                break
            if step != heading:
                loop.append(here)
            heading = step
        loops.append(loop)
    return loops
