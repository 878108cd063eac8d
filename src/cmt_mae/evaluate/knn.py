"""k nearest neighbours on frozen features: DINO's protocol, exact."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from cmt_mae.backbones import Backbone, load_backbone
from cmt_mae.core.errors import InputError
from cmt_mae.core.settings import Count, Positive, check_fields
from cmt_mae.data.source import Source
from cmt_mae.engine.progress import evaluation_progress
from cmt_mae.evaluate.features import (
    CENTRE_CROP,
    Features,
    FrozenSettings,
    count_classes,
    data_facts,
    default_pools,
    extract,
    extract_split,
    open_labelled,
    start_processes,
)
from cmt_mae.evaluate.result import Result, make_result, save_where

HELD_OUT = 2000
"""Training images, at most, by which the features to quote are chosen."""
PROBE_POOL, PROBE_K = "mean", 20
SIMILARITIES = 2**25  # entries of the similarity matrix held at a time: 128 MiB


@dataclass
class KnnConfig(FrozenSettings):
    """Settings of the k-NN evaluation. It trains nothing, so it has no random part.

    Its features, where none are given, are cls, mean and cls+mean; mean alone without a class token. The number
    to quote is that of the features that get most of a held-out part of the training images right; where
    features are given, that of the first.
    """

    k: tuple[Count, ...] = (10, 20)
    """Numbers of neighbours. The last one is the headline's."""
    temperature: Positive = 0.07
    """A neighbour's vote is exp(cosine similarity / temperature)."""
    batch_size: Count = 64
    """Images in a forward pass of one process. Does not change the result."""


def knn_predict(
    train: Tensor,
    labels: Tensor,
    test: Tensor,
    *,
    k: Sequence[int],
    temperature: float = 0.07,
    classes: int | None = None,
    device: torch.device | None = None,
) -> dict[int, Tensor]:
    """Classes ranked by the weighted vote of the k most similar training features.

    Cosine similarity s of l2-normalised features, weight exp(s / temperature), all in float32
    (DINO eval_knn.py). Exact: every pair is compared, some rows at a time. Ties are settled, so
    the answer does not depend on the device: among equally similar neighbours the one earlier in
    the training set is taken, among equal votes the lower class.

    Args:
        train: (N, D) features; labels: (N,) classes, 0 or more; test: (M, D) features.
        k: numbers of neighbours, each from 1 to N.
        classes: number of classes; the highest label + 1 by default.
        device: where the products are made; that of ``train`` by default.

    Returns:
        k -> (M, min(5, classes)) int64 classes on the CPU, the best first.

    Raises:
        InputError: a k that is not between 1 and N, or a temperature not above 0.
    """
    _check(k, temperature, len(train))
    device = device or train.device
    classes = classes or int(labels.max()) + 1
    bank, labels = F.normalize(train.to(device).float(), dim=1), labels.to(device)
    ranked: dict[int, list[Tensor]] = {neighbours: [] for neighbours in k}
    rows = max(1, SIMILARITIES // len(bank))
    for queries in test.split(rows):
        similarity = F.normalize(queries.to(device).float(), dim=1) @ bank.T
        values, index = nearest(similarity, max(k))
        # less the row's highest: that changes no ranking, and a low temperature cannot overflow
        weights = ((values - values[:, :1]) / temperature).exp()
        for neighbours in k:
            votes = torch.zeros(len(queries), classes, device=device)
            near = slice(0, neighbours)
            votes.scatter_add_(1, labels[index[:, near]], weights[:, near])
            order = votes.sort(dim=1, descending=True, stable=True).indices
            ranked[neighbours].append(order[:, :5].cpu())
    return {neighbours: torch.cat(parts) for neighbours, parts in ranked.items()}


def _check(k: Sequence[int], temperature: float, n: int) -> None:
    """Refuse what has no meaning, before any feature is computed."""
    if not k or min(k) < 1 or max(k) > n:
        raise InputError(f"k-NN: k is {list(k)}; it must lie between 1 and the {n} training images")
    if temperature <= 0:
        raise InputError(f"k-NN: the temperature is {temperature}; it must be above 0")


def nearest(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and their places, equal values in the order of their places.

    topk leaves the order of equal values open (and which of them it takes), so rows where the
    first k + 1 values hold a tie are sorted stably as a whole; such rows are rare.
    """
    values, index = similarity.topk(min(k + 1, similarity.shape[1]), dim=1)
    tied = (values[:, 1:] == values[:, :-1]).any(1).nonzero().squeeze(1)
    if len(tied):
        full = similarity[tied].sort(dim=1, descending=True, stable=True)
        width = values.shape[1]
        values[tied], index[tied] = full.values[:, :width], full.indices[:, :width]
    return values[:, :k], index[:, :k]


def knn_accuracy(
    train: Features,
    test: Features,
    *,
    k: Sequence[int] = (10, 20),
    temperature: float = 0.07,
    classes: int | None = None,
    device: torch.device | None = None,
) -> dict[str, float]:
    """``POOL/kK/top1`` (and ``top5`` with more than 5 classes) in percent for every pool and k."""
    classes = classes or int(torch.cat([train.labels, test.labels]).max()) + 1
    metrics = {}
    for pool, features in train.pools.items():
        ranked = knn_predict(
            features,
            train.labels,
            test.pools[pool],
            k=k,
            temperature=temperature,
            classes=classes,
            device=device,
        )
        for neighbours, guess in ranked.items():
            hit = guess == test.labels[:, None]
            metrics[f"{pool}/k{neighbours}/top1"] = 100 * hit[:, 0].double().mean().item()
            if classes > 5:
                metrics[f"{pool}/k{neighbours}/top5"] = 100 * hit.any(1).double().mean().item()
    return metrics


def pool_by_train(
    train: Features, k: int, temperature: float, device: torch.device | None = None
) -> dict[str, float]:
    """Pool -> top-1 in percent of held-out training images, a fifth of them or HELD_OUT, drawn by seed 0.

    Their neighbours are the other training images, so the choice of a pool sees nothing of the validation images.
    """
    n = len(train.labels)
    count = min(HELD_OUT, n // 5)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    held, rest = order[:count], order[count:]
    classes, k = int(train.labels.max()) + 1, min(k, len(rest))
    scores = {}
    for pool, features in train.pools.items():
        ranked = knn_predict(
            features[rest], train.labels[rest], features[held], k=(k,), temperature=temperature,
            classes=classes, device=device,
        )[k]  # fmt: skip
        right = ranked[:, 0] == train.labels[held]
        scores[pool] = 100 * right.double().mean().item() if count else 0.0
    return scores


def probe(backbone: Backbone, train: Source, val: Source, accelerator: Accelerator) -> float:
    """k-NN of a run that goes on: top-1 in percent, of the mean-pooled patch tokens (k 20, T 0.07)."""
    of_train, of_val = (
        extract(
            backbone, source, device=accelerator.device, pools=(PROBE_POOL,),
            rank=accelerator.process_index, world=accelerator.num_processes,
        )
        for source in (train, val)
    )  # fmt: skip
    k = min(PROBE_K, len(of_train))
    return knn_accuracy(of_train, of_val, k=(k,))[f"{PROBE_POOL}/k{k}/top1"]


def evaluate_knn(config: KnnConfig) -> Result:
    """k-NN accuracy of a frozen backbone. Every process may call it; the first one saves.

    Raises:
        InputError: unusable backbone, data or setting, in one line.
    """
    check_fields(config)
    started = time.perf_counter()
    where = start_processes(config.device)
    train, val = open_labelled(config.data, config.range, config.val_share)
    _check(config.k, config.temperature, len(train))
    backbone = load_backbone(config.backbone, img_size=config.size, key=config.key, facts=config)
    pools = tuple(config.pools or default_pools(backbone))
    with evaluation_progress(config.progress and where.rank == 0) as progress:
        of_train, of_val = (
            extract_split(config, backbone, one, split, pools, where, config.batch_size, progress)
            for split, one in (("train", train), ("val", val))
        )
    metrics = knn_accuracy(
        of_train,
        of_val,
        k=config.k,
        temperature=config.temperature,
        classes=count_classes(train),
        device=where.device,
    )
    headline, chosen, details = f"{pools[0]}/k{config.k[-1]}/top1", "", {}
    if not config.pools:
        scores = pool_by_train(of_train, config.k[-1], config.temperature, where.device)
        pool = max(pools, key=lambda name: scores[name])  # the first of equal ones
        metrics = {"top1": metrics[f"{pool}/k{config.k[-1]}/top1"], **metrics}
        headline, chosen = (
            "top1",
            f"the pool with most right of {HELD_OUT} held-out training images at most",
        )
        details = {"pool": pool, "held_out_top1": scores}
    result = make_result(
        "knn",
        config,
        backbone,
        metrics=metrics,
        protocol={
            "name": "dino",
            "headline": headline,
            **({"quoted": chosen} if chosen else {}),
            "k": config.k,
            "temperature": config.temperature,
            "similarity": "cosine",
            "pools": pools,
            "size": backbone.img_size,
            "crop": CENTRE_CROP,
            "precision": config.precision,
        },
        data=data_facts(config.data, train, val),
        device=where.device,
        processes=where.world,
        started=started,
        details=details,
    )
    if where.rank == 0:
        save_where(result, config.out, config.backbone)
    return result
