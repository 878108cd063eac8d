"""Alarms on the numbers of a run: features or attention that no longer say anything about the images."""

from typing import Any

# Below these a healthy run has never been seen (docs/results/faults.json, part numerics, holds its least
# values); data2vec stops at 0.1 for the target and 0.01 for the prediction (fairseq data2vec2.py:669-685).
LEAST = {"spread_target": 0.02, "spread_prediction": 0.005, "spread_student": 0.02}
LEAST_RANK = 1.05
"""Effective rank of features; 1 = all on one line."""
LEAST_IMAGE_SHARE = 0.005
"""Share of the features' variance among images at the same place; 0 = every image looks the same."""
LEAST_ENTROPY = 0.05
"""Of attention, as a share of the uniform map's; 0 = one patch takes all."""


def signs(row: dict[str, Any]) -> list[str]:
    """What in a line of metrics shows collapse, each as ``name value < limit``; nothing in a healthy run."""
    found: list[str] = []
    for name, value in row.items():
        if not isinstance(value, int | float):
            continue
        limit = limit_of(name)
        if limit is not None and value < limit:
            found.append(f"{name} {value:.2g} < {limit:g}")
    return found


def limit_of(name: str) -> float | None:
    """The least healthy value of a number, or None where it has none."""
    if name.startswith("rank_target"):
        return LEAST_RANK
    if name.startswith("image_share_"):
        return LEAST_IMAGE_SHARE
    if name.startswith("entropy_"):
        return LEAST_ENTROPY
    return next((limit for start, limit in LEAST.items() if name.startswith(start)), None)


FIX = "lower optim.blr, or look at the images and the teacher"
"""What to do, in the words of the training, the report and the doctor."""
