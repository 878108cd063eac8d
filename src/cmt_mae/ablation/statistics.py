"""What a few seeds can tell: spreads, tests against a baseline, and the difference that would have been seen."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.05
"""Below this a difference is marked."""
POWER = 0.8
LEAST_FREEDOM = 4
"""Degrees of freedom below which the pooled spread is luck (two values may be close by chance): no test then."""
LEAST_PAIRS = 3
TESTS = {
    "rows": "Dunnett's test against the baseline (one spread for all rows; any false mark in a column: 5 %)",
    "axes": "paired t-test over all combinations of the other axes and the seed, Holm over the values of an axis",
}


@dataclass
class Effect:
    """A difference to the baseline."""

    difference: float
    """Mean minus the baseline's, in the unit of the metric."""
    p: float | None
    """Adjusted for the number of comparisons; None where too few values are there."""
    n: int
    """Values behind it."""

    @property
    def marked(self) -> bool:
        """Whether it is more than chance would explain at LEVEL."""
        return self.p is not None and self.p < LEVEL


def spread(values: Sequence[float]) -> float | None:
    """Sample standard deviation; None for fewer than two."""
    return statistics.stdev(values) if len(values) > 1 else None


def pooled_spread(groups: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Standard deviation within groups, and its degrees of freedom; (nan, 0) where no group has two values."""
    freedom = sum(len(group) - 1 for group in groups if group)
    if freedom == 0:
        return math.nan, 0
    squares = sum((v - statistics.fmean(group)) ** 2 for group in groups if group for v in group)
    return math.sqrt(squares / freedom), freedom


def against_baseline(groups: Mapping[str, Sequence[float]], baseline: str) -> dict[str, Effect]:
    """Every other group against one: Dunnett's test (the spread is taken to be the same in all groups).

    With three seeds a group's own spread is hardly known (Welch's test would then see little but
    differences of several spreads); pooled over the groups it is known better.
    """
    control = groups.get(baseline, ())
    others = {name: values for name, values in groups.items() if name != baseline and values}
    if not control or not others:
        return {}
    deviation, freedom = pooled_spread([control, *others.values()])
    centre = statistics.fmean(control)
    p: Sequence[float | None] = [None] * len(others)
    if freedom >= LEAST_FREEDOM and deviation > 0:
        p = [float(one) for one in dunnett(list(others.values()), control)]
    return {
        name: Effect(statistics.fmean(values) - centre, one, len(values))
        for (name, values), one in zip(others.items(), p, strict=True)
    }


def dunnett(samples: list[Sequence[float]], control: Sequence[float]) -> np.ndarray:
    """p of each sample; scipy integrates by drawing, from a fixed seed here."""
    outcome = stats.dunnett(
        *map(np.asarray, samples),
        control=np.asarray(control),
        random_state=np.random.default_rng(0),
    )
    return np.asarray(outcome.pvalue)


def axis_effects(
    values: Mapping[tuple[str, ...], Mapping[int, float]], place: int, levels: Sequence[str]
) -> dict[str, Effect]:
    """One axis of a grid: each level against the first, over all blocks (other axes' levels, seed) that have both.

    values: levels of a combination, one an axis -> seed -> value. place: of the axis.
    """
    blocks: dict[str, dict[tuple[object, ...], float]] = {level: {} for level in levels}
    for combination, seeds in values.items():
        for seed, value in seeds.items():
            rest = (*combination[:place], *combination[place + 1 :], seed)
            blocks[combination[place]][rest] = value
    effects: dict[str, Effect] = {}
    for level in levels[1:]:
        both = [block for block in blocks[level] if block in blocks[levels[0]]]
        if not both:
            continue
        differences = [blocks[level][block] - blocks[levels[0]][block] for block in both]
        p = None
        if len(both) >= LEAST_PAIRS and statistics.stdev(differences) > 0:
            p = float(stats.ttest_1samp(differences, 0.0).pvalue)
        effects[level] = Effect(statistics.fmean(differences), p, len(both))
    known = {level: effect.p for level, effect in effects.items() if effect.p is not None}
    for level, p in holm(known).items():
        effects[level].p = p
    return effects


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p-values."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for done, name in enumerate(sorted(p, key=lambda key: p[key])):
        largest = max(largest, min(1.0, (len(p) - done) * p[name]))
        adjusted[name] = largest
    return adjusted


def detectable(deviation: float, freedom: int, n: int, comparisons: int) -> float:
    """About the smallest true difference of two means of n that is marked with a chance of POWER.

    Bonferroni in place of Dunnett, and t in place of its noncentral form: a little too large. NaN without
    a spread.
    """
    if freedom < LEAST_FREEDOM or n < 1 or not math.isfinite(deviation):
        return math.nan
    factor = stats.t.ppf(1 - LEVEL / 2 / max(1, comparisons), freedom) + stats.t.ppf(POWER, freedom)
    return float(factor * deviation * math.sqrt(2 / n))
