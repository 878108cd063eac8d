"""The detection protocols with every number (spec section 7), and the settings of a user."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from cmt_mae.core.errors import InputError
from cmt_mae.core.presets import OF_PRESET, given_fields
from cmt_mae.core.refusals import refusal
from cmt_mae.core.settings import (
    Amount,
    Count,
    CountOrNone,
    Factor,
    PartOf,
    Positive,
    Share,
    check_fields,
    resume_safe,
)
from cmt_mae.engine.task_settings import TaskSettings
from cmt_mae.evaluate.detection.vitdet import default_global_blocks
from cmt_mae.evaluate.pyramid import default_taps

PresetName = Literal["1x", "1x-ibot", "1x-cae", "vitdet", "quick"]


@dataclass(kw_only=True)
class DetectionProtocol:
    """Every number of a detection protocol; those left out are the preset's."""

    neck: Literal["taps", "simple"] = OF_PRESET
    """taps: four taps and an FPN. simple: ViTDet's windowed ViT and pyramid of the last map."""
    taps: tuple[CountOrNone, ...] = OF_PRESET
    """0-based blocks whose maps are taken. Default: 3 5 7 11 of 12, 7 11 15 23 of 24, else quarters."""
    window: Count = OF_PRESET
    """Side of the attention windows in tokens (neck simple)."""
    global_blocks: tuple[CountOrNone, ...] = OF_PRESET
    """0-based blocks with global attention (neck simple). Default: the last of each quarter."""
    relative_positions: bool = OF_PRESET
    """Decomposed relative positions, zeros at the start (neck simple)."""
    channels: Count = OF_PRESET
    """Of the pyramid and the heads' convolutions."""
    hidden: Count = OF_PRESET
    """Width of the box head's linear layers."""
    norm: Literal["bn", "ln", "none"] = OF_PRESET
    """bn: in the box head, over all processes. ln: in FPN, box and mask head."""
    rpn_convs: Count = OF_PRESET
    """Convolutions of the region proposal network."""
    box_head: Literal["4conv1fc", "shared2fc"] = OF_PRESET
    """Four convolutions and a linear layer, or two linear layers."""
    box_loss: Literal["giou", "l1", "smooth_l1"] = OF_PRESET
    """giou: on decoded boxes; l1, smooth_l1: on encoded offsets."""
    box_loss_weight: Amount = OF_PRESET
    """Weight of the box loss."""
    anchors: tuple[Count, Count, Count, Count, Count] = OF_PRESET
    """Sides of the anchors in pixels, one for each of the five maps."""
    proposals: Count = OF_PRESET
    """Boxes per image that the RPN hands on."""
    rpn_samples: Count = OF_PRESET
    """Anchors per image that the RPN's loss is taken on."""
    roi_samples: Count = OF_PRESET
    """Boxes per image that the heads' losses are taken on."""
    epochs: Positive = OF_PRESET
    """Passes over the training images."""
    batch_size: Count = OF_PRESET
    """Images a step, over all processes."""
    lr: Positive = OF_PRESET
    """Peak learning rate, for this batch size; it is not scaled."""
    weight_decay: Amount = OF_PRESET
    """Of AdamW."""
    layer_decay: Factor = OF_PRESET
    """Factor of the learning rate from one block to the one below it. vitdet: .8 from 24 blocks on."""
    drop_path: PartOf = OF_PRESET
    """Stochastic depth of the last block. vitdet: .4 from 24 blocks on."""
    drops: tuple[Amount, ...] = OF_PRESET
    """Epochs at which the learning rate falls to a tenth."""
    warmup_steps: CountOrNone = OF_PRESET
    """Steps of linear warm-up."""
    warmup_ratio: Amount = OF_PRESET
    """Share of the rate at step 0."""
    clip: Amount = OF_PRESET
    """Largest norm of the gradient; 0: no limit."""
    augment: Literal["multiscale", "lsj"] = OF_PRESET
    """multiscale: random short side and DETR's crop. lsj: large-scale jitter on a fixed square."""
    short_sides: tuple[Count, ...] = OF_PRESET
    """Short sides of training pictures (multiscale)."""
    longest: Count = OF_PRESET
    """Their longest side."""
    crop_shorts: tuple[Count, ...] = OF_PRESET
    """Short sides before DETR's crop; empty (--crop_shorts=[]): no crop."""
    crop_range: tuple[Count, Count] = OF_PRESET
    """Smallest and largest side of that crop."""
    lsj_size: Count = OF_PRESET
    """Side of the square (lsj); test pictures are padded to it too."""
    lsj_scale: tuple[Positive, Positive] = OF_PRESET
    """Smallest and largest scale of the jitter."""
    test_short: Count = OF_PRESET
    """Short side of test pictures."""
    test_longest: Count = OF_PRESET
    """Longest side of test pictures."""
    empty_images: bool = OF_PRESET
    """Train on images without boxes too; they are always evaluated."""
    score_threshold: Share = OF_PRESET
    """Detections below are dropped."""
    nms_threshold: Share = OF_PRESET
    """IoU above which the weaker of two boxes of a class is dropped."""


ONE_X: dict[str, Any] = {
    "neck": "taps", "taps": (), "window": 14, "global_blocks": (), "relative_positions": True,
    "channels": 256, "hidden": 1024, "norm": "bn", "rpn_convs": 1, "box_head": "4conv1fc",
    "box_loss": "giou", "box_loss_weight": 10.0, "anchors": (32, 64, 128, 256, 512), "proposals": 1000,
    "rpn_samples": 256, "roi_samples": 512, "epochs": 12.0, "batch_size": 16, "lr": 2e-4,
    "weight_decay": 0.05, "layer_decay": 0.75, "drop_path": 0.2, "drops": (8.0, 11.0), "warmup_steps": 500,
    "warmup_ratio": 0.001, "clip": 0.0, "augment": "multiscale", "short_sides": tuple(range(480, 801, 32)),
    "longest": 1333, "crop_shorts": (400, 500, 600), "crop_range": (384, 600), "lsj_size": 1024,
    "lsj_scale": (0.1, 2.0), "test_short": 800, "test_longest": 1333, "empty_images": False,
    "score_threshold": 0.05, "nms_threshold": 0.5,
}  # fmt: skip
VITDET = {
    "neck": "simple", "norm": "ln", "rpn_convs": 2, "box_loss": "l1", "box_loss_weight": 1.0,
    "epochs": 100.0, "batch_size": 64, "lr": 1e-4, "weight_decay": 0.1, "layer_decay": 0.7,
    "drop_path": 0.1, "drops": (88.889, 96.296), "warmup_steps": 250, "augment": "lsj", "test_short": 1024,
    "test_longest": 1024,
}  # fmt: skip
QUICK = {
    "channels": 64, "hidden": 256, "norm": "none", "box_head": "shared2fc", "box_loss": "l1",
    "box_loss_weight": 1.0, "anchors": (8, 16, 32, 64, 128), "proposals": 100, "rpn_samples": 64,
    "roi_samples": 64, "epochs": 6.0, "batch_size": 4, "lr": 3e-4, "drop_path": 0.0, "drops": (5.0,),
    "warmup_steps": 10, "warmup_ratio": 0.1, "clip": 5.0, "short_sides": (80, 96, 112), "longest": 160,
    "crop_shorts": (), "test_short": 96, "test_longest": 160, "empty_images": True,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "1x": ONE_X,
    "1x-ibot": ONE_X | {"lr": 1e-4},
    "1x-cae": ONE_X | {"lr": 3e-4, "batch_size": 32, "drops": (9.0, 11.0)},
    "vitdet": ONE_X | VITDET,
    "quick": ONE_X | QUICK,
}
VITDET_LARGE = {"layer_decay": 0.8, "drop_path": 0.4}
"""From 24 blocks on."""


def published(name: str, depth: int = 12) -> DetectionProtocol:
    """The protocol of this name for a ViT of this depth. Raises InputError for an unknown name."""
    if name not in PRESETS:
        raise InputError(refusal("preset is", name, PresetName))
    return DetectionProtocol(
        **PRESETS[name] | (VITDET_LARGE if name == "vitdet" and depth >= 24 else {})
    )


# What is alike in all protocols, and where torchvision's parts leave the published ones.
COMMON = {
    "optimizer": "AdamW (.9, .999); 1-D parameters, biases, positions and class token do not decay",
    "lr_scale": "layer decay on the ViT; pyramid, FPN and heads at 1",
    "schedule": "linear warm-up by steps, a tenth at every drop; the last epoch counts",
    "selected": "last epoch",
    "evaluation": "COCO AP (faster-coco-eval), at most 100 detections an image, one image at a time",
    "rpn": "IoU .7 / .3, NMS .7, smooth L1 with beta 1/9 (the published ones: L1)",
    "roi_align": "aligned, adaptive sampling; 7x7 boxes, 14x14 masks",
    "masks": "28x28, per class; training masks as bitmaps, resized to the nearest pixel",
    "resize": "bilinear, antialiased (mmdetection: not antialiased)",
    "batches": "in random order, not grouped by aspect ratio",
}
DIFFERS = {
    "1x-ibot": ["iBOT's rate 1e-4 belongs to a Cascade Mask R-CNN; this is a plain Mask R-CNN"],
    "vitdet": ["bias terms do not decay (ViTDet: only norms and positions do not)"],
    "quick": ["no published protocol: small pictures, small heads, few epochs"],
}


@dataclass(kw_only=True)
class CocoConfig(TaskSettings, DetectionProtocol):
    """Settings of COCO detection and instance segmentation. Those left out are the preset's."""

    preset: PresetName = "1x"
    """1x: the paper's 12 epochs at rate 2e-4 (taps, FPN, 4conv1fc, GIoU). 1x-ibot, 1x-cae: the same at
    1e-4, and at 3e-4 with a batch of 32. vitdet: windowed attention, simple pyramid, 100 epochs at 1024
    pixels. quick: 6 epochs on pictures of 96 pixels, for a CPU."""
    eval_split: Literal["val", "train"] = "val"
    """Images that are evaluated; train: whether the training images can be learnt at all."""
    save_memory: bool = resume_safe(False)
    """Compute the ViT's blocks again in the backward pass instead of keeping their insides."""


def resolve(config: CocoConfig, depth: int) -> tuple[DetectionProtocol, list[str]]:
    """The protocol with the user's changes, for a ViT of this depth, and the names of what was changed.

    Raises InputError for an unknown preset or an impossible number.
    """
    protocol, given = published(config.preset, depth), given_fields(config, DetectionProtocol)
    changed = sorted(k for k, v in given.items() if v != getattr(protocol, k))
    protocol = replace(protocol, **given)
    check(protocol)
    if protocol.neck == "taps" and not protocol.taps:
        protocol = replace(protocol, taps=default_taps(depth))
    if protocol.neck == "simple" and not protocol.global_blocks:
        protocol = replace(protocol, global_blocks=default_global_blocks(depth))
    return protocol, changed


def check(protocol: DetectionProtocol) -> None:
    """Raise InputError for numbers that have no meaning, alone or together."""
    check_fields(protocol)
    if not protocol.short_sides:
        raise InputError("--short_sides is empty: give a number of pixels or more than one")
    for name, (low, high) in (
        ("lsj_scale", protocol.lsj_scale),
        ("crop_range", protocol.crop_range),
    ):
        if low > high:
            raise InputError(f"--{name} is [{low}, {high}]: give the smaller one first")


# Settings that only one choice looks at: left out of the description of the other.
ONLY = {
    ("neck", "taps"): ("taps",),
    ("neck", "simple"): ("window", "global_blocks", "relative_positions"),
    ("augment", "multiscale"): ("short_sides", "longest", "crop_shorts", "crop_range"),
    ("augment", "lsj"): ("lsj_size", "lsj_scale"),
}


def result_protocol(
    config: CocoConfig,
    protocol: DetectionProtocol,
    changed: list[str],
    precision: str,
    masks: bool = True,
) -> dict[str, Any]:
    """``Result.protocol``: every setting that moves the number. precision: fp32 or bf16. masks: of the data."""
    on_train = config.eval_split == "train"
    unused = {n for (k, v), names in ONLY.items() if getattr(protocol, k) != v for n in names}
    return {
        "name": config.preset + ("-changed" if changed else "") + ("-on-train" if on_train else ""),
        "headline": "box/AP",
        "detector": "Mask R-CNN, torchvision's RPN and RoI heads",
        "eval_split": config.eval_split,
        "changed": changed,
        **{k: v for k, v in asdict(protocol).items() if k not in unused},
        **COMMON,
        "precision": precision,
        "differs": DIFFERS.get(config.preset, []),
    } | ({} if masks else {"masks": "none in the data: no mask head, box AP alone"})
