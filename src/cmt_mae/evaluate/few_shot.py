"""Small seeded parts of a labelled training set: what users with few labels train on."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from cmt_mae.core.errors import InputError


def few_shot_indexes(labels: Sequence[int], few_shot: str, seed: int) -> list[int]:
    """Numbers of the chosen images, ascending.

    few_shot: ``"10%"`` takes a tenth of every class (rounded, at least one image), ``"5"`` five images of every
    class (all where there are fewer). Each class is shuffled by (seed, class) alone and its first images are
    taken, so for one seed a smaller part lies inside a larger one.

    Raises:
        InputError: text of another form, or a share not above 0 and up to 100 %.
    """
    share, count = _parse(few_shot)
    members: dict[int, list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        members[label].append(index)
    chosen: list[int] = []
    for label, indexes in members.items():
        take = count or max(1, round(share * len(indexes)))
        key = np.array([seed, label], dtype=np.uint64)
        # third counter word 2: a stream apart from those of samples and of the order of epochs
        bits = np.random.Philox(key=key, counter=np.array([0, 0, 2, 0], dtype=np.uint64))
        order = np.random.Generator(bits).permutation(len(indexes))
        chosen += [indexes[i] for i in order[:take].tolist()]
    return sorted(chosen)


def _parse(few_shot: str) -> tuple[float, int]:
    """(share of each class, 0) or (0, images of each class)."""
    text = few_shot.strip()
    percent = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text)
    if percent and 0 < float(percent[1]) <= 100:
        return float(percent[1]) / 100, 0
    if re.fullmatch(r"0*[1-9]\d*", text):
        return 0.0, int(text)
    raise InputError(
        f"few_shot {few_shot!r} is neither a share of each class like 1% or 10% nor a number of images of each "
        "class like 5"
    )
