"""From scores to hidden patches (spec section 2): the paper's rule; those of the relatives are in other_masks.py.

Every rule is a pure function of attention maps and of uniform numbers that come with the sample: nothing
depends on the rank, the loader worker or the number of processes. All counts are exact.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from cmt_mae.core.errors import InputError

Rule = Literal[
    "random", "block", "square", "sampled_high", "high", "low", "hint", "sampled_visible", "mix_random"
]  # fmt: skip
RULES: tuple[str, ...] = get_args(Rule)
UNGUIDED: tuple[str, ...] = ("random", "block", "square")
GUIDED: tuple[str, ...] = tuple(rule for rule in RULES if rule not in UNGUIDED)
BLOCKS = 64  # candidate rectangles of the block-wise rule; what they leave bare is filled at random
SMALLEST = 1e-8


@dataclass
class Mask:
    """Which patches are hidden, the same count in every image."""

    ids_keep: Tensor
    """(B, K) int64, visible patches in raster order."""
    ids_mask: Tensor
    """(B, M) int64, hidden patches in raster order."""
    mask: Tensor
    """(B, K + M) bool, True = hidden."""


def count_masked(n_patches: int, ratio: float) -> int:
    """Number of hidden patches M; the visible count is n * (1 - ratio) rounded half down.

    0.75 of 196 is 147. Raises InputError unless at least one patch is hidden and one is visible.
    """
    if not 0.0 < ratio < 1.0:
        raise InputError(
            f"mask.ratio {ratio} is impossible: give a share between 0 and 1, e.g. 0.75"
        )
    # ceil(x - 1/2) is round half down; the small term keeps 196 * (1 - 0.75) = 49.000000001 at 49
    keep = int(-(-(n_patches * (1.0 - ratio) - 0.5 - 1e-6) // 1))
    if not 0 < keep < n_patches:
        raise InputError(
            f"mask.ratio {ratio} of {n_patches} patches leaves {keep} visible: choose another ratio "
            "or a larger image"
        )
    return n_patches - keep


def noise_length(rule: str, n_patches: int) -> int:
    """How many uniform numbers per sample a rule needs."""
    return 2 * n_patches + (5 * BLOCKS if rule == "block" else 0)


def sample_mask(
    rule: str,
    n_mask: int,
    noise: Tensor,
    grid: tuple[int, int],
    scores: Tensor | None = None,
    *,
    temperature: float = 1.0,
    hint_share: float = 0.1,
    guided_share: float = 1.0,
    square_side: int = 2,
) -> Mask:
    """Choose n_mask hidden patches an image.

    noise: (B, noise_length) uniform in (0, 1). scores: (B, L) attention normalised to sum 1; needed by the
    guided rules. temperature > 0: 1 = the law of the attention, larger = closer to random.
    guided_share 0..1: share of the hidden patches that follows the attention (mix_random).
    Raises InputError for unknown rules, for a guided rule without scores and for impossible numbers.
    """
    n_patches = grid[0] * grid[1]
    uniform = noise[:, :n_patches]
    for name, value, fine, wanted in (
        ("temperature", temperature, temperature > 0, "a number above 0, e.g. 1"),
        ("square_side", square_side, square_side >= 1, "1 or more patches, e.g. 2"),
        ("hint_share", hint_share, 0 <= hint_share <= 1, "a share in 0..1, e.g. 0.1"),
    ):
        if not fine:
            raise InputError(f"mask.{name} {value} is impossible: give {wanted}")
    if rule in GUIDED and scores is None:
        raise InputError(
            f"mask.rule '{rule}' follows attention: set mask.source to teacher, momentum or collab"
        )
    drawn = None if scores is None else perturbed(scores, uniform, temperature)
    if rule == "random":
        priority = uniform
    elif rule == "sampled_high":
        assert drawn is not None
        priority = drawn
    elif rule in RULES:
        from cmt_mae.method.other_masks import priority_of

        priority = priority_of(
            rule, n_mask, noise, grid, scores, drawn, hint_share=hint_share, guided_share=guided_share,
            square_side=square_side,
        )  # fmt: skip
    else:
        raise InputError(f"mask.rule '{rule}' is unknown: use {', '.join(RULES)}")
    return from_priority(priority, n_mask)


def of_other_images(values: Tensor) -> Tensor:
    """The values (B, ...) of another image in each place: neighbours in the batch are exchanged.

    In pairs, so that they stay within a process: the same for any number of processes that have an even share.
    The last of an odd batch gets those of the one before it.
    """
    places = torch.arange(len(values), device=values.device)
    other = torch.where(places % 2 == 0, places + 1, places - 1)
    return values[torch.where(other < len(values), other, places - 1).clamp_min(0)]


def from_priority(priority: Tensor, n_mask: int) -> Mask:
    """Hide the n_mask patches of highest priority (B, L); ties go to the lower index."""
    order = priority.argsort(dim=1, descending=True, stable=True)
    ids_mask = order[:, :n_mask].sort(dim=1).values
    ids_keep = order[:, n_mask:].sort(dim=1).values
    mask = torch.zeros_like(priority, dtype=torch.bool).scatter_(1, ids_mask, True)
    return Mask(ids_keep, ids_mask, mask)


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel numbers from uniform ones in (0, 1)."""
    return -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))


def perturbed(scores: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """log(A) / tau + Gumbel: its order is drawing without replacement in proportion to A ** (1 / tau).

    The same law as ``torch.multinomial`` (spec 2.3), and never fails on zeros.
    """
    return scores.float().clamp_min(SMALLEST).log() / temperature + gumbel(uniform.float())
