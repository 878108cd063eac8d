"""The detection protocols with every number (spec section 7), and the settings of a user."""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from cmt_mae.core.errors import InputError
from cmt_mae.engine.task_settings import TaskSettings
from cmt_mae.evaluate.detection.vitdet import default_global_blocks
from cmt_mae.evaluate.pyramid import default_taps

Preset = Literal["1x", "1x-ibot", "1x-cae", "vitdet", "quick"]


@dataclass(frozen=True)
class Protocol:
    """Every number of one protocol. The defaults are those of ``1x``. Meanings: CocoConfig."""

    neck: str = "taps"
    taps: tuple[int, ...] = ()
    window: int = 14
    global_blocks: tuple[int, ...] = ()
    relative_positions: bool = True
    channels: int = 256
    hidden: int = 1024
    norm: str = "bn"
    rpn_convs: int = 1
    box_head: str = "4conv1fc"
    box_loss: str = "giou"
    box_loss_weight: float = 10.0
    anchors: tuple[int, ...] = (32, 64, 128, 256, 512)
    proposals: int = 1000
    rpn_samples: int = 256
    roi_samples: int = 512
    epochs: float = 12.0
    batch_size: int = 16
    lr: float = 2e-4
    weight_decay: float = 0.05
    layer_decay: float = 0.75
    drop_path: float = 0.2
    drops: tuple[float, ...] = (8.0, 11.0)
    warmup_steps: int = 500
    warmup_ratio: float = 0.001
    clip: float = 0.0
    augment: str = "multiscale"
    short_sides: tuple[int, ...] = tuple(range(480, 801, 32))
    longest: int = 1333
    crop_shorts: tuple[int, ...] = (400, 500, 600)
    crop_range: tuple[int, int] = (384, 600)
    lsj_size: int = 1024
    lsj_scale: tuple[float, float] = (0.1, 2.0)
    test_short: int = 800
    test_longest: int = 1333
    empty_images: bool = False
    score_threshold: float = 0.05
    nms_threshold: float = 0.5


_VITDET = Protocol(
    neck="simple", norm="ln", rpn_convs=2, box_loss="l1", box_loss_weight=1.0,
    epochs=100.0, batch_size=64, lr=1e-4, weight_decay=0.1, layer_decay=0.7, drop_path=0.1,
    drops=(88.889, 96.296), warmup_steps=250, augment="lsj", test_short=1024, test_longest=1024,
)  # fmt: skip

PRESETS: dict[str, Protocol] = {
    "1x": Protocol(),
    "1x-ibot": Protocol(lr=1e-4),
    "1x-cae": Protocol(lr=3e-4, batch_size=32, drops=(9.0, 11.0)),
    "vitdet": _VITDET,
    "quick": Protocol(
        channels=64, hidden=256, norm="none", box_head="shared2fc", box_loss="l1", box_loss_weight=1.0,
        anchors=(8, 16, 32, 64, 128), proposals=100, rpn_samples=64, roi_samples=64, epochs=6.0,
        batch_size=4, lr=3e-4, drop_path=0.0, drops=(5.0,), warmup_steps=10, warmup_ratio=0.1, clip=5.0,
        short_sides=(80, 96, 112), longest=160, crop_shorts=(), test_short=96, test_longest=160,
        empty_images=True,
    ),
}  # fmt: skip

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
class CocoConfig(TaskSettings):
    """Settings of COCO detection and instance segmentation. Those left out are the preset's."""

    preset: Preset = "1x"
    """1x: the paper's 12 epochs at rate 2e-4 (taps, FPN, 4conv1fc, GIoU). 1x-ibot, 1x-cae: the same at
    1e-4, and at 3e-4 with a batch of 32. vitdet: windowed attention, simple pyramid, 100 epochs at 1024
    pixels. quick: 6 epochs on pictures of 96 pixels, for a CPU."""
    eval_split: Literal["val", "train"] = "val"
    """Images that are evaluated; train: whether the training images can be learnt at all."""
    neck: Literal["taps", "simple"] | None = None
    """taps: four taps and an FPN. simple: ViTDet's windowed ViT and pyramid of the last map."""
    taps: tuple[int, ...] | None = None
    """0-based blocks whose maps are taken. Default: 3 5 7 11 of 12, 7 11 15 23 of 24, else quarters."""
    window: int | None = None
    """Side of the attention windows in tokens (neck simple)."""
    global_blocks: tuple[int, ...] | None = None
    """0-based blocks with global attention (neck simple). Default: the last of each quarter."""
    relative_positions: bool | None = None
    """Decomposed relative positions, zeros at the start (neck simple)."""
    channels: int | None = None
    """Of the pyramid and the heads' convolutions."""
    hidden: int | None = None
    """Width of the box head's linear layers."""
    norm: Literal["bn", "ln", "none"] | None = None
    """bn: in the box head, over all processes. ln: in FPN, box and mask head."""
    rpn_convs: int | None = None
    """Convolutions of the region proposal network."""
    box_head: Literal["4conv1fc", "shared2fc"] | None = None
    """Four convolutions and a linear layer, or two linear layers."""
    box_loss: Literal["giou", "l1", "smooth_l1"] | None = None
    """giou: on decoded boxes; l1, smooth_l1: on encoded offsets."""
    box_loss_weight: float | None = None
    """Weight of the box loss."""
    anchors: tuple[int, ...] | None = None
    """Sides of the anchors in pixels, one for each of the five maps."""
    proposals: int | None = None
    """Boxes an image that the RPN hands on."""
    rpn_samples: int | None = None
    """Anchors an image that the RPN's loss is taken on."""
    roi_samples: int | None = None
    """Boxes an image that the heads' losses are taken on."""
    epochs: float | None = None
    """Passes over the training images."""
    batch_size: int | None = None
    """Images a step, over all processes."""
    lr: float | None = None
    """Peak learning rate, for this batch size; it is not scaled."""
    weight_decay: float | None = None
    """Of AdamW."""
    layer_decay: float | None = None
    """Factor of the learning rate from one block to the one below it. vitdet: .8 from 24 blocks on."""
    drop_path: float | None = None
    """Stochastic depth of the last block. vitdet: .4 from 24 blocks on."""
    drops: tuple[float, ...] | None = None
    """Epochs at which the learning rate falls to a tenth."""
    warmup_steps: int | None = None
    """Steps of linear warm-up."""
    warmup_ratio: float | None = None
    """Share of the rate at step 0."""
    clip: float | None = None
    """Largest norm of the gradient; 0: no limit."""
    augment: Literal["multiscale", "lsj"] | None = None
    """multiscale: random short side and DETR's crop. lsj: large-scale jitter on a fixed square."""
    short_sides: tuple[int, ...] | None = None
    """Short sides of training pictures (multiscale)."""
    longest: int | None = None
    """Their longest side."""
    crop_shorts: tuple[int, ...] | None = None
    """Short sides before DETR's crop; empty (--crop_shorts=[]): no crop."""
    crop_range: tuple[int, int] | None = None
    """Smallest and largest side of that crop."""
    lsj_size: int | None = None
    """Side of the square (lsj); test pictures are padded to it too."""
    lsj_scale: tuple[float, float] | None = None
    """Smallest and largest scale of the jitter."""
    test_short: int | None = None
    """Short side of test pictures."""
    test_longest: int | None = None
    """Longest side of test pictures."""
    empty_images: bool | None = None
    """Train on images without boxes too; they are always evaluated."""
    score_threshold: float | None = None
    """Detections below are dropped."""
    nms_threshold: float | None = None
    """IoU above which the weaker of two boxes of a class is dropped."""
    save_memory: bool = False
    """Compute the ViT's blocks again in the backward pass instead of keeping their insides."""


def resolve(config: CocoConfig, depth: int) -> tuple[Protocol, list[str]]:
    """The protocol with the user's changes, for a ViT of this depth, and the names of what was changed.

    Raises InputError for an unknown preset or an impossible number.
    """
    if config.preset not in PRESETS:
        raise InputError(f"preset '{config.preset}' is unknown: use {', '.join(PRESETS)}")
    protocol = PRESETS[config.preset]
    if config.preset == "vitdet" and depth >= 24:
        protocol = replace(protocol, layer_decay=0.8, drop_path=0.4)
    given = {
        f.name: getattr(config, f.name)
        for f in fields(Protocol)
        if getattr(config, f.name) is not None
    }
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    changed = sorted(k for k, v in given.items() if v != getattr(protocol, k))
    protocol = replace(protocol, **given)
    check(protocol)
    if protocol.neck == "taps" and not protocol.taps:
        protocol = replace(protocol, taps=default_taps(depth))
    if protocol.neck == "simple" and not protocol.global_blocks:
        protocol = replace(protocol, global_blocks=default_global_blocks(depth))
    if config.eval_split not in ("val", "train"):
        raise InputError(f"eval_split '{config.eval_split}' is unknown: use val or train")
    return protocol, changed


CHOICES = {
    "neck": ("taps", "simple"),
    "norm": ("bn", "ln", "none"),
    "box_head": ("4conv1fc", "shared2fc"),
    "box_loss": ("giou", "l1", "smooth_l1"),
    "augment": ("multiscale", "lsj"),
}


def check(protocol: Protocol) -> None:
    """InputError for a choice that does not exist or a number that cannot be."""
    for name, allowed in CHOICES.items():
        if getattr(protocol, name) not in allowed:
            raise InputError(
                f"{name} '{getattr(protocol, name)}' is unknown: use {', '.join(allowed)}"
            )
    for name in (
        "window", "channels", "hidden", "rpn_convs", "proposals", "rpn_samples", "roi_samples", "epochs",
        "batch_size", "lr", "longest", "lsj_size", "test_short", "test_longest",
    ):  # fmt: skip
        if getattr(protocol, name) <= 0:
            raise InputError(f"{name} must be positive, not {getattr(protocol, name)}")
    for name in (
        "weight_decay", "drop_path", "warmup_steps", "warmup_ratio", "clip", "box_loss_weight",
        "score_threshold", "nms_threshold",
    ):  # fmt: skip
        if getattr(protocol, name) < 0:
            raise InputError(f"{name} must not be negative")
    for name in ("drop_path", "score_threshold", "nms_threshold", "layer_decay"):
        if getattr(protocol, name) > 1 or (name == "drop_path" and protocol.drop_path == 1):
            raise InputError(f"{name} {getattr(protocol, name)} is too large")
    if protocol.layer_decay <= 0:
        raise InputError("layer_decay must be above 0 and at most 1")
    sides = [*protocol.short_sides, *protocol.crop_shorts, *protocol.crop_range, *protocol.anchors]
    if not protocol.short_sides or min(sides) <= 0 or len(protocol.anchors) != 5:
        raise InputError(
            "short_sides, crop_shorts, crop_range and the five anchors must be positive numbers of pixels"
        )
    low, high = protocol.lsj_scale
    if not 0 < low <= high or protocol.crop_range[0] > protocol.crop_range[1]:
        raise InputError("lsj_scale and crop_range are (smallest, largest), above 0")


# Settings that only one choice looks at: left out of the description of the other.
ONLY = {
    ("neck", "taps"): ("taps",),
    ("neck", "simple"): ("window", "global_blocks", "relative_positions"),
    ("augment", "multiscale"): ("short_sides", "longest", "crop_shorts", "crop_range"),
    ("augment", "lsj"): ("lsj_size", "lsj_scale"),
}


def describe(
    config: CocoConfig, protocol: Protocol, changed: list[str], precision: str, masks: bool = True
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
