"""J and F of video masks against vos-benchmark (a port of the official code)."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.speed_timing import OURS, Comparison, Options, alternate
from cmt_mae.evaluate.video.metrics import score_frame

SHAPE = (480, 854)
OBJECTS = (1, 2, 3)
Ids = NDArray[np.uint8]


def compare_masks(options: Options) -> Iterator[dict[str, Any]]:
    """Three objects of irregular outline in frames of DAVIS' size, one thread each."""
    frames = masks(2 if options.quick else 10)
    found: dict[str, NDArray[np.float64]] = {}

    def ours() -> None:
        scores = [score_frame(predicted, truth, OBJECTS) for predicted, truth in frames]
        found[OURS] = np.array(scores)

    def theirs() -> None:
        from vos_benchmark.evaluator import Evaluator

        rows = []
        for predicted, truth in frames:
            evaluator = Evaluator()
            evaluator.feed_frame(predicted, truth)
            rows.append(
                [
                    [evaluator.object_iou[i][0] for i in OBJECTS],
                    [evaluator.boundary_f[i][0] for i in OBJECTS],
                ]
            )
        found["vos-benchmark"] = np.array(rows)

    comparison = Comparison(
        "masks", "masks",
        f"J and F of {len(OBJECTS)} objects in {len(frames)} frames of {SHAPE[1]} x {SHAPE[0]} pixels, masks in "
        "memory, one thread (both go through sequences in several).",
        len(frames), unit="frames", facts={},
    )  # fmt: skip
    seconds = alternate({OURS: ours, "vos-benchmark": theirs}, options.rounds, comparison.name)
    comparison.facts["largest_difference_of_J_and_F"] = float(
        np.abs(found[OURS] - found["vos-benchmark"]).max()
    )
    yield comparison.measured(seconds)


def masks(count: int) -> list[tuple[Ids, Ids]]:
    """Truth: wavy ellipses; prediction: the same, moved and rescaled by up to a tenth."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    pairs = []
    for _ in range(count):
        pair = [np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)]
        for i in OBJECTS:
            centre = rng.uniform(0.2, 0.8, 2) * SHAPE
            size, waves, phase = rng.uniform(40, 120), rng.integers(3, 12), rng.uniform(0, 6)
            for ids, change in zip(pair, (0.0, 0.1), strict=True):
                dy, dx = y - centre[0] * (1 + change * rng.random()), x - centre[1]
                angle = np.arctan2(dy, dx)
                ids[
                    np.hypot(dy, dx)
                    < size * (1 + change) * (1 + 0.2 * np.sin(waves * angle + phase))
                ] = i
        pairs.append((pair[1], pair[0]))
    return pairs
