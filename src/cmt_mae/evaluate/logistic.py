"""Regularised logistic regression on frozen features; feature and strength chosen on training images alone.

The heads of MAE's probe are trained for so many epochs at so high a rate, and on a small set the number follows
the rate more than the features. Here nothing is left to a schedule: the loss is convex, L-BFGS goes to its end,
and the validation images are looked at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor

from cmt_mae.core.errors import InputError
from cmt_mae.evaluate.features import Features

STRENGTHS = tuple(10.0 ** (e / 2) for e in range(-10, 5))
"""C of scikit-learn's LogisticRegression, from the strongest regularisation to the weakest."""
FOLDS = 5
ONE_FOLD_FROM = 20_000
"""Training images from which one held-out fifth is enough to choose by."""
PATIENCE = 3
"""So many values of C without a better one end the search along them."""
ROWS = 65536
"""Images of a product, which bounds the memory of logits."""


@dataclass
class LinearClassifier:
    """A linear layer on standardised features."""

    weight: Tensor
    """(classes, D)."""
    bias: Tensor
    """(classes,)."""
    mean: Tensor
    """(D,) of the training features."""
    std: Tensor
    """(D,) likewise; 1 where a feature does not vary."""

    def logits(self, x: Tensor) -> Tensor:
        """Features (N, D) -> (N, classes)."""
        return F.linear((x - self.mean) / self.std, self.weight, self.bias)


def fit_logistic(
    x: Tensor, labels: Tensor, classes: int, strength: float, start: LinearClassifier | None = None
) -> LinearClassifier:
    """Minimise C * (sum of cross-entropies) + |W|^2 / 2, as scikit-learn's LogisticRegression does.

    x: (N, D) float32, standardised here. labels: (N,). start: where to begin (the minimum does not depend on it).
    The bias is not regularised.
    """
    n = len(x)
    std, mean = torch.std_mean(x, dim=0, correction=0)
    std = torch.where(std > 1e-6 * (mean.abs() + 1e-6), std, torch.ones_like(std))
    x = (x - mean) / std
    weight = x.new_zeros(classes, x.shape[1]) if start is None else start.weight.clone()
    bias = x.new_zeros(classes) if start is None else start.bias.clone()
    weight.requires_grad_(True)
    bias.requires_grad_(True)
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=500,
        history_size=10,
        tolerance_grad=1e-5,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        solver.zero_grad()
        total = weight.square().sum() / (2 * strength * n)
        total.backward()
        total = total.detach()
        for rows, truth in zip(x.split(ROWS), labels.split(ROWS), strict=True):
            part = F.cross_entropy(F.linear(rows, weight, bias), truth, reduction="sum") / n
            part.backward()
            total = total + part.detach()
        return total

    solver.step(loss)  # type: ignore[arg-type]
    return LinearClassifier(weight.detach(), bias.detach(), mean, std)


def make_folds(labels: Sequence[int], seed: int) -> list[np.ndarray]:
    """Numbers of the held-out images of each fold: every class spread evenly, drawn by the seed."""
    rng = np.random.default_rng([seed, 1])
    labels_ = np.asarray(labels)
    mixed = rng.permutation(len(labels_))
    by_class = mixed[np.argsort(labels_[mixed], kind="stable")]
    folds = [np.sort(by_class[k::FOLDS]) for k in range(min(FOLDS, len(labels_)))]
    return folds[:1] if len(labels_) >= ONE_FOLD_FROM else folds


@torch.no_grad()
def hits(model: LinearClassifier, x: Tensor, labels: Tensor) -> tuple[float, float]:
    """Shares (top-1, top-5) of images in percent. Equal logits: the lower class."""
    ranked = [
        model.logits(rows).sort(dim=1, descending=True, stable=True).indices[:, :5]
        for rows in x.split(ROWS)
    ]
    hit = torch.cat(ranked) == labels[:, None]
    return 100 * hit[:, 0].double().mean().item(), 100 * hit.any(1).double().mean().item()


def search(
    x: Tensor, labels: Tensor, classes: int, seed: int, after_fit: Callable[[], Any]
) -> list[dict[str, float]]:
    """``C`` and ``held_out_top1`` (of images held out of the fit, mean over the folds) for rising C.

    Ends where PATIENCE values of C have brought nothing better.
    """
    folds = make_folds(labels.tolist(), seed)
    models: list[LinearClassifier | None] = [None] * len(folds)
    table: list[dict[str, float]] = []
    for strength in STRENGTHS:
        right = 0.0
        for k, fold in enumerate(folds):
            out = torch.zeros(len(x), dtype=torch.bool)
            out[torch.from_numpy(fold)] = True
            out = out.to(x.device)
            model = fit_logistic(x[~out], labels[~out], classes, strength, models[k])
            models[k] = model
            right += hits(model, x[out], labels[out])[0] * len(fold)
            after_fit()
        table.append({"C": strength, "held_out_top1": right / sum(map(len, folds))})
        best = max(range(len(table)), key=lambda i: table[i]["held_out_top1"])
        if len(table) - 1 - best >= PATIENCE:
            break
    return table


def logistic_probe(
    train: Features,
    val: Features,
    classes: int,
    seed: int,
    device: torch.device,
    progress: Progress,
) -> tuple[dict[str, float], dict[str, Any]]:
    """``Result.metrics`` and ``Result.details`` of a probe by logistic regression.

    Every feature gets its own C; the feature with the best accuracy on held-out training images is quoted (of
    equal ones the first, and the smallest C). Only then are the validation images looked at. Raises InputError
    for a single training image.
    """
    if len(train.labels) < 2:
        raise InputError(
            f"{len(train.labels)} training image: the linear probe chooses C on held-out ones and needs 2 or more"
        )
    tables: dict[str, list[dict[str, float]]] = {}
    labels = train.labels.to(device)
    for pool, x in train.pools.items():
        task = progress.add_task(f"logistic regression on {pool}", total=None)
        tables[pool] = search(x.to(device), labels, classes, seed, partial(progress.advance, task))
        progress.remove_task(task)
    rows: list[dict[str, Any]] = []
    for pool, table in tables.items():
        chosen = max(table, key=lambda row: row["held_out_top1"])
        model = fit_logistic(train.pools[pool].to(device), labels, classes, chosen["C"])
        top1, top5 = hits(model, val.pools[pool].to(device), val.labels.to(device))
        rows.append(
            {"pool": pool, **chosen, "top1": top1} | ({"top5": top5} if classes > 5 else {})
        )
    quoted = max(rows, key=lambda row: row["held_out_top1"])
    metrics: dict[str, float] = {key: quoted[key] for key in ("top1", "top5") if key in quoted}
    if len(rows) > 1:
        metrics |= {f"{row['pool']}/top1": row["top1"] for row in rows}
    return metrics, {"heads": rows, "quoted": quoted, "search": tables}


def logistic_protocol(pools: tuple[str, ...], n: int) -> dict[str, Any]:
    """``Result.protocol`` for ``n`` training images."""
    held_out = f"one of {FOLDS} folds" if n >= ONE_FOLD_FROM else f"{min(FOLDS, n)} folds"
    return {
        "name": "logistic",
        "headline": "top1",
        "quoted": f"features and C with the best accuracy on held-out training images ({held_out}, drawn by "
        "the seed, classes spread evenly); then fitted on all training images",
        "loss": "C x sum of cross-entropies + half the squared weights; the bias is free",
        "C": [float(f"{c:.4g}") for c in STRENGTHS],
        "solver": "L-BFGS to convergence, on standardised features of one centre crop an image",
        "pools": pools,
    }
