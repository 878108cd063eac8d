"""ADE20K: semantic segmentation with UPerNet on a plain ViT, trained and measured by the published protocols."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor

from cmt_mae.backbones import Backbone, load_backbone, resized
from cmt_mae.core.errors import InputError
from cmt_mae.core.files import write_atomically
from cmt_mae.core.runs import RunDir
from cmt_mae.core.settings import resume_safe
from cmt_mae.data.ade20k import (
    Ade20k,
    ZeroLabel,
    check_labels,
    check_pairs,
    open_ade20k,
    read_image,
    read_mask,
)
from cmt_mae.data.segmentation_crops import SegmentationCrop, resize_image, resized_size
from cmt_mae.data.tasks import each_once
from cmt_mae.engine.layer_decay import layer_decay_groups
from cmt_mae.engine.processes import make_accelerator
from cmt_mae.engine.supervised import SupervisedTask, poly, warmed_up
from cmt_mae.engine.task import Evaluation, micro_batches
from cmt_mae.engine.task_settings import TaskSettings
from cmt_mae.evaluate.features import normalise
from cmt_mae.evaluate.miou import Scores, confusion_matrix, counts, intervals, scores
from cmt_mae.evaluate.pyramid import default_taps, depth_of, patch_of, sync_norms
from cmt_mae.evaluate.result import Result
from cmt_mae.evaluate.segmentation_pictures import segmentation_picture
from cmt_mae.evaluate.segmentation_protocols import (
    WEIGHTS,
    PresetName,
    SegmentationProtocol,
    differences,
    resolve,
)
from cmt_mae.evaluate.slide import resized_argmax, slide_logits
from cmt_mae.evaluate.training import make_task, open_run, train_and_measure
from cmt_mae.evaluate.upernet import Segmenter

TOLD_EVERY = 500  # images between two lines about how far an evaluation is


@dataclass(kw_only=True)
class Ade20kConfig(TaskSettings, SegmentationProtocol):
    """Settings of segmentation on a data set in ADE20K's layout. What is not given is the preset's."""

    preset: PresetName = "paper"
    """paper | paper_ft (the same, for a backbone fine-tuned on ImageNet-1K) | mae (relative positions, layer
    scale, other rates) | quick (small sets, few cores)."""
    classes: str | None = None
    """A file with the classes' names, names with commas between them, or their number. Default: the data's
    objectInfo.txt or objectInfo150.txt."""
    zero_label: ZeroLabel | None = None
    """What label 0 is: `ignored` (ADE20K: labels 1, 2, ... are the classes) or `class` (0, 1, ... are).
    Default: ignored, and refused where the masks look as if labels began at 0."""
    save_memory: bool = resume_safe(False)
    """Compute blocks again in the backward pass: less memory, a third more time."""


class TrainSample:
    """Reads and augments one training image; kept small, as it travels to the loader's processes."""

    def __init__(self, data: Ade20k, channels: int, crop: SegmentationCrop) -> None:
        self.pairs, self.channels, self.crop = data.train, channels, crop
        self.labels, self.limits = (len(data.classes), data.zero_label), data.limits

    def __call__(self, index: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """uint8 (C, S, S) and labels int16 (S, S). Raises BadImage, InputError."""
        image = read_image(self.pairs.images[index], self.channels, self.limits)
        return self.crop(image, read_mask(self.pairs.masks[index], *self.labels), rng)


class TestSample:
    """One validation image, resized, and its mask as it is."""

    def __init__(self, data: Ade20k, channels: int, scale: tuple[int, int]) -> None:
        self.pairs, self.channels, self.scale = data.val, channels, scale
        self.labels, self.limits = (len(data.classes), data.zero_label), data.limits

    def __call__(self, index: int, rng: np.random.Generator) -> tuple[int, Tensor, Tensor]:  # noqa: ARG002
        """Index, uint8 (C, h, w), labels int16 (H, W). Raises BadImage, InputError."""
        image = read_image(self.pairs.images[index], self.channels, self.limits)
        small = resize_image(image, resized_size(image.shape[0], image.shape[1], self.scale))
        mask = read_mask(self.pairs.masks[index], *self.labels)
        picture = torch.from_numpy(np.array(small)).permute(2, 0, 1)
        return index, picture, torch.from_numpy(mask)


def collate(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """uint8 (B, C, S, S), int16 (B, S, S)."""
    return torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])


def only(rows: list[Any]) -> Any:
    """Validation images have sizes of their own: one at a time."""
    (row,) = rows
    return row


def evaluate_ade20k(config: Ade20kConfig) -> Result:
    """Train UPerNet on a backbone, or continue, and measure it. Every process calls it; the first one saves.

    In the run directory: ``results/*.json``, ``checkpoints/``, ``pictures/`` (image, truth, prediction).
    Metrics in percent: mIoU (headline), mAcc, aAcc; each class in ``details``.

    Raises:
        InputError: unusable backbone, data or setting, in one line, before the training.
        Stopped: a signal asked for the end; the same call continues.
    """
    started = time.perf_counter()
    out = config.run_directory("ade20k", config.preset)
    accelerator = make_accelerator(config.device, config.precision, config.deterministic)
    data = open_ade20k(config.data, config.classes, config.zero_label)
    recipe = resolve(config, len(data.train))
    given = load_backbone(config.backbone, key=config.key, facts=config)
    backbone, padded = at_window(config, given, recipe.crop_size)
    run = open_run(out, config, asdict(recipe), accelerator)
    task = segmentation_task(config, recipe, backbone, data, accelerator, run)
    check_data(data, accelerator)
    said = differences(config, recipe, int(given.model.embed_dim), padded)  # type: ignore[arg-type]
    about = {
        "path": config.data,
        "fingerprint": data.fingerprint,
        "train": len(data.train),
        "val": len(data.val),
        "classes": len(data.classes),
        **({"range": list(data.limits)} if data.limits else {}),
    }
    protocol = result_protocol(config, recipe, backbone, task, accelerator, said)
    return train_and_measure(
        "ade20k", config, task, accelerator, run, given, about,
        lambda last: (last.metrics, protocol, last.details), said=said, started=started,
    )  # fmt: skip


def at_window(config: Ade20kConfig, given: Backbone, crop: int) -> tuple[Backbone, int]:
    """The backbone with positions for the window: ``crop`` made up to whole patches; and that side."""
    rows, columns = patch_of(given)
    if rows != columns:
        raise InputError(
            f"{config.backbone}: patches of {rows}x{columns}; UPerNet's pyramid needs square ones"
        )
    side = -(-crop // rows) * rows
    if given.img_size == (side, side):
        return given, side
    return resized(given, side), side


def check_data(data: Ade20k, accelerator: Accelerator) -> None:
    """Read every mask and every image's size once; the processes share the work.

    Raises InputError, the same in every process: the first wrong pair, or labels that cannot be right.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    counts: list[np.ndarray] = []
    for split, pairs in (("training", data.train), ("validation", data.val)):
        if accelerator.is_main_process and len(pairs) >= TOLD_EVERY:
            print(f"checking {len(pairs)} {split} masks", file=sys.stderr)
        problem, labels = None, None
        try:
            labels = check_pairs(data, pairs, range(rank, len(pairs), world))
        except InputError as error:
            problem = str(error)
        found: list[tuple[str | None, Any]] = gather_object([(problem, labels)])
        problems = [text for text, _ in found if text is not None]
        if problems:
            raise InputError(problems[0])
        counts.append(np.sum([some for _, some in found], axis=0))
    check_labels(data, *counts)


def segmentation_task(
    config: Ade20kConfig,
    recipe: SegmentationProtocol,
    backbone: Backbone,
    data: Ade20k,
    accelerator: Accelerator,
    run: RunDir,
) -> SupervisedTask:
    """Model, optimizer, batches, schedule and measurement of one segmentation."""
    world, device = accelerator.num_processes, accelerator.device
    micro, _ = micro_batches(recipe.batch_size, config.micro_batch, world)
    if norm_images(micro, accelerator) < 2:
        raise InputError(
            "batch norm needs 2 or more images at a time in training, and there is 1: give a larger batch_size "
            "or micro_batch, or fewer processes"
        )
    torch.manual_seed(config.seed)  # the head's first weights
    model = Segmenter(
        backbone,
        len(data.classes),
        channels=recipe.channels,
        dropout=recipe.dropout,
        auxiliary_weight=recipe.auxiliary_weight,
        drop_path=recipe.drop_path,
        relative_bias=recipe.relative_bias,
        layer_scale=recipe.layer_scale,
        save_memory=config.save_memory,
    )
    sync_norms(model, device, world)
    model.to(device)
    # the published constructor exempts "cls_token" and "pos_embed" by bare names, which never match below
    # "backbone.": both decay, and so do they here
    depth = len(model.backbone.vit.blocks)
    groups = layer_decay_groups(model, depth, recipe.layer_decay, recipe.weight_decay, no_decay=())
    crop = SegmentationCrop(
        recipe.crop_size,
        (recipe.longer_side, recipe.shorter_side),
        (recipe.smallest_ratio, recipe.largest_ratio),
        recipe.cat_max_ratio,
        fill=tuple(round(255 * m) for m in backbone.mean),
    )

    def to_device(batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        images, labels = (part.to(device, non_blocking=True) for part in batch)
        return {"images": normalise(images, backbone), "labels": labels.long()}

    def lr_at(step: int) -> float:
        rate = poly(step, recipe.lr, recipe.iterations, recipe.power)
        return warmed_up(step, rate, recipe.warmup, recipe.warmup_ratio)

    return make_task(
        config,
        accelerator,
        model,
        groups,
        sample=TrainSample(data, len(backbone.mean), crop),
        collate=collate,
        images=len(data.train),
        batch_size=recipe.batch_size,
        total_steps=recipe.iterations,
        lr=recipe.lr,
        schedule=lr_at,
        to_device=to_device,
        measure=measurement(config, recipe, model, backbone, data, accelerator, run),
        headline="mIoU",
    )


def norm_images(micro: int, accelerator: Accelerator) -> int:
    """Images over which batch norm takes its statistics in training."""
    shared = accelerator.device.type == "cuda"
    return micro * accelerator.num_processes if shared else micro


def measurement(
    config: Ade20kConfig,
    recipe: SegmentationProtocol,
    model: Segmenter,
    backbone: Backbone,
    data: Ade20k,
    accelerator: Accelerator,
    run: RunDir,
) -> Callable[[int], Evaluation]:
    """The task's ``measure``: every validation image once over all processes, whole, by sliding windows."""
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    classes = len(data.classes)
    scale = (recipe.longer_side, recipe.shorter_side)
    sample = TestSample(data, len(backbone.mean), scale)
    mine = len(range(rank, len(data.val), world))
    shown = {rank + world * int(i) for i in np.linspace(0, mine - 1, min(config.pictures, mine))}

    def predict(windows: Tensor) -> Tensor:
        with accelerator.autocast():
            return model.logits(windows)

    def evaluate(step: int) -> Evaluation:
        confusion = torch.zeros((classes, classes), dtype=torch.int64, device=device)
        rows: list[tuple[Tensor, Tensor, Tensor]] = []
        each: list[tuple[int, Tensor]] = []
        images = each_once(
            sample, only, range(len(data.val)), batch_size=1, rank=rank, world=world,
            workers=config.workers, timeout_s=config.timeout_s,
        )  # fmt: skip
        for done, (index, picture, mask) in enumerate(images, start=1):
            image = normalise(picture[None].to(device), backbone)[0]
            logits = slide_logits(predict, image, classes, recipe.crop_size, recipe.stride)
            prediction = resized_argmax(logits, (mask.shape[0], mask.shape[1]))
            found_here = confusion_matrix(prediction, mask.to(device), classes)
            confusion += found_here
            each.append((index, counts(found_here).cpu()))
            if accelerator.is_main_process:
                if index in shown:
                    rows.append((picture, mask, prediction.cpu()))
                    keep_prediction(run.path, data, index, prediction.cpu())
                if done % TOLD_EVERY == 0:
                    print(f"evaluated {done} of {mine} images", file=sys.stderr)
        # addition of whole numbers: the same sum on any number of processes
        total: Tensor = accelerator.reduce(confusion, "sum")
        found = scores(total)
        of_all = sorted(gather_object(each), key=lambda row: row[0])
        ends = intervals(torch.stack([one for _, one in of_all]))
        if rows:
            title = f"step {step}: mIoU {100 * found.miou:.1f} % of {len(data.val)} images"
            path = run.path / "pictures" / f"step_{step:08d}.png"
            segmentation_picture(path, rows, list(data.classes), title)
        return Evaluation(
            {"mIoU": 100 * found.miou, "mAcc": 100 * found.macc, "aAcc": 100 * found.aacc},
            {"classes": class_table(found, data.classes), "intervals": ends},
        )

    return evaluate


def keep_prediction(run: Path, data: Ade20k, index: int, prediction: Tensor) -> None:
    """The predicted labels of a pictured image as RUN/predictions/(its place).png, numbered as in the masks."""
    place = Path(data.val.images[index]).relative_to(Path(data.root) / "images" / "validation")
    labels = prediction.numpy() + (0 if data.zero_label == "class" else 1)
    image = Image.fromarray(labels.astype(np.uint8 if len(data.classes) < 255 else np.uint16))
    path = run / "predictions" / place.with_suffix(".png")
    write_atomically(path, lambda aside: image.save(aside, format="png"))


def class_table(found: Scores, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """One row per class: name, IoU and accuracy in percent (None where it does not exist), labelled pixels."""

    def percent(share: Tensor) -> float | None:
        return None if share.isnan() else 100 * share.item()

    return [
        {
            "name": name,
            "iou": percent(found.iou[k]),
            "accuracy": percent(found.accuracy[k]),
            "pixels": int(found.pixels[k]),
        }
        for k, name in enumerate(names)
    ]


def result_protocol(
    config: Ade20kConfig,
    recipe: SegmentationProtocol,
    backbone: Backbone,
    task: SupervisedTask,
    accelerator: Accelerator,
    said: list[str],
) -> dict[str, Any]:
    """``Result.protocol``: every setting that moves the number."""
    ignored = (
        "label 255 (0 is the first class)" if config.zero_label == "class" else "label 0 and 255"
    )
    return {
        "name": config.preset,
        "headline": "mIoU",
        "quoted": "the last iteration; single scale, no flip",
        "weights": WEIGHTS[config.preset],
        **asdict(recipe),
        "window": backbone.img_size,
        "taps": default_taps(depth_of(backbone)),
        "optimizer": "AdamW, betas .9 and .999; vectors and biases do not decay; cls_token and pos_embed do, "
        "as in the published constructor, whose exemption misses them",
        "schedule": "poly to 0, linear warm-up, every iteration",
        "head": "UPerNet (pooling 1, 2, 3, 6), auxiliary FCN of 256 channels on the third map",
        "loss": "cross-entropy, mean over all pixels, unlabelled ones count 0 (mmseg's mean)",
        "batch_norm_images": norm_images(task.micro_batch, accelerator),
        "augmentation": "resize, crop, flip, photometric distortion (as mmseg); mean colour as padding",
        "test": "resized to fit shorter and longer side, windows averaged as logits, resized to the image, argmax",
        "metric": f"one confusion matrix over all images; {ignored} ignored; classes that occur neither in "
        "truth nor prediction left out of the mean",
        "precision": "bf16" if accelerator.mixed_precision == "bf16" else "fp32",
        "differs": said,
    }
