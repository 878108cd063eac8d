"""Tests of `ablate`'s table against scipy's own functions and by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cmt_mae.tools.ablate.statistics import (
    Fit,
    against_baseline,
    axis_effects,
    detectable,
    dunnett,
    holm,
    pooled_spread,
)

GROUPS = {"base": [50.0, 51.0, 52.0], "same": [50.5, 51.5, 50.8], "far": [58.0, 57.0, 59.0]}


def seeded(groups: dict[str, list[float]]) -> dict[str, dict[int, float]]:
    """Values with the seeds 0, 1, ..."""
    return {name: dict(enumerate(values)) for name, values in groups.items()}


def test_one_variant_beside_the_baseline_is_the_paired_t_test() -> None:
    """With two rows the blocks leave scipy's paired test."""
    groups = {"base": [50.0, 52.0, 57.0, 60.0, 51.0], "far": [51.0, 53.5, 57.5, 62.0, 52.0]}
    effects, fit = against_baseline(seeded(groups), "base")
    p = stats.ttest_rel(groups["far"], groups["base"]).pvalue
    assert effects["far"].difference == pytest.approx(1.2)
    assert effects["far"].p == pytest.approx(p)
    assert fit is not None
    assert fit.freedom == 4


def test_p_is_that_of_scipys_dunnett() -> None:
    """The same integral: with the noise and the freedom of the test without blocks, p is scipy's."""
    _, fit = against_baseline(seeded(GROUPS), "base")
    assert fit is not None
    joint = Fit(fit.differences, fit.scale, pooled_spread(list(GROUPS.values()))[0], 6)
    ours = dunnett(joint)  # the noise and freedom of the test without blocks: scipy's own
    theirs = stats.dunnett(
        GROUPS["same"], GROUPS["far"], control=GROUPS["base"], random_state=np.random.default_rng(1)
    )
    assert [ours["same"], ours["far"]] == pytest.approx(list(theirs.pvalue), abs=2e-3)


def test_what_seeds_share_is_no_noise() -> None:
    """A part of 20 points that a seed brings to all rows hides nothing."""
    shared = {name: [v + 20 * i for i, v in enumerate(values)] for name, values in GROUPS.items()}
    effects, fit = against_baseline(seeded(shared), "base")
    plain, plain_fit = against_baseline(seeded(GROUPS), "base")
    assert effects["far"].marked
    assert not effects["same"].marked
    assert effects["far"].p == pytest.approx(plain["far"].p, abs=1e-6)
    assert fit is not None
    assert plain_fit is not None
    assert fit.deviation == pytest.approx(plain_fit.deviation)


def test_a_missing_run_does_not_lend_its_seed_to_a_row() -> None:
    """Seed 1 is 10 points better for everybody: a row that has seed 1 alone is not better for it."""
    values = {"base": {0: 10.0, 1: 20.0}, "lucky": {1: 20.0}, "other": {0: 10.0, 1: 20.0}}
    effects, _ = against_baseline(values, "base")
    assert effects["lucky"].difference == pytest.approx(0.0)


def test_too_few_values_give_no_p() -> None:
    """One seed: differences without a test; no baseline: nothing; no common seed: the means' difference alone."""
    assert against_baseline({"base": {0: 1.0}, "x": {0: 3.0}}, "base")[0]["x"].p is None
    assert against_baseline({"base": {}, "x": {0: 3.0}}, "base") == ({}, None)
    luck = {"base": {0: 1.0, 1: 1.01}, "x": {0: 3.0}}  # two values that happen to be close
    assert against_baseline(luck, "base")[0]["x"].p is None
    equal = {"base": [1.0] * 5, "x": [1.0] * 5}
    assert against_baseline(seeded(equal), "base")[0]["x"].p is None
    apart = {"base": {0: 1.0, 1: 2.0}, "x": {2: 3.0, 3: 4.0}}
    effects, fit = against_baseline(apart, "base")
    assert fit is None
    assert effects["x"].p is None
    assert effects["x"].difference == pytest.approx(2.0)


def test_false_marks_come_as_rarely_as_promised() -> None:
    """Rows without any difference, 400 tables: about one in twenty has a mark."""
    generator = np.random.default_rng(0)
    marked = 0
    for _ in range(400):
        noise = generator.normal(size=(3, 4)) + 3 * generator.normal(size=(1, 4))
        effects, _ = against_baseline(
            seeded({f"v{i}": list(row) for i, row in enumerate(noise)}), "v0"
        )
        marked += any(effect.marked for effect in effects.values())
    assert 8 <= marked <= 34  # 20 expected, three standard deviations each way


def test_pooled_spread_by_hand() -> None:
    """Squares 2 and 0.5 over 1 + 1 degrees of freedom."""
    deviation, freedom = pooled_spread([[1.0, 3.0], [5.0, 6.0], [9.0]])
    assert freedom == 2
    assert deviation == pytest.approx(math.sqrt(2.5 / 2))


def test_axis_effect_is_the_paired_test_over_blocks() -> None:
    """Two axes, two seeds: four pairs; a block without its partner is left out."""
    values = {
        ("high", "masked"): {0: 10.0, 1: 12.0},
        ("high", "all"): {0: 13.0, 1: 15.5, 2: 99.0},
        ("low", "masked"): {0: 20.0, 1: 21.0},
        ("low", "all"): {0: 22.0, 1: 25.0},
    }
    effect = axis_effects(values, 1, ["masked", "all"])["all"]
    differences = [3.0, 3.5, 2.0, 4.0]
    assert effect.n == 4
    assert effect.difference == pytest.approx(sum(differences) / 4)
    assert effect.p == pytest.approx(stats.ttest_1samp(differences, 0).pvalue)


def test_detectable_difference_is_found_that_often() -> None:
    """Of the differences of that size, the power says that about 80 % are marked (t-test, simulated by scipy)."""
    size = detectable(1.0, 18, 10, 1)
    power = stats.nct.sf(stats.t.ppf(0.975, 18), 18, size / math.sqrt(2 / 10))
    assert power == pytest.approx(0.8, abs=0.02)


@given(st.dictionaries(st.text(max_size=3), st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_scipys_order(p: dict[str, float]) -> None:
    """Adjusted values are at least the raw ones, at most 1 and at most Bonferroni's, in the same order."""
    adjusted = holm(p)
    for name, value in p.items():
        assert value <= adjusted[name] <= min(1.0, len(p) * value) + 1e-12
    names = sorted(p, key=lambda key: p[key])
    assert [adjusted[n] for n in names] == sorted(adjusted.values())
