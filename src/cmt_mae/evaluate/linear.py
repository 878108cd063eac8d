"""The linear probe: a linear classifier on frozen features, by the protocols the field quotes."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from cmt_mae.backbones import Backbone, load_backbone
from cmt_mae.core.errors import InputError
from cmt_mae.core.settings import Amount, Count, check_fields
from cmt_mae.data.loader import CropSettings, pretrain_batches
from cmt_mae.data.source import Source
from cmt_mae.engine.progress import evaluation_progress
from cmt_mae.evaluate.features import (
    CENTRE_CROP,
    FrozenSettings,
    Where,
    count_classes,
    data_facts,
    default_pools,
    extract_split,
    forward_parts,
    gather_rows,
    join_parts,
    label_list,
    open_labelled,
    pool_parts,
    start_processes,
)
from cmt_mae.evaluate.logistic import logistic_probe, logistic_protocol
from cmt_mae.evaluate.result import Result, make_result, save_where
from cmt_mae.evaluate.sweep import (
    IMAGES_SEEN,
    LinearProtocol,
    ProtocolName,
    Step,
    Training,
    cached_steps,
    fit_training,
    head_accuracy,
    make_heads,
    published,
    train_heads,
)

if TYPE_CHECKING:
    from rich.progress import Progress


@dataclass
class LinearConfig(FrozenSettings):
    """Settings of the linear probe. Lists: the first entry makes the default head."""

    protocol: ProtocolName = "logistic"
    """logistic: regularised logistic regression; features and strength are chosen by cross-validation on
    the training images. mae: LARS and BatchNorm, 90 epochs (50 for ViT-L and larger). milan: the same with
    100 epochs and a lower rate. dino: SGD at one rate. ibot: the best of 45 rates on the val images. sweep:
    rates x weight decays x features x BatchNorm; the default head counts, the best is told too."""
    augment: bool = False
    """New random crops and flips for every epoch, as published (a forward pass per image and epoch).
    Off: one centre crop per image, forwarded once; a published protocol is then called NAME-cached."""
    epochs: Count | None = None
    """Default: the protocol's; with cached features raised until 3 million images are seen."""
    batch_size: Count | None = None
    """Images in a step of the heads. Default: the protocol's, at most the training set."""
    blr: tuple[Amount, ...] | None = None
    """Learning rates at a batch of 256. Default: the protocol's."""
    weight_decay: tuple[Amount, ...] | None = None
    """Default: the protocol's."""
    forward_batch: Count = 64
    """Images in a forward pass of one process."""


def evaluate_linear(config: LinearConfig) -> Result:
    """Linear-probe accuracy of a frozen backbone. Every process may call it; the first one saves.

    ``metrics``: ``top1`` and (with more than 5 classes) ``top5`` of the classifier that the protocol
    quotes, in percent; ``POOL/top1`` on each feature when there are several. Published protocols with
    several heads also give ``default/top1`` and ``best/top1``. ``details["heads"]`` lists every head.

    Raises:
        InputError: unusable backbone, data or setting, in one line.
    """
    check_fields(config)
    refuse_training(config)
    started = time.perf_counter()
    where = start_processes(config.device)
    train, val = open_labelled(config.data, config.range, config.val_share)
    backbone = load_backbone(config.backbone, img_size=config.size, key=config.key, facts=config)
    with evaluation_progress(config.progress and where.rank == 0) as progress:
        if config.protocol == "logistic":
            protocol, metrics, details = by_logistic(config, backbone, train, val, where, progress)
        else:
            protocol, metrics, details = by_heads(config, backbone, train, val, where, progress)
    result = make_result(
        "linear",
        config,
        backbone,
        metrics=metrics,
        protocol=protocol
        | {"size": backbone.img_size, "crop": CENTRE_CROP, "precision": config.precision},
        data=data_facts(config.data, train, val),
        device=where.device,
        processes=where.world,
        started=started,
        details=details,
    )
    if where.rank == 0:
        save_where(result, config.out, config.backbone)
    return result


def refuse_training(config: LinearConfig) -> None:
    """Raise InputError where settings of trained heads are given to protocol logistic, which has no schedule."""
    given = [
        name
        for name in ("augment", "epochs", "batch_size", "blr", "weight_decay")
        if getattr(config, name) not in (None, False)
    ]
    if config.protocol == "logistic" and given:
        raise InputError(
            f"linear probe: --{given[0]} is of the protocols that train heads, and logistic regression has no "
            "schedule: leave it out, or add --protocol mae"
        )


def by_logistic(
    config: LinearConfig,
    backbone: Backbone,
    train: Source,
    val: Source,
    where: Where,
    progress: Progress,
) -> tuple[dict[str, Any], dict[str, float], dict[str, Any]]:
    """Protocol, metrics and details of the result of protocol logistic."""
    pools = tuple(config.pools or default_pools(backbone))
    of_train, of_val = (
        extract_split(config, backbone, one, split, pools, where, config.forward_batch, progress)
        for split, one in (("train", train), ("val", val))
    )
    classes = count_classes(train)
    metrics, details = logistic_probe(
        of_train, of_val, classes, config.seed, where.device, progress
    )
    return logistic_protocol(pools, len(train)), metrics, details


def by_heads(
    config: LinearConfig,
    backbone: Backbone,
    train: Source,
    val: Source,
    where: Where,
    progress: Progress,
) -> tuple[dict[str, Any], dict[str, float], dict[str, Any]]:
    """The same for the protocols that train heads."""
    protocol, training = plan(config, backbone, len(train), where.world)
    table = probe(config, protocol, training, backbone, train, val, where, progress)
    stated = result_protocol(config, protocol, training, len(train))
    return stated, summary(table, protocol), {"heads": table, "best": best_head(table)}


def plan(
    config: LinearConfig, backbone: Backbone, n: int, world: int
) -> tuple[LinearProtocol, Training]:
    """The published protocol with the user's changes, and its training for ``n`` images."""
    model: Any = backbone.model
    protocol = published(config.protocol, model.embed_dim, backbone.has_cls)
    protocol = replace(
        protocol,
        pools=tuple(config.pools or protocol.pools),
        blrs=tuple(config.blr or protocol.blrs),
        weight_decays=tuple(config.weight_decay or protocol.weight_decays),
    )
    training = fit_training(
        protocol,
        n,
        epochs=config.epochs,
        batch_size=config.batch_size,
        cached=not config.augment,
    )
    if config.augment:
        whole = micro_batch(config, training.batch_size, world) * world
        training = replace(training, batch_size=training.batch_size // whole * whole)
    return protocol, training


def probe(
    config: LinearConfig,
    protocol: LinearProtocol,
    training: Training,
    backbone: Backbone,
    train: Source,
    val: Source,
    where: Where,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Train every head and measure it on all val images: one row per head, the default one first."""
    pools, batch = protocol.pools, config.forward_batch
    of_val = extract_split(config, backbone, val, "val", pools, where, batch, progress)
    if config.augment:
        steps = augmented_steps(config, training, backbone, train, pools, where)
    else:
        of_train = extract_split(config, backbone, train, "train", pools, where, batch, progress)
        steps = cached_steps(of_train, training, config.seed)
    heads = make_heads(protocol)
    per_epoch = len(train) // training.batch_size
    total = training.epochs * per_epoch
    steps = iter(progress.track(steps, total=total, description=f"linear probe ({len(heads)})"))
    trained, losses = train_heads(
        heads,
        training,
        steps,
        dims={pool: values.shape[1] for pool, values in of_val.pools.items()},
        classes=count_classes(train),
        steps_per_epoch=per_epoch,
        seed=config.seed,
        device=where.device,
    )
    accuracy = head_accuracy(trained, of_val, where.device)
    return [
        {**asdict(head), "lr": head.blr * training.batch_size / 256, **hit, "train_loss": loss}
        for head, hit, loss in zip(heads, accuracy, losses, strict=True)
    ]


def micro_batch(config: LinearConfig, batch: int, world: int) -> int:
    """Images in one forward pass of one process when every batch has new crops.

    Raises:
        InputError: a batch has no image for every process.
    """
    if config.forward_batch < 1 or batch < world:
        raise InputError(
            f"linear probe: batch {batch} on {world} processes, {config.forward_batch} a forward "
            "pass; every process needs an image"
        )
    return min(config.forward_batch, batch // world)


def augmented_steps(
    config: LinearConfig,
    training: Training,
    backbone: Backbone,
    source: Source,
    pools: tuple[str, ...],
    where: Where,
) -> Iterator[Step]:
    """Features of new random crops and flips, a batch at a time, shared by all processes.

    RandomResizedCrop (0.08 to 1 of the area, bicubic) and a flip with probability 1/2.
    """
    backbone.model.to(where.device).eval()
    labels = torch.tensor(label_list(source, config.data))
    parts = list(dict.fromkeys(p for pool in pools for p in pool_parts(pool, backbone)))
    micro = micro_batch(config, training.batch_size, where.world)
    batches = pretrain_batches(
        source,
        CropSettings(backbone.img_size, scale=(0.08, 1.0), channels=len(backbone.mean)),
        noise_length=0,
        seed=config.seed,
        batch_size=training.batch_size,
        micro_batch=micro,
        rank=where.rank,
        world=where.world,
        workers=config.workers,
        timeout_s=config.timeout_s,
    )
    for _ in range(training.epochs * (len(source) // training.batch_size)):
        rows = []
        for batch in itertools.islice(batches, training.batch_size // (micro * where.world)):
            if batch["bad"]:
                _, name, reason = batch["bad"][0]
                raise InputError(f"{name}: {reason}; an evaluation skips no image, fix or remove")
            images, flip = batch["images"].to(where.device), batch["flip"].to(where.device)
            images = torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)
            row = forward_parts(backbone, images, parts, config.precision)
            rows.append({**row, "labels": labels[batch["index"]].to(where.device)})
        whole = {k: gather_rows(torch.cat([r[k] for r in rows]), where) for k in rows[0]}
        yield join_parts(whole, pools), whole["labels"]


def best_head(table: list[dict[str, Any]]) -> dict[str, Any]:
    """The head with the highest top1; the earlier one (the default first) among equals."""
    return max(table, key=lambda row: row["top1"])


def summary(table: list[dict[str, Any]], protocol: LinearProtocol) -> dict[str, float]:
    """The metrics of a Result from the table of heads; the default head is its first row."""
    quoted = best_head(table) if protocol.takes_best else table[0]
    metrics: dict[str, float] = {key: quoted[key] for key in ("top1", "top5") if key in quoted}
    if len(table) > 1:
        metrics["default/top1"] = table[0]["top1"]
        metrics["best/top1"] = best_head(table)["top1"]
    if len(protocol.pools) > 1:
        each = len(table) // len(protocol.pools)
        for i, pool in enumerate(protocol.pools):
            metrics[f"{pool}/top1"] = table[i * each]["top1"]
    return metrics


def result_protocol(
    config: LinearConfig, protocol: LinearProtocol, training: Training, n: int
) -> dict[str, Any]:
    """``Result.protocol`` of trained heads: every setting that moves the number."""
    count = len(make_heads(protocol))
    quoted = "the only head"
    if protocol.takes_best:
        quoted = f"the best of {count} heads, chosen on the val images"
    elif count > 1:
        quoted = f"the default head, fixed in advance (best/top1: of {count}, on the val images)"
    return {
        "name": config.protocol + ("" if config.augment else "-cached"),
        "headline": "top1",
        "quoted": quoted,
        **asdict(training),
        "momentum": 0.9,
        "schedule": "linear warm-up, cosine to 0; the last epoch counts",
        "pools": protocol.pools,
        "blr": protocol.blrs,
        "weight_decay": protocol.weight_decays,
        "batch_norm": protocol.norms,
        "augment": config.augment,
        "differs": differences(config, protocol, training, n),
    }


def differences(
    config: LinearConfig, protocol: LinearProtocol, training: Training, n: int
) -> list[str]:
    """In words, where this run leaves the published protocol."""
    own, said = protocol.training, []
    if not config.augment:
        said.append("features of one centre crop an image, cached, instead of random crops")
    else:
        said.append("random crops by torchvision's law, bicubic (MAE draws once, DINO is bilinear)")
    if training.batch_size != own.batch_size:
        said.append(
            f"batch {training.batch_size} instead of {own.batch_size} ({n} training images); "
            "the learning rate is scaled with it"
        )
    if config.epochs is None and training.epochs > own.epochs:
        said.append(
            f"{training.epochs} epochs instead of {own.epochs}, so that {IMAGES_SEEN / 1e6:g} "
            "million images are seen in all; fewer leave the heads of a small set half trained"
        )
    elif training.epochs != own.epochs:
        said.append(f"{training.epochs} epochs instead of {own.epochs}, as asked")
    return [] if config.protocol == "sweep" else said
