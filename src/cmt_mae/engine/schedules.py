"""Schedules as pure functions of the position in training (spec section 5)."""

import math
from collections.abc import Sequence

from cmt_mae.core.errors import InputError


def learning_rate(
    epoch: float, peak: float, warmup: float, total: float, lowest: float = 0.0
) -> float:
    """MAE's schedule, per iteration: linear from 0 over ``warmup`` epochs, then half a cosine to ``lowest``.

    epoch: fractional epochs done, 0..total. Golden values in spec 12.5.
    """
    if epoch < warmup:
        return peak * epoch / warmup
    share = min(1.0, (epoch - warmup) / max(1e-12, total - warmup))
    return lowest + (peak - lowest) * 0.5 * (1.0 + math.cos(math.pi * share))


def momentum(share: float, start: float, end: float, shape: str = "cosine") -> float:
    """m of the moving average at ``share`` 0..1 of stage two: start at 0, end at 1 (spec 5.2).

    shape: cosine | linear | constant (always ``start``). Raises InputError for another shape.
    """
    share = min(1.0, max(0.0, share))
    if shape == "constant":
        return start
    if shape == "linear":
        return start + (end - start) * share
    if shape == "cosine":
        return end - (end - start) * 0.5 * (1.0 + math.cos(math.pi * share))
    raise InputError(f"momentum.schedule '{shape}' is unknown: use cosine, linear or constant")


def half_lives(ms: Sequence[float]) -> float:
    """How often the moving average has lost half of what it was, over steps with these m."""
    return -sum(math.log2(max(m, 1e-6)) for m in ms)


def warmed_up(step: int, peak: float, steps: int, ratio: float) -> float:
    """Linear warm-up by steps, as the detection and segmentation protocols have it (spec 7, 8).

    From ``ratio * peak`` at step 0 to ``peak`` at step ``steps``; ``peak`` from there on.
    """
    if step >= steps:
        return peak
    return peak * (ratio + (1.0 - ratio) * step / steps)


def step_decay(step: int, peak: float, drops: Sequence[int], factor: float = 0.1) -> float:
    """``peak`` times ``factor`` for every one of ``drops`` (steps) that is reached (spec 7)."""
    return float(peak * factor ** sum(step >= drop for drop in drops))


def poly(step: int, peak: float, total: int, power: float = 1.0, lowest: float = 0.0) -> float:
    """``(peak - lowest) * (1 - step / total)^power + lowest`` (spec 8)."""
    share = max(0.0, 1.0 - step / total)
    return float((peak - lowest) * share**power + lowest)
