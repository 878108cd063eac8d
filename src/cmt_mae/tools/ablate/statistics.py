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
    "rows": "Dunnett's test against the baseline with seeds as blocks (one noise for all rows; any false mark in "
    "a column: 5 %)",
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


@dataclass
class Fit:
    """Variant plus seed, fitted by least squares: what is left is the noise."""

    differences: dict[str, float]
    """Variant -> difference to the baseline, between runs of the same seeds where both have them."""
    scale: np.ndarray
    """(variants, variants): covariance of the differences, in units of the noise's variance."""
    deviation: float
    """Standard deviation of the noise; NaN without degrees of freedom."""
    freedom: int


def fit_additive(values: Mapping[str, Mapping[int, float]], baseline: str) -> Fit | None:
    """Value = variant + seed + noise. None where a variant shares no seed with the rest, so nothing can be said.

    Runs of one seed begin with the same weights and see the same pictures in the same order; what that makes them
    share is taken out of the noise. Without gaps the differences are those of the means.
    """
    names = [name for name in values if name != baseline and values[name]]
    rows = [
        (name, seed, value) for name in (baseline, *names) for seed, value in values[name].items()
    ]
    seeds = sorted({seed for _, seed, _ in rows})
    design = np.zeros((len(rows), len(names) + len(seeds)))
    for row, (name, seed, _) in zip(design, rows, strict=True):
        if name != baseline:
            row[names.index(name)] = 1.0
        row[len(names) + seeds.index(seed)] = 1.0
    if np.linalg.matrix_rank(design) < design.shape[1]:
        return None
    observed = np.array([value for _, _, value in rows])
    inverse = np.linalg.inv(design.T @ design)
    solution = inverse @ (design.T @ observed)
    freedom = len(rows) - design.shape[1]
    squares = float(np.sum((observed - design @ solution) ** 2))
    return Fit(
        {name: float(solution[i]) for i, name in enumerate(names)},
        inverse[: len(names), : len(names)],
        math.sqrt(squares / freedom) if freedom else math.nan,
        freedom,
    )


def against_baseline(
    values: Mapping[str, Mapping[int, float]], baseline: str
) -> tuple[dict[str, Effect], Fit | None]:
    """Every other variant against one: Dunnett's test with seeds as blocks, and the fit behind it.

    values: variant -> seed -> value. The noise is taken to be the same in all variants: with three seeds a
    variant's own is not known well (a test of two rows alone would only see differences of several spreads).
    """
    groups = {name: list(seeds.values()) for name, seeds in values.items() if seeds}
    if baseline not in groups or len(groups) < 2:
        return {}, None
    centre = statistics.fmean(groups[baseline])
    fit = fit_additive(values, baseline)
    effects = {
        name: Effect(statistics.fmean(group) - centre, None, len(group))
        for name, group in groups.items()
        if name != baseline
    }
    if fit is not None:
        for name, difference in fit.differences.items():
            effects[name].difference = difference
        if fit.freedom >= LEAST_FREEDOM and fit.deviation > 1e-9:
            for name, p in dunnett(fit).items():
                effects[name].p = p
    return effects, fit


def dunnett(fit: Fit) -> dict[str, float]:
    """Dunnett's adjusted p: the chance that, were all differences 0, the largest |t| came out at least as large.

    The many-dimensional t distribution is integrated by scipy, drawing from a fixed seed.
    """
    errors = np.sqrt(np.diag(fit.scale))
    joint = stats.multivariate_t(
        shape=fit.scale / np.outer(errors, errors), df=fit.freedom, allow_singular=True
    )
    found = {}
    for (name, difference), error in zip(fit.differences.items(), errors, strict=True):
        size = abs(difference) / (error * fit.deviation)
        if len(errors) == 1:  # Student's t, without drawing
            found[name] = float(2 * stats.t.sf(size, fit.freedom))
            continue
        box = np.full(len(errors), size)
        inside = joint.cdf(box, lower_limit=-box, random_state=np.random.default_rng(0))
        found[name] = float(min(1.0, max(0.0, 1.0 - inside)))
    return found


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
