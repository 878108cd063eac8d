"""Tests of `ablate`'s table against scipy's own functions and by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cmt_mae.ablation.statistics import (
    against_baseline,
    axis_effects,
    detectable,
    holm,
    pooled_spread,
)

GROUPS = {"base": [50.0, 51.0, 52.0], "same": [50.5, 51.5, 50.8], "far": [58.0, 57.0, 59.0]}


def test_one_group_beside_the_baseline_is_a_t_test() -> None:
    """Dunnett's test with one comparison is Student's t-test."""
    effects = against_baseline({k: GROUPS[k] for k in ("base", "far")}, "base")
    p = stats.ttest_ind(GROUPS["far"], GROUPS["base"]).pvalue
    assert effects["far"].difference == pytest.approx(7.0)
    assert effects["far"].p == pytest.approx(p, abs=2e-4)


def test_only_the_far_group_is_marked() -> None:
    """7 points at a spread of 1 are seen with three seeds, 0 are not."""
    effects = against_baseline(GROUPS, "base")
    assert effects["far"].marked
    assert not effects["same"].marked


def test_too_few_values_give_no_p() -> None:
    """One seed: differences without a test; no baseline: nothing."""
    assert against_baseline({"base": [1.0], "x": [3.0]}, "base")["x"].p is None
    assert against_baseline({"base": [], "x": [3.0]}, "base") == {}
    luck = {"base": [1.0, 1.01], "x": [3.0]}  # two values that happen to be close
    assert against_baseline(luck, "base")["x"].p is None
    assert against_baseline({"base": [1.0, 1.0], "x": [1.0, 1.0]}, "base")["x"].p is None


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
