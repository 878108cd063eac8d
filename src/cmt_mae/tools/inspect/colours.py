"""Features as colours: three principal axes as red, green and blue."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

EDGE = 0.01
"""Share of the tokens beyond the first and the last colour of an axis."""


@dataclass
class Basis:
    """Three axes of a feature space, and which values on them are the first and the last colour."""

    mean: Tensor
    """(D,)."""
    axes: Tensor
    """(D, 3), orthonormal; a column of zeros where the features fill fewer dimensions."""
    low: Tensor
    """(3,)."""
    high: Tensor
    """(3,)."""

    def colours(self, tokens: Tensor) -> Tensor:
        """Tokens (..., D) as colours (..., 3) in 0..1; clipped beyond the tokens that the basis comes from."""
        values = (tokens.float() - self.mean) @ self.axes
        share = (values - self.low) / (self.high - self.low).clamp_min(1e-12)
        return torch.where(self.high - self.low > 1e-12, share, 0.5).clamp(0, 1)


def fit_basis(tokens: Tensor) -> Basis:
    """The principal axes of tokens (..., D), of all images together, so that equal colours mean the same.

    An axis points where its largest entry is positive: the same features always have the same colours.
    """
    rows = tokens.float().flatten(0, -2)
    mean = rows.mean(0)
    _, _, right = torch.linalg.svd(rows - mean, full_matrices=False)
    axes = torch.zeros(rows.shape[1], 3)
    found = right[:3].T
    found = found * found.gather(0, found.abs().argmax(0, keepdim=True)).sign()
    axes[:, : found.shape[1]] = found
    values = (rows - mean) @ axes
    return Basis(mean, axes, values.quantile(EDGE, dim=0), values.quantile(1 - EDGE, dim=0))


def likeness(first: Tensor, second: Tensor) -> Tensor:
    """Cosine of the angle between tokens (..., D) and (..., D): (...), in -1..1."""
    return F.cosine_similarity(first.float(), second.float(), dim=-1)


def explained(said: Tensor, target: Tensor, mean: Tensor) -> float:
    """R2: share of the targets' variance around ``mean`` (D,) that predictions explain, of tokens (N, D).

    0 for a prediction that is the mean everywhere, 1 for the target itself, negative where it is worse.
    """
    wrong = (said.float() - target.float()).square().sum()
    return float(1 - wrong / (target.float() - mean).square().sum().clamp_min(1e-12))


def similar_to(tokens: Tensor, patch: int) -> Tensor:
    """Cosine between every patch (B, L, D) and patch number ``patch`` of the same image: (B, L)."""
    return likeness(tokens, tokens[:, patch : patch + 1])
