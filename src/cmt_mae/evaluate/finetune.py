"""Fine-tuning: the whole backbone trained on labelled images, by MAE's recipe and its variants."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from timm.data.mixup import Mixup
from torch import Tensor

from cmt_mae.backbones import Backbone, load_backbone
from cmt_mae.core.errors import InputError
from cmt_mae.core.runs import RunDir
from cmt_mae.core.settings import (
    Amount,
    Count,
    CountOrNone,
    PartOf,
    resume_safe,
)
from cmt_mae.data.augment import Augment, seeded
from cmt_mae.data.centre import load_image
from cmt_mae.data.source import BadImage, Source
from cmt_mae.engine.layer_decay import layer_decay_groups
from cmt_mae.engine.optim import learning_rate
from cmt_mae.engine.processes import make_accelerator
from cmt_mae.engine.supervised import SupervisedTask
from cmt_mae.engine.task import Evaluation, micro_batches
from cmt_mae.engine.task_settings import TaskSettings
from cmt_mae.evaluate.confusion import confusion_picture
from cmt_mae.evaluate.features import (
    count_classes,
    data_facts,
    label_list,
    normalise,
    open_labelled,
)
from cmt_mae.evaluate.few_shot import few_shot_indexes
from cmt_mae.evaluate.finetune_accuracy import accuracy, class_facts, predict
from cmt_mae.evaluate.finetune_model import Classifier, save_classifier
from cmt_mae.evaluate.finetune_protocols import (
    FinetuneProtocol,
    PresetName,
    differences,
    eval_crop,
    resolve,
)
from cmt_mae.evaluate.result import Result
from cmt_mae.evaluate.training import make_task, open_run, train_and_measure

MOST_IMAGES = 256  # of a forward pass of one process in an evaluation


@dataclass(kw_only=True)
class FinetuneConfig(TaskSettings, FinetuneProtocol):
    """Settings of fine-tuning. What is not given is the preset's."""

    preset: PresetName = "mae"
    """mae | paper256 (batch 256) | milan, dbot (lower rates) | ibot | quick (small sets, few cores). Numbers of
    ViT-L from width 1024 on, of ViT-B below."""
    size: Count | None = None
    """Input size in pixels. Default: the backbone's own."""
    val_share: PartOf = 0.0
    """Share of each class to hold out as val where there is no val split."""
    range: tuple[float, ...] = ()
    """Values of black and white in images of more than 8 bits; empty: measured on some of them."""
    few_shot: str | None = None
    """Train on a part of every class: 1% or 10% of its images, or their number, like 5. Drawn by the seed."""
    frozen_layers: CountOrNone | Literal["all"] = 0
    """The embeddings and so many blocks are not trained; all: only what stands on top. 0: all is trained."""
    eval_every: Amount = resume_safe(1.0)
    """Epochs between two evaluations on the validation images; 0: only at the end."""
    pictures: CountOrNone = resume_safe(8)
    """How many of the most frequent mistakes are listed in pictures/confusion.png; 0: no picture."""


class Sample:
    """Reads and augments one training image; kept small, as it travels to the loader's processes."""

    def __init__(self, source: Source, augment: Augment) -> None:
        self.source, self.augment = source, augment

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """One row of a batch. Raises BadImage, with the image's name."""
        try:
            image = load_image(self.source, index, len(self.augment.mean))
        except BadImage as error:
            raise BadImage(f"{self.source.name(index)}: {error}") from None
        picture, erased = self.augment(image, rng)
        mixing = int(rng.integers(2**32))
        label = self.source.label(index)
        return {"image": picture, "label": label, "erased": erased, "mixing": mixing}


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Images uint8 (B, C, H, W), labels (B,) int64, rectangles to erase by row, and the seed of the mixing.

    The seed is drawn from the stream of the first sample: so it follows from seed, step and process, and no
    loader process or restart changes it.
    """
    return {
        "images": torch.stack([row["image"] for row in rows]),
        "labels": torch.tensor([row["label"] for row in rows]),
        "erased": [(i, *row["erased"]) for i, row in enumerate(rows) if row["erased"] is not None],
        "mixing": rows[0]["mixing"],
    }


def to_device(
    batch: dict[str, Any], backbone: Backbone, device: torch.device, mixup: Mixup | None
) -> dict[str, Tensor]:
    """A collated batch as ``Classifier`` takes it: normalised, erased, then mixed, in MAE's order."""
    images = normalise(batch["images"].to(device, non_blocking=True), backbone)
    labels = batch["labels"].to(device, non_blocking=True)
    for row, top, left, pixels in batch["erased"]:
        height, width = pixels.shape[1:]
        images[row, :, top : top + height, left : left + width] = pixels.to(device)
    if mixup is not None:
        with seeded(batch["mixing"]):
            images, labels = mixup(images, labels)
    return {"images": images, "labels": labels}


def open_data(config: FinetuneConfig) -> tuple[Source, Source]:
    """Training images (a part of them if asked) and validation images, all labelled.

    Raises InputError for data without labels or with labels beyond the list of classes.
    """
    train, val = open_labelled(config.data, config.range, config.val_share)
    labels = label_list(train, config.data)
    names = train.classes
    if names is not None and max(labels) >= len(names):
        raise InputError(
            f"{config.data}: {train.name(labels.index(max(labels)))} has label {max(labels)}, but there are "
            f"{len(names)} classes (0 to {len(names) - 1}); fix the labels or the names"
        )
    if config.few_shot is not None:
        train = train.subset(few_shot_indexes(labels, config.few_shot, config.seed))
    return train, val


def evaluate_finetune(config: FinetuneConfig) -> Result:
    """Fine-tune a backbone, or continue, and measure it. Every process calls it; the first one saves.

    In the run directory: ``results/*.json``, ``classifier.safetensors`` (the network with its head, for timm),
    ``backbone.safetensors`` (without it, for any other evaluation), ``pictures/confusion.png``.

    Raises:
        InputError: unusable backbone, data or setting, in one line, before the training.
        Stopped: a signal asked for the end; the same call continues.
    """
    started = time.perf_counter()
    out = config.run_directory("finetune", config.preset)
    accelerator = make_accelerator(config.device, config.precision, config.deterministic)
    train, val = open_data(config)
    backbone = load_backbone(config.backbone, img_size=config.size, key=config.key, facts=config)
    width = int(backbone.model.embed_dim)  # type: ignore[arg-type]
    recipe = resolve(config, width, len(train))
    for source in (train, val):  # a pack made with other channels is told before the training
        load_first(source, len(backbone.mean))
    run = open_run(out, config, asdict(recipe), accelerator)
    said = differences(config, recipe, width, len(train))
    task = finetuning_task(config, recipe, backbone, train, val, accelerator, run)
    # the part of a few-shot run goes by its seed: results of several seeds are of the same data
    whole = train.parent if config.few_shot is not None else None
    data = data_facts(config.data, whole or train, val) | {"train": len(train)}

    def finish(last: Evaluation) -> tuple[dict[str, float], dict[str, Any], dict[str, Any]]:
        rows: list[Any] = [run.read_metrics() if accelerator.is_main_process else None]
        broadcast_object_list(rows)
        history = [row for row in rows[0] if "val_top1" in row]
        best = max(history, key=lambda row: row["val_top1"])
        if accelerator.is_main_process:
            classifier = task.model
            assert isinstance(classifier, Classifier)
            source = f"fine-tuned on {Path(config.data).name}, preset {config.preset}, from {backbone.source}"
            save_classifier(run.path, classifier, backbone, train.classes, source)
        details = {
            **last.details,
            "steps": task.total_steps,
            "few_shot_images": train.identity() if whole else None,
            "evaluations": [
                {"epoch": row["step"] / task.steps_per_epoch, "top1": row["val_top1"]}
                for row in history
            ],
        }
        protocol = result_protocol(config, recipe, backbone, train, accelerator, said)
        return {**last.metrics, "best_top1": best["val_top1"]}, protocol, details

    return train_and_measure(
        "finetune",
        config,
        task,
        accelerator,
        run,
        backbone,
        data,
        finish,
        said=said,
        started=started,
    )


def load_first(source: Source, channels: int) -> None:
    """Raise InputError where the first image cannot be read with so many channels."""
    try:
        load_image(source, 0, channels)
    except BadImage as error:
        raise InputError(f"{source.name(0)}: {error}; fix or remove it") from None


def finetuning_task(
    config: FinetuneConfig,
    recipe: FinetuneProtocol,
    backbone: Backbone,
    train: Source,
    val: Source,
    accelerator: Accelerator,
    run: RunDir,
) -> SupervisedTask:
    """Model, optimizer, batches, schedule and measurement of one fine-tuning."""
    device = accelerator.device
    micro, _ = micro_batches(recipe.batch_size, config.micro_batch, accelerator.num_processes)
    if recipe.mixes and micro % 2:
        raise InputError(
            f"mixup and cutmix pair the images of a micro-batch, and {micro} is odd: change batch_size or "
            "micro_batch, or give mixup 0 and cutmix 0"
        )
    classes = count_classes(train)
    augment = Augment(
        backbone.img_size, backbone.mean, recipe.smallest_crop, recipe.rand_augment, recipe.erasing
    )
    torch.manual_seed(config.seed)  # the head's first weights
    model = Classifier(
        backbone,
        classes,
        pool=recipe.pool,
        drop_path=recipe.drop_path,
        smoothing=recipe.smoothing,
        frozen_layers=config.frozen_layers,
    ).to(device)
    vit: Any = model.backbone
    groups = layer_decay_groups(
        model,
        len(vit.blocks),
        recipe.layer_decay,
        recipe.weight_decay,
        no_decay={name.rsplit(".", 1)[-1] for name in vit.no_weight_decay()},
    )
    mixup = None
    if recipe.mixes:
        mixup = Mixup(
            recipe.mixup,
            recipe.cutmix,
            label_smoothing=recipe.smoothing,
            num_classes=classes,
        )
    average = copy.deepcopy(model).eval() if recipe.ema_decay else None
    steps_per_epoch = len(train) // recipe.batch_size

    def lr_at(step: int) -> float:
        lowest = min(recipe.min_lr, recipe.lr)
        epoch = step / steps_per_epoch
        return learning_rate(epoch, recipe.lr, recipe.warmup_epochs, recipe.epochs, lowest)

    return make_task(
        config,
        accelerator,
        model,
        groups,
        sample=Sample(train, augment),
        collate=collate,
        images=len(train),
        batch_size=recipe.batch_size,
        total_steps=recipe.epochs * steps_per_epoch,
        lr=recipe.lr,
        schedule=lr_at,
        to_device=lambda batch: to_device(batch, backbone, device, mixup),
        measure=measurement(config, model, average, backbone, val, accelerator, run, micro),
        headline="top1",
        average=average,
        average_decay=recipe.ema_decay,
    )


def measurement(
    config: FinetuneConfig,
    model: Classifier,
    average: Classifier | None,
    backbone: Backbone,
    val: Source,
    accelerator: Accelerator,
    run: RunDir,
    micro: int,
) -> Callable[[int], Evaluation]:
    """The task's ``measure``: accuracy of the weights, and of their average as ``ema_...``."""
    classes: int = model.backbone.head.out_features
    names = val.classes or [str(number) for number in range(classes)]

    def measure(one: Classifier) -> tuple[dict[str, float], Tensor]:
        best, labels = predict(
            one,
            val,
            backbone,
            accelerator,
            batch_size=min(micro, MOST_IMAGES),
            workers=config.workers,
            timeout_s=config.timeout_s,
        )
        return accuracy(best, labels, classes)

    def evaluate(step: int) -> Evaluation:
        metrics, confusion = measure(model)
        if average is not None:
            metrics |= {f"ema_{key}": value for key, value in measure(average)[0].items()}
        if config.pictures and accelerator.is_main_process:
            title = f"step {step}: top-1 {metrics['top1']:.1f} % of {len(val)} images"
            path = run.path / "pictures" / "confusion.png"
            confusion_picture(path, confusion, names, title, mistakes=config.pictures)
        return Evaluation(metrics, class_facts(confusion, names))

    return evaluate


def result_protocol(
    config: FinetuneConfig,
    recipe: FinetuneProtocol,
    backbone: Backbone,
    train: Source,
    accelerator: Accelerator,
    said: list[str],
) -> dict[str, Any]:
    """``Result.protocol``: every setting that moves the number."""
    few = None
    if config.few_shot is not None:
        few = {"part": config.few_shot, "images": len(train), "drawn": "by the seed"}
    return {
        "name": config.preset,
        "headline": "top1",
        "quoted": "the last epoch (best_top1: the best of all evaluations, chosen on the val images)",
        **asdict(recipe),
        "lr": recipe.lr,
        "optimizer": "AdamW, betas .9 and .999; no weight decay on vectors, positions and class token",
        "schedule": "linear warm-up from 0, cosine to min_lr, every iteration",
        "head": "norm and linear layer" if recipe.pool == "mean" else "linear layer",
        "head_std": 2e-5,
        "train_crop": "random resized crop, bicubic, and flip",
        "mixing": "timm Mixup, one draw a micro-batch" if recipe.mixes else "none",
        "size": backbone.img_size,
        "crop": eval_crop(backbone.img_size)[1],
        "few_shot": few,
        "frozen_layers": config.frozen_layers,
        "precision": "bf16" if accelerator.mixed_precision == "bf16" else "fp32",
        "differs": said,
    }
