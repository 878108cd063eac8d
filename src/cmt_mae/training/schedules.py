"""Schedules as pure functions of the position in training (spec section 5)."""

import math

from cmt_mae.errors import InputError


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
