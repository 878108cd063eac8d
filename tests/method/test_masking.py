"""Mask rules: exact counts, the laws they draw from, and what each rule must hide."""

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations, pairwise, permutations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from cmt_mae.core.errors import InputError
from cmt_mae.method.masking import (
    BLOCKS,
    GUIDED,
    RULES,
    Mask,
    count_masked,
    from_priority,
    noise_length,
    sample_mask,
)
from cmt_mae.method.other_masks import block_priority

SHARE = (0.4, 0.3, 0.2, 0.1)
DRAWS = 400_000
FULL = (14, 14)


def noise(batch: int, patches: int, rule: str = "block", seed: int = 0) -> Tensor:
    """Uniform numbers as they come with a batch: never 0, never 1."""
    drawn = torch.rand(
        batch, noise_length(rule, patches), generator=torch.Generator().manual_seed(seed)
    )
    return drawn.clamp(2**-24, 1 - 2**-24)


def attention(batch: int, patches: int, seed: int = 3) -> Tensor:
    logits = torch.randn(batch, patches, generator=torch.Generator().manual_seed(seed))
    return (2 * logits).softmax(1)


def check_counts(mask: Mask, patches: int, n_mask: int) -> None:
    """ids_keep and ids_mask part the patches, both in raster order, and agree with the mask."""
    batch = len(mask.mask)
    assert mask.ids_mask.shape == (batch, n_mask)
    assert mask.ids_keep.shape == (batch, patches - n_mask)
    assert mask.ids_mask.dtype == mask.ids_keep.dtype == torch.int64
    both = torch.cat([mask.ids_keep, mask.ids_mask], dim=1)
    assert torch.equal(both.sort(dim=1).values, torch.arange(patches).expand(batch, -1))
    for ids, hidden in ((mask.ids_keep, False), (mask.ids_mask, True)):
        assert torch.equal(ids.sort(dim=1).values, ids)
        assert (mask.mask.gather(1, ids) == hidden).all()
    assert mask.mask.dtype == torch.bool


def within(found: Tensor, wanted: Sequence[float], draws: int = DRAWS, sigmas: float = 4.5) -> None:
    """Observed shares agree with probabilities, by the standard error of each."""
    expected = torch.tensor(wanted, dtype=torch.float64)
    error = (expected * (1 - expected) / draws).sqrt()
    assert ((found.double() - expected).abs() <= sigmas * error + 1e-12).all(), (found, expected)


def plackett_luce(share: Sequence[float], count: int) -> dict[frozenset[int], float]:
    """Probability of each set of ``count`` drawn without replacement in proportion to ``share``."""
    sets = {frozenset(c): 0.0 for c in combinations(range(len(share)), count)}
    for order in permutations(range(len(share)), count):
        left, chance = sum(share), 1.0
        for item in order:
            chance *= share[item] / left
            left -= share[item]
        sets[frozenset(order)] += chance
    return sets


def share_of_sets(mask: Tensor, sets: Sequence[frozenset[int]]) -> Tensor:
    """Observed share of each hidden set."""
    code = (mask.long() * 2 ** torch.arange(mask.shape[1])).sum(1)
    counts = torch.bincount(code, minlength=2 ** mask.shape[1])
    return counts[[sum(2**i for i in s) for s in sets]] / len(mask)


def drawn(rule: str, n_mask: int, share: Sequence[float] = SHARE, **more: float) -> Mask:
    patches = len(share)
    scores = torch.tensor([share]).expand(DRAWS, -1)
    return sample_mask(rule, n_mask, noise(DRAWS, patches, rule), (1, patches), scores, **more)  # type: ignore[arg-type]


# --- counts ----------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    rule=st.sampled_from(RULES),
    rows=st.integers(1, 18),
    columns=st.integers(1, 18),
    ratio=st.floats(0.01, 0.99),
    seed=st.integers(0, 10_000),
    spiky=st.booleans(),
    side=st.integers(1, 5),
    share=st.floats(0, 1),
)
def test_counts_are_exact_on_any_grid(
    rule: str,
    rows: int,
    columns: int,
    ratio: float,
    seed: int,
    spiky: bool,
    side: int,
    share: float,
) -> None:
    patches = rows * columns
    try:
        n_mask = count_masked(patches, ratio)
    except InputError:
        assume(False)
    scores = attention(3, patches, seed)
    if spiky:  # most patches get exactly nothing
        scores = torch.where(scores >= scores.amax(1, keepdim=True), 1.0, 0.0)
    mask = sample_mask(
        rule, n_mask, noise(3, patches, rule, seed), (rows, columns), scores,
        square_side=side, guided_share=share, hint_share=share,
    )  # fmt: skip
    check_counts(mask, patches, n_mask)


def test_visible_count_is_rounded_half_down_exactly() -> None:
    """For every twentieth and every third, against exact fractions: no float traps."""
    for patches in [*range(4, 64), 144, 196, 256, 576, 784, 1024]:
        ratios = [(i / 20, Fraction(i, 20)) for i in range(1, 20)] + [(1 / 3, Fraction(1, 3))]
        for ratio, exact in ratios:
            keep = math.ceil(patches * (1 - exact) - Fraction(1, 2))
            if 0 < keep < patches:
                assert count_masked(patches, ratio) == patches - keep, (patches, ratio)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, 1.5, 0.999, 0.001, math.nan])
def test_impossible_ratios_are_refused(ratio: float) -> None:
    with pytest.raises(InputError, match=r"mask\.ratio"):
        count_masked(16, ratio)


def test_unknown_rule_and_missing_attention_are_refused() -> None:
    with pytest.raises(InputError, match=r"mask\.rule 'checkerboard' is unknown"):
        sample_mask("checkerboard", 3, noise(1, 4), (2, 2), attention(1, 4))
    for rule in GUIDED:
        with pytest.raises(InputError, match="follows attention"):
            sample_mask(rule, 3, noise(1, 4, rule), (2, 2))


@pytest.mark.parametrize(
    "number", [{"temperature": 0.0}, {"temperature": -1.0}, {"square_side": 0}, {"hint_share": 1.5}]
)
def test_impossible_numbers_are_refused(number: dict[str, float]) -> None:
    (name,) = number
    with pytest.raises(InputError, match=rf"mask\.{name} .* is impossible: give"):
        sample_mask("sampled_high", 3, noise(1, 4), (2, 2), attention(1, 4), **number)  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", RULES)
def test_a_sample_draws_its_own_mask_whatever_batch_it_is_in(rule: str) -> None:
    numbers, scores = noise(6, 20, rule), attention(6, 20)
    whole = sample_mask(rule, 13, numbers, (4, 5), scores, guided_share=0.5)
    alone = sample_mask(rule, 13, numbers[4:5], (4, 5), scores[4:5], guided_share=0.5)
    assert torch.equal(whole.mask[4:5], alone.mask)


# --- laws (spec 12.4) ------------------------------------------------------------------------------


def test_random_keeps_the_smallest_noise_as_mae() -> None:
    numbers = noise(5, 16, "random")
    mask = sample_mask("random", 12, numbers, (4, 4))
    order = numbers[:, :16].argsort(dim=1)  # MAE keeps the first of this
    assert torch.equal(mask.ids_keep, order[:, :4].sort(dim=1).values)
    assert torch.equal(mask.ids_mask, order[:, 4:].sort(dim=1).values)


@pytest.mark.parametrize(
    ("rule", "n_mask", "seen"),
    [
        ("sampled_high", 3, (0.077778, 0.129762, 0.24127, 0.55119)),
        ("sampled_visible", 3, (0.4, 0.3, 0.2, 0.1)),
        ("sampled_high", 2, (1 - 0.715873, 1 - 0.608333, 1 - 0.44127, 1 - 0.234524)),
        ("sampled_visible", 2, (0.715873, 0.608333, 0.44127, 0.234524)),
    ],
)
def test_golden_chances_of_being_seen(rule: str, n_mask: int, seen: tuple[float, ...]) -> None:
    mask = drawn(rule, n_mask)
    shown = 1 - mask.mask.double().mean(0)
    within(shown, seen)


def test_gumbel_draws_as_torch_multinomial() -> None:
    wanted = plackett_luce(SHARE, 2)
    ours = share_of_sets(drawn("sampled_high", 2).mask, list(wanted))
    within(ours, list(wanted.values()))
    first_two = torch.multinomial(
        torch.tensor([SHARE]).expand(DRAWS, -1), 2,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    theirs = share_of_sets(
        torch.zeros(DRAWS, 4, dtype=torch.bool).scatter_(1, first_two, True), list(wanted)
    )
    assert (ours - theirs).abs().max() < 0.004  # two samples: 4.5 x .0011


def test_temperature_is_the_exponent_of_attention() -> None:
    hidden = drawn("sampled_high", 1, temperature=0.5).mask.double().mean(0)
    within(hidden, [a**2 / sum(b**2 for b in SHARE) for a in SHARE])
    hidden = drawn("sampled_high", 1, temperature=2.0).mask.double().mean(0)
    within(hidden, [a**0.5 / sum(b**0.5 for b in SHARE) for a in SHARE])


@pytest.mark.parametrize("rule", ["random", "sampled_high", "sampled_visible", "mix_random"])
def test_even_attention_is_random_masking_in_law(rule: str) -> None:
    """Every set of 3 of 6 patches is as likely as any other (chi-square, 20 sets)."""
    count = 100_000
    mask = sample_mask(
        rule, 3, noise(count, 6, rule), (2, 3), torch.full((count, 6), 1 / 6), guided_share=0.7
    )
    sets = [frozenset(c) for c in combinations(range(6), 3)]
    observed = share_of_sets(mask.mask, sets) * count
    assert observed.sum() == count
    assert stats.chisquare(observed.numpy()).pvalue > 1e-3


def test_mixture_with_random_by_hand() -> None:
    """One of two hidden patches by attention, the other evenly among the rest."""
    mask = drawn("mix_random", 2, guided_share=0.5)
    wanted = {s: sum(SHARE[i] for i in s) / 3 for s in plackett_luce(SHARE, 2)}
    within(share_of_sets(mask.mask, list(wanted)), list(wanted.values()))


@pytest.mark.parametrize("guided", [0.0, 1.0])
def test_ends_of_the_ramp_are_random_and_sampled(guided: float) -> None:
    numbers, scores = noise(32, 30, "mix_random"), attention(32, 30)
    mixed = sample_mask("mix_random", 20, numbers, (5, 6), scores, guided_share=guided)
    if guided:
        other = sample_mask("sampled_high", 20, numbers, (5, 6), scores)
    else:
        other = from_priority(numbers[:, 30:60], 20)
    assert torch.equal(mixed.mask, other.mask)


def test_guided_count_of_the_ramp_is_hpms() -> None:
    """At share .5 of 147, 73 patches follow attention (HPM's integer part), not 74."""
    count = 2000
    scores = torch.full((count, 196), 1e-8)
    scores[:, :74] = 0.01  # 74 patches hold all the attention, one more than are guided
    mask = sample_mask("mix_random", 147, noise(count, 196), FULL, scores, guided_share=0.5)
    inside = mask.mask[:, :74].sum(1)
    assert inside.min() == 73
    # the last of them is among the other 74 hidden patches, drawn evenly from 123
    within((inside == 74).double().mean(0, keepdim=True), [74 / 123], draws=count)


# --- hard rules, ties and zeros ------------------------------------------------------------------


def test_high_and_low_follow_the_order_of_attention() -> None:
    scores = attention(8, 196)
    order = scores.argsort(dim=1, descending=True)
    high = sample_mask("high", 147, noise(8, 196), FULL, scores)
    assert torch.equal(high.ids_mask, order[:, :147].sort(dim=1).values)
    low = sample_mask("low", 147, noise(8, 196), FULL, scores)
    assert torch.equal(low.ids_mask, order[:, 49:].sort(dim=1).values)


@pytest.mark.parametrize("rule", ["high", "low"])
def test_ties_go_to_the_lower_index(rule: str) -> None:
    even = torch.full((2, 196), 1 / 196)
    assert torch.equal(
        sample_mask(rule, 147, noise(2, 196), FULL, even).ids_mask, torch.arange(147).expand(2, -1)
    )


@pytest.mark.parametrize("rule", GUIDED)
def test_zeros_in_attention_never_stop_a_draw(rule: str) -> None:
    """More patches are hidden than have attention, where torch.multinomial refuses."""
    scores = torch.zeros(200, 16)
    scores[:, [3, 8]] = torch.tensor([0.9, 0.1])
    for some in (scores, torch.zeros(200, 16)):
        check_counts(sample_mask(rule, 12, noise(200, 16), (4, 4), some, guided_share=0.5), 16, 12)
    hidden = sample_mask(rule, 12, noise(200, 16), (4, 4), scores, hint_share=0.0).mask[:, [3, 8]]
    if rule in ("low", "sampled_visible"):
        assert not hidden.any()
    else:
        assert hidden.all()


def test_hint_shows_14_of_the_top_19() -> None:
    """AttMask: int(.1 * .75 * 196) = 14 of int(.1 * 196) = 19 revealed; the next 14 hidden instead."""
    count = 4000
    scores = attention(count, 196)
    ranked = scores.argsort(dim=1, descending=True)
    mask = sample_mask("hint", 147, noise(count, 196), FULL, scores)
    by_rank = mask.mask.gather(1, ranked)
    assert (by_rank[:, :19].sum(1) == 5).all()
    assert by_rank[:, 19:161].all()
    assert not by_rank[:, 161:].any()
    within(by_rank[:, :19].double().mean(0), [5 / 19] * 19, draws=count)


# --- shapes without attention ------------------------------------------------------------------


def test_squares_are_hidden_whole() -> None:
    """SimMIM: 36 of 49 squares of 2 x 2 are hidden whole, one more is cut to reach 147."""
    mask = sample_mask("square", 147, noise(500, 196), FULL).mask
    cells = mask.view(500, 7, 2, 7, 2).transpose(2, 3).sum((3, 4)).flatten(1)
    assert ((cells == 4).sum(1) == 36).all()
    assert ((cells == 3).sum(1) == 1).all()
    assert ((cells == 0).sum(1) == 12).all()
    assert stats.chisquare((cells == 4).sum(0).numpy()).pvalue > 1e-3  # each square as often
    cut = (mask.view(500, 7, 2, 7, 2).transpose(2, 3).flatten(3) == 0) & (cells == 3).view(
        500, 7, 7, 1
    )
    assert stats.chisquare(cut.sum((0, 1, 2)).numpy()).pvalue > 1e-3  # cut at any corner


def test_squares_at_the_edge_of_an_odd_grid() -> None:
    mask = sample_mask("square", 9, noise(300, 25), (5, 5), square_side=3).mask.view(300, 5, 5)
    parts = [mask[:, :3, :3], mask[:, :3, 3:], mask[:, 3:, :3], mask[:, 3:, 3:]]
    shares = torch.stack([part.float().mean((1, 2)) for part in parts])
    assert (((shares > 0) & (shares < 1)).sum(0) <= 1).all()


def test_first_block_is_one_rectangle_of_beits_size() -> None:
    numbers = noise(2000, 196)
    first = block_priority(numbers[:, 392:], FULL, numbers[:, :196]) > 0
    grid = first.view(-1, 14, 14)
    height, width = grid.any(2).sum(1), grid.any(1).sum(1)
    assert torch.equal(grid.sum((1, 2)), height * width)  # solid
    rows, columns = grid.any(2).int(), grid.any(1).int()
    for line, length in ((rows, height), (columns, width)):
        begins = (line.diff(dim=1, prepend=torch.zeros(len(line), 1, dtype=torch.int)) == 1).sum(1)
        assert (begins == 1).all()
        assert (length >= 1).all()
    area = (height * width).double()
    assert area.min() >= 10  # 16, less what rounding and the border take
    assert area.max() <= 0.4 * 196 * 1.3
    aspect = height / width
    assert aspect.min() < 0.4
    assert aspect.max() > 2.5
    assert stats.ttest_1samp(aspect.log().numpy(), 0).pvalue > 1e-3  # upright as often as flat
    assert rows.sum(0).min() > 0  # every row and column is reached
    assert columns.sum(0).min() > 0


def test_later_blocks_only_add_to_earlier_ones() -> None:
    """The hidden sets of growing counts are nested, and every level is a rectangle less the former."""
    numbers = noise(50, 196)
    masks = [sample_mask("block", m, numbers, FULL).mask for m in (20, 80, 147)]
    for small, large in pairwise(masks):
        assert (large | ~small).all()
    bare = block_priority(numbers[:, 392:], FULL, numbers[:, :196]) < 1 - BLOCKS
    assert bare.float().mean() < 0.05  # 64 rectangles leave little to chance
