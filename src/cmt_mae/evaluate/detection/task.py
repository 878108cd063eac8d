"""COCO detection and instance segmentation with any plain ViT (spec section 7)."""

import hashlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from cmt_mae.backbones import Backbone, load_backbone, resized
from cmt_mae.core.errors import InputError
from cmt_mae.core.files import write_text
from cmt_mae.data.coco import CocoSplit, open_coco, same_classes
from cmt_mae.data.detection_crops import (
    Example,
    large_scale_jitter,
    multi_scale,
    resize_image,
    scaled_size,
)
from cmt_mae.data.tasks import each_once
from cmt_mae.engine.layer_decay import layer_decay_groups
from cmt_mae.engine.processes import make_accelerator
from cmt_mae.engine.supervised import SupervisedTask, step_decay, warmed_up
from cmt_mae.engine.task import Evaluation
from cmt_mae.evaluate.detection.detector import DetectionBatch, Detector, build_detector
from cmt_mae.evaluate.detection.metrics import coco_metrics, objects_of
from cmt_mae.evaluate.detection.pictures import detection_picture
from cmt_mae.evaluate.detection.predict import to_coco
from cmt_mae.evaluate.detection.protocols import (
    CocoConfig,
    DetectionProtocol,
    resolve,
    result_protocol,
)
from cmt_mae.evaluate.features import normalise
from cmt_mae.evaluate.pyramid import depth_of, sync_norms
from cmt_mae.evaluate.result import Result
from cmt_mae.evaluate.training import make_task, open_run, train_and_measure

SAY_EVERY = 60.0
"""Seconds between two lines that tell how far an evaluation is."""


def evaluate_coco(config: CocoConfig) -> Result:
    """Train Mask R-CNN on COCO's training images and evaluate it. Every process calls it; the first saves.

    ``metrics``: box/AP, box/AP50, box/AP75, box/APs, box/APm, box/APl and the same with mask/, in percent;
    NaN where undefined. Data without masks: boxes alone, no mask head.
    Detections go to OUT/predictions/{bbox,segm}.json, pictures to OUT/pictures.
    Raises InputError (one line, before training starts) and Stopped after a signal.
    """
    started = time.perf_counter()
    out = config.run_directory("coco", config.preset)
    accelerator = make_accelerator(config.device, config.precision, config.deterministic)
    train, val = open_coco(config.data, "train"), open_coco(config.data, "val")
    same_classes(train, val)
    val.limits = train.limits
    if train.has_masks != val.has_masks:
        raise InputError(
            f"{config.data}: only one of train and val has masks: give both masks, or remove them all to train "
            "and measure boxes alone"
        )
    backbone, protocol, changed = open_backbone(config)
    chosen = trainable_images(train, protocol, config.data)
    run = open_run(out, config, {}, accelerator)
    torch.manual_seed(config.seed)  # new weights
    masks = train.has_masks and val.has_masks
    said = [] if masks else ["the data have no masks: no mask head, box AP alone"]
    detector = build_detector(backbone, len(train.classes), protocol, config.save_memory, masks)
    sync_norms(detector.to(accelerator.device), accelerator.device, accelerator.num_processes)
    evaluated = train if config.eval_split == "train" else val
    evaluate = Evaluator(detector, evaluated, protocol, backbone, accelerator, run.path, config)
    task = detection_task(
        config, protocol, detector, backbone, train, chosen, accelerator, evaluate
    )
    both = hashlib.sha256(f"{train.fingerprint()} {val.fingerprint()}".encode())
    data = {
        "path": config.data,
        "fingerprint": f"{train.fingerprint()[:32]}-{both.hexdigest()[:31]}",
        "train": len(chosen),
        "train_without_boxes": int((train.counts == 0).sum()),
        "val": len(evaluated),
        "classes": len(train.classes),
        "boxes": int(train.counts.sum()),
        **({"range": list(train.limits)} if train.limits else {}),
    }
    precision = "fp32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision
    stated = result_protocol(config, protocol, changed, precision, masks) | {
        "steps": task.total_steps
    }
    return train_and_measure(
        "coco", config, task, accelerator, run, backbone, data,
        lambda last: (last.metrics, stated, {**last.details, "run": str(out)}),
        said=said, packages=("faster-coco-eval", "accelerate"), started=started,
    )  # fmt: skip


def open_backbone(config: CocoConfig) -> tuple[Backbone, DetectionProtocol, list[str]]:
    """The backbone and the protocol for it, with the names of changed settings.

    Raises InputError where they do not fit: BEiT's relative positions need a fixed input size.
    """
    backbone = load_backbone(config.backbone, key=config.key, facts=config)
    protocol, changed = resolve(config, depth_of(backbone))
    if type(backbone.model).__name__ == "Beit" and protocol.neck == "taps":
        if protocol.augment != "lsj":
            raise InputError(
                f"{config.backbone} is a BEiT, whose relative positions need one input size: add "
                "--augment lsj --lsj_size PIXELS"
            )
        backbone = resized(backbone, protocol.lsj_size)
    largest = max(protocol.test_short, protocol.test_longest)
    if protocol.augment == "lsj" and largest > protocol.lsj_size:
        raise InputError(
            f"test pictures of {protocol.test_short} / {protocol.test_longest} pixels do not fit into "
            f"lsj_size {protocol.lsj_size}: set test_short and test_longest to it"
        )
    return backbone, protocol, changed


def trainable_images(train: CocoSplit, protocol: DetectionProtocol, where: str) -> np.ndarray:
    """Indexes of the images that are trained on. InputError where there are too few."""
    found = np.arange(len(train)) if protocol.empty_images else np.flatnonzero(train.counts > 0)
    if not train.counts.any():
        raise InputError(f"{where}: no training image has a box, so there is nothing to learn")
    if len(found) < protocol.batch_size:
        raise InputError(
            f"{where}: {len(found)} training images are fewer than a batch of {protocol.batch_size}: lower "
            "--batch_size"
        )
    return found


@dataclass
class TrainSample:
    """Index and random stream -> one augmented example; a class, so that loader processes can have it."""

    split: CocoSplit
    chosen: np.ndarray
    protocol: DetectionProtocol
    channels: int

    def __call__(self, index: int, rng: np.random.Generator) -> Example:
        example = self.split.example(int(self.chosen[index]), self.channels)
        p = self.protocol
        if p.augment == "lsj":
            measured = self.split.has_masks
            return large_scale_jitter(example, rng, p.lsj_size, p.lsj_scale, measured)
        return multi_scale(example, rng, p.short_sides, p.longest, p.crop_shorts, p.crop_range)


@dataclass
class EvalSample:
    """Index -> (index, image at test size)."""

    split: CocoSplit
    protocol: DetectionProtocol
    channels: int

    def __call__(self, index: int, rng: np.random.Generator) -> tuple[int, Tensor]:  # noqa: ARG002
        image = self.split.image(index, self.channels)
        size = eval_size(self.split.sizes[index], self.protocol)
        return index, resize_image(image, size)


def eval_size(size: tuple[int, int], protocol: DetectionProtocol) -> tuple[int, int]:
    """Of a test picture, from its own (height, width)."""
    return scaled_size(size, protocol.test_short, protocol.test_longest)


def keep(samples: list[Any]) -> list[Any]:
    """Pictures of different sizes stay a list."""
    return samples


def detection_task(
    config: CocoConfig,
    protocol: DetectionProtocol,
    detector: Detector,
    backbone: Backbone,
    train: CocoSplit,
    chosen: np.ndarray,
    accelerator: Accelerator,
    evaluate: Callable[[int], Evaluation],
) -> SupervisedTask:
    """The training as ``fit`` takes it."""
    per_epoch = len(chosen) // protocol.batch_size
    total = max(1, round(protocol.epochs * per_epoch))
    drops = [round(epoch * per_epoch) for epoch in protocol.drops]
    groups = layer_decay_groups(
        detector, depth_of(backbone), protocol.layer_decay, protocol.weight_decay
    )
    if protocol.warmup_steps >= total and accelerator.is_main_process:
        print(
            f"warning: the warm-up of {protocol.warmup_steps} steps is no shorter than the training "
            f"({total}): lower --warmup_steps",
            file=sys.stderr,
        )

    def lr_at(step: int) -> float:
        rate = step_decay(step, protocol.lr, drops)
        return warmed_up(step, rate, protocol.warmup_steps, protocol.warmup_ratio)

    return make_task(
        config,
        accelerator,
        detector,
        groups,
        sample=TrainSample(train, chosen, protocol, len(backbone.mean)),
        collate=keep,
        images=len(chosen),
        batch_size=protocol.batch_size,
        total_steps=total,
        lr=protocol.lr,
        schedule=lr_at,
        to_device=lambda examples: to_device(examples, backbone, accelerator.device),
        measure=evaluate,
        headline="box/AP",
        pin_memory=False,
        clip=protocol.clip,
    )


def to_device(examples: list[Example], backbone: Backbone, device: torch.device) -> DetectionBatch:
    """Examples as the detector takes them; normalised with the backbone's own mean and deviation."""
    images = [normalise(e.image[None].to(device), backbone)[0] for e in examples]
    targets = [
        {"boxes": e.boxes.to(device), "labels": e.labels.to(device), "masks": e.masks.to(device)}
        for e in examples
    ]
    return DetectionBatch(images, targets)


class Evaluator:
    """Detects on all images of a split, each once over all processes, and measures."""

    def __init__(
        self,
        detector: Detector,
        split: CocoSplit,
        protocol: DetectionProtocol,
        backbone: Backbone,
        accelerator: Accelerator,
        out: Path,
        config: CocoConfig,
    ) -> None:
        self.detector, self.split, self.protocol = detector, split, protocol
        self.backbone, self.accelerator = backbone, accelerator
        self.out, self.config = out, config

    def __call__(self, step: int) -> Evaluation:
        """Writes predictions and pictures; every process gets the same numbers."""
        boxes, masks = self.detect()
        answer: list[Any] = [None]
        if self.accelerator.is_main_process:
            for name, rows in (("bbox", boxes), ("segm", masks)):
                if rows is None:
                    continue
                write_text(self.out / "predictions" / f"{name}.json", json.dumps(rows))
            truth = self.split.ground_truth()
            metrics, classes = coco_metrics(truth, boxes, masks)
            self.picture(step, boxes, masks, metrics)
            details = {"classes": classes, "detections": len(boxes), "images": len(self.split)}
            details["objects"] = objects_of(truth)
            answer = [Evaluation(metrics, details)]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(answer)
        evaluation: Evaluation = answer[0]
        return evaluation

    def detect(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
        """All detections in COCO's format, in the order of the images; no masks without a mask head."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        found: list[tuple[int, Any]] = []
        said = time.perf_counter()
        # one image at a time: padding takes part in attention, so neighbours would change the answer
        for ((index, image),) in each_once(
            EvalSample(self.split, self.protocol, len(self.backbone.mean)),
            keep,
            range(len(self.split)),
            batch_size=1,
            rank=rank,
            world=world,
            workers=self.config.workers,
            timeout_s=self.config.timeout_s,
        ):
            normal = normalise(image[None].to(self.accelerator.device), self.backbone)[0]
            with self.accelerator.autocast():
                (answer,) = self.detector(DetectionBatch([normal]))
            resized = (image.shape[1], image.shape[2])
            split = self.split
            rows = to_coco(
                answer, int(split.ids[index]), split.category_ids, resized, split.sizes[index]
            )
            found.append((index, rows))
            if time.perf_counter() - said > SAY_EVERY and self.accelerator.is_main_process:
                said = time.perf_counter()
                print(f"evaluating: {len(found) * world} of {len(split)} images", file=sys.stderr)
        if world > 1:
            found = gather_object(found)
        found.sort(key=lambda item: item[0])
        if [index for index, _ in found] != list(range(len(self.split))):
            raise RuntimeError(f"{len(found)} answers for {len(self.split)} images")
        boxes, masks = ([d for _, rows in found for d in rows[kind]] for kind in (0, 1))
        return boxes, masks if self.split.has_masks else None

    def picture(
        self,
        step: int,
        boxes: list[dict[str, Any]],
        masks: list[dict[str, Any]] | None,
        metrics: dict[str, float],
    ) -> None:
        """The first images with what is there and what was found."""
        if not self.config.pictures:
            return
        title = f"step {step}: " + ", ".join(
            f"{kind} AP {metrics[f'{kind}/AP']:.1f}"
            for kind in ("box", "mask")
            if f"{kind}/AP" in metrics
        )
        path = self.out / "pictures" / f"detections_step_{step:08d}.png"
        shown = range(min(self.config.pictures, len(self.split)))
        channels = len(self.backbone.mean)
        detection_picture(path, self.split, shown, boxes, masks, title, channels)
