"""What is predicted, and the distance to it (spec section 3; paper Eqs. 1, 2 and 4)."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from cmt_mae.core.errors import InputError

Norm = Literal["layer_norm", "l2", "none", "mae"]
Loss = Literal["mse", "l1", "smooth_l1", "cosine"]
NORMS: tuple[str, ...] = get_args(Norm)
LOSSES: tuple[str, ...] = get_args(Loss)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) -> (B, L, p * p * C) in MAE's order: row, column, channel within a patch."""
    batch, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    grid = images.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of ``patchify``: (B, L, p * p * C) -> (B, C, H, W)."""
    batch, rows, columns = patches.shape[0], grid[0], grid[1]
    blocks = patches.reshape(batch, rows, columns, patch_size, patch_size, -1)
    return blocks.permute(0, 5, 1, 3, 2, 4).reshape(
        batch, -1, rows * patch_size, columns * patch_size
    )


def normalise_target(target: Tensor, norm: str) -> Tensor:
    """Normalise targets (..., D) over channels, in fp32 (fp64 stays fp64).

    layer_norm: F.layer_norm without affine (biased variance, eps 1e-5), the default for features.
    mae: MAE's normalised pixels (unbiased variance, eps 1e-6). l2: unit length (and the prediction too, see
    ``distance``). none: as they are. Raises InputError for another name.
    """
    target = at_least_fp32(target)
    if norm == "layer_norm":
        return F.layer_norm(target, target.shape[-1:])
    if norm == "mae":
        mean = target.mean(-1, keepdim=True)
        return (target - mean) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    if norm == "l2":
        return F.normalize(target, dim=-1)
    if norm == "none":
        return target
    raise InputError(f"target.norm '{norm}' is unknown: use {', '.join(NORMS)}")


def distance(
    prediction: Tensor, target: Tensor, *, loss: str = "mse", norm: str = "layer_norm", beta: float = 2.0,
    reduce: str = "mean",
) -> Tensor:  # fmt: skip
    """L of Eqs. 1 and 2: mean over images and tokens of the distance between (B, N, D) and (B, N, D).

    The target is normalised already; the prediction stays raw, except with norm ``l2`` where both have unit
    length (then reduce ``sum`` is 2 - 2 cos). reduce: over channels, ``mean`` (default: two targets of other
    widths weigh alike) or ``sum`` (the paper's squared norm, literally). smooth_l1: beta as data2vec (2).
    cosine: 1 - cos. Returns a scalar in fp32 or more. Raises InputError for another loss or reduction.
    """
    prediction = at_least_fp32(prediction)
    if norm == "l2":
        prediction = F.normalize(prediction, dim=-1)
    if loss == "cosine":
        return (1 - F.cosine_similarity(prediction, target, dim=-1)).mean()
    if loss == "mse":
        each = (prediction - target) ** 2
    elif loss == "l1":
        each = (prediction - target).abs()
    elif loss == "smooth_l1":
        each = F.smooth_l1_loss(prediction, target, beta=beta, reduction="none")
    else:
        raise InputError(f"target.loss '{loss}' is unknown: use {', '.join(LOSSES)}")
    if reduce == "mean":
        return each.mean()
    if reduce == "sum":
        return each.sum(-1).mean()
    raise InputError(f"target.reduce '{reduce}' is unknown: use mean or sum")


class RunningMeans:
    """Mean vector of each named target over about the last hundred steps, on the device.

    ``add`` takes every micro-batch, ``step`` closes an optimizer step: so the means are the same for any
    number of processes and micro-batches that make up the batch.
    """

    def __init__(self, rate: float = 0.01) -> None:
        self.rate = rate
        self.means: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self._sums: dict[str, list[Tensor]] = {}

    @torch.no_grad()
    def add(self, name: str, features: Tensor) -> None:
        """Note features (B, N, D) of a micro-batch; they count from the next step on."""
        self._sums.setdefault(name, []).append(features.float().mean((0, 1)))

    @torch.no_grad()
    def step(self, average: Callable[[Tensor], Tensor]) -> None:
        """average: of a vector over all processes. A step with numbers that are not finite changes nothing."""
        names = sorted(self._sums)
        if not names:
            return
        own = [torch.stack(self._sums[name]).mean(0) for name in names]
        parts = average(torch.cat(own)).split([len(part) for part in own])
        for name, now in zip(names, parts, strict=True):
            count = self.counts.get(name, 0)
            before = self.means.get(name, torch.zeros_like(now))
            new = torch.lerp(before, now, max(self.rate, 1 / (count + 1)))
            self.means[name] = torch.where(torch.isfinite(new).all(), new, before)
            self.counts[name] = count + 1
        self._sums.clear()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs, between two steps."""
        return {"means": dict(self.means), "counts": dict(self.counts)}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Continue from ``state_dict``."""
        self.means = {name: mean.to(device) for name, mean in state["means"].items()}
        self.counts = dict(state["counts"])


@torch.no_grad()
def explained_share(
    prediction: Tensor, target: Tensor, constant: Tensor, *, unit: bool, most: int = 512
) -> Tensor:
    """R2 beyond a constant: 1 - squared error of the prediction / of the ``constant`` (D,). Scalar.

    prediction, target (B, N, D). 0: no better than predicting every time the same, 1: perfect. unit: compare
    directions (loss cosine or norm l2). Of ``most`` tokens where there are more.
    """
    prediction, target = (
        some_rows(part.flatten(0, -2), most).float() for part in (prediction, target)
    )
    if unit:
        prediction, target = F.normalize(prediction, dim=-1), F.normalize(target, dim=-1)
    error = (prediction - target).square().mean()
    return 1 - error / (target - constant).square().mean().clamp_min(1e-12)


def at_least_fp32(tensor: Tensor) -> Tensor:
    """fp32 of shorter types; fp64 as it is, in which the reference values are given."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def combine_losses(student: Tensor, teacher: Tensor, alpha: float) -> Tensor:
    """Eq. 4: L = alpha * L_s + (1 - alpha) * L_t."""
    return alpha * student + (1 - alpha) * teacher


def spread(features: Tensor, most: int = 512) -> Tensor:
    """Standard deviation of each channel over images and tokens, averaged: near 0 means collapse.

    Biased, so that a single token has spread 0 and not nan. Of ``most`` tokens where there are more: over all of
    them it would take as long as a layer of a small network.
    """
    rows = some_rows(features.detach().flatten(0, -2), most).float()
    return (rows - rows.mean(0)).square().mean(0).sqrt().mean()  # a third of the time of torch.std


def some_rows(rows: Tensor, most: int) -> Tensor:
    """At most ``most`` of the rows (N, D), spread over all of them.

    In golden-ratio steps: regular ones might meet the same patch of every image.
    """
    if rows.shape[0] <= most:
        return rows
    places = (torch.arange(most, device=rows.device, dtype=torch.float64) * 0.6180339887498949) % 1
    return rows[(places * rows.shape[0]).long()]


@torch.no_grad()
def effective_rank(features: Tensor, most: int = 256) -> Tensor:
    """(sum of variances)^2 / sum of squared variances over principal axes: how many directions (B, N, D) fill.

    Between 1 (all on one line) and D; 0 where nothing varies. Of ``most`` tokens where there are more.
    """
    rows = some_rows(features.flatten(0, -2), most).float()
    rows = rows - rows.mean(0)
    rows = rows / rows.abs().amax().clamp_min(1e-30)  # else the squares of large features overflow
    gram = rows @ rows.T  # has the eigenvalues of the covariance, whatever D is
    return gram.diagonal().sum() ** 2 / (gram**2).sum().clamp_min(1e-12)


@torch.no_grad()
def image_share(features: Tensor, ids: Tensor | None, places: int, most: int = 64) -> Tensor:
    """Share of the variance of (B, N, D) that images at the same place have: 0 = they differ between places only.

    ids (B, N) int64: the place, below ``places``, of each token; None: the N places in order. Of ``most``
    images. 1 where no two images share a place (a batch of one).
    """
    rows = features[:most].float()
    batch, count, width = rows.shape
    place = torch.arange(count, device=rows.device).expand(batch, -1) if ids is None else ids[:most]
    rows, place = rows.flatten(0, 1), place.flatten()
    rows = rows / rows.abs().amax().clamp_min(1e-30)
    number = rows.new_zeros(places).index_add(0, place, rows.new_ones(len(rows)))
    mean = rows.new_zeros(places, width).index_add(0, place, rows) / number.clamp_min(1)[:, None]
    free = len(rows) - (number > 0).sum()
    within = (rows - mean[place]).square().sum() / free.clamp_min(1)
    total = (rows - rows.mean(0)).square().sum() / max(1, len(rows) - 1)
    return torch.where(free > 0, within / total.clamp_min(1e-12), 1.0)


@torch.no_grad()
def entropy(attention: Tensor) -> Tensor:
    """Entropy of maps (B, L) that sum to 1, as a share of the uniform map's; 1 = uniform. Mean over B."""
    share = attention.clamp_min(1e-12)
    return (-(share * share.log()).sum(-1) / torch.log(torch.tensor(float(share.shape[-1])))).mean()


@torch.no_grad()
def overlap(first: Tensor, second: Tensor, count: int) -> Tensor:
    """Share of the ``count`` most attended patches that two maps (B, L) have in common."""
    marks = [
        torch.zeros_like(a, dtype=torch.bool).scatter_(1, a.topk(count, dim=1).indices, True)
        for a in (first, second)
    ]
    return (marks[0] & marks[1]).float().sum(1).mean() / count
