"""The ADE20K recipes that the field quotes (specification 8), and how they fit a data set."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from cmt_mae.core.errors import InputError
from cmt_mae.core.presets import OF_PRESET, given_fields
from cmt_mae.core.refusals import refusal
from cmt_mae.core.settings import Amount, Count, CountOrNone, Factor, PartOf, Positive, check_fields

if TYPE_CHECKING:
    from cmt_mae.evaluate.segmentation import Ade20kConfig

PresetName = Literal["paper", "paper_ft", "mae", "quick"]

WEIGHTS = {
    "paper": "self-supervised weights as given",
    "paper_ft": "weights fine-tuned on ImageNet-1K, as the caller says: numbers are those of preset paper",
    "mae": "self-supervised weights as given, with relative positions and layer scale added",
    "quick": "weights as given",
}
"""What a preset is meant to start from."""


@dataclass(kw_only=True)
class SegmentationProtocol:
    """Every number that moves a segmentation; those left out are the preset's."""

    lr: Positive = OF_PRESET
    """The highest learning rate, of the head; blocks of the backbone have less (layer_decay)."""
    layer_decay: Factor = OF_PRESET
    """The rate of a block is that of the next one times this."""
    iterations: Count = OF_PRESET
    """Optimizer steps. Given alone, the warm-up keeps its share."""
    batch_size: Count = OF_PRESET
    """Images a step, over all processes."""
    warmup: CountOrNone = OF_PRESET
    """Iterations over which the rate grows from almost 0 (warmup_ratio of itself)."""
    warmup_ratio: Amount = OF_PRESET
    """Share of the rate at the first iteration."""
    power: Amount = OF_PRESET
    """Of the polynomial by which the rate falls."""
    weight_decay: Amount = OF_PRESET
    """AdamW's; none for vectors and biases."""
    drop_path: PartOf = OF_PRESET
    """Stochastic depth of the last block; it grows linearly from 0 at the first."""
    crop_size: Count = OF_PRESET
    """Side of training crops and of windows. Given alone, stride, shorter_side and longer_side follow it."""
    stride: Count = OF_PRESET
    """Pixels from one window to the next at test time. Default: 2/3 of the window."""
    shorter_side: Count = OF_PRESET
    """Images are resized until this side, or longer_side, fits, in training times a random ratio. Default:
    crop_size."""
    longer_side: Count = OF_PRESET
    """Default: 4 x shorter_side."""
    smallest_ratio: Positive = OF_PRESET
    """Least random ratio by which training images are resized."""
    largest_ratio: Positive = OF_PRESET
    """Largest one."""
    cat_max_ratio: Factor = OF_PRESET
    """A training crop is drawn again where one class fills a larger share of it."""
    channels: Count = OF_PRESET
    """Of UPerNet's maps."""
    dropout: PartOf = OF_PRESET
    """Before the head's last layer."""
    auxiliary_weight: Amount = OF_PRESET
    """Of the loss of the auxiliary head."""
    relative_bias: bool = OF_PRESET
    """Trainable relative position biases on top of the backbone's own positions."""
    layer_scale: Amount = OF_PRESET
    """First value of trainable factors of every block's branches; 0: none are added."""


PAPER: dict[str, Any] = {
    "lr": 3e-5, "layer_decay": 0.9, "iterations": 160_000, "batch_size": 16, "warmup": 1500, "warmup_ratio": 1e-6,
    "power": 1.0, "weight_decay": 0.05, "drop_path": 0.1, "crop_size": 512, "stride": 341, "shorter_side": 512,
    "longer_side": 2048, "smallest_ratio": 0.5, "largest_ratio": 2.0, "cat_max_ratio": 0.75, "channels": 768,
    "dropout": 0.1, "auxiliary_weight": 0.4, "relative_bias": False, "layer_scale": 0.0,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "paper": PAPER,
    "paper_ft": PAPER,
    "mae": PAPER | {"lr": 1e-4, "layer_decay": 0.65, "relative_bias": True, "layer_scale": 1.0},
    "quick": PAPER | {
        "lr": 2e-3, "layer_decay": 0.65, "iterations": 400, "batch_size": 4, "warmup": 20, "drop_path": 0.0,
        "crop_size": 128, "stride": 85, "shorter_side": 128, "longer_side": 512, "channels": 64,
    },
}  # fmt: skip


def check(recipe: SegmentationProtocol) -> None:
    """Raise InputError for numbers that have no meaning, alone or together."""
    check_fields(recipe)
    if recipe.stride > recipe.crop_size:
        raise InputError(
            f"ade20k: windows of {recipe.crop_size} every {recipe.stride} pixels leave gaps; give a stride of "
            f"{recipe.crop_size} at most"
        )
    if recipe.longer_side < recipe.shorter_side or recipe.largest_ratio < recipe.smallest_ratio:
        raise InputError(
            f"ade20k: longer_side {recipe.longer_side} and largest_ratio {recipe.largest_ratio} may not be below "
            f"shorter_side {recipe.shorter_side} and smallest_ratio {recipe.smallest_ratio}"
        )
    if recipe.warmup >= recipe.iterations:
        raise InputError(
            f"ade20k: a warm-up of {recipe.warmup} iterations leaves none of {recipe.iterations} to train; "
            "shorten it or train longer"
        )


def published(name: PresetName) -> SegmentationProtocol:
    """The recipe of this name.

    paper: the paper's numbers, the rest from BEiT's file that has the same (upernet_beit_base_12_512_slide_160k
    _ade20k_pt2ft.py). paper_ft: the same numbers; that file is meant for a backbone that was fine-tuned on
    ImageNet-1K, so that is what ``--backbone`` should be (specification 0.3 item 4). mae: the recipe that
    reproduced MAE's number (implus/mae_segmentation): relative positions and layer scale added, higher rate,
    stronger layer decay. quick: ours, for small sets on a few cores: a narrow head learns slowly, so many small
    steps at a high rate (of the head; layer decay keeps the backbone's low).

    Raises:
        InputError: unknown name.
    """
    if name not in PRESETS:
        raise InputError(refusal("preset is", name, PresetName))
    return SegmentationProtocol(**PRESETS[name])


def resolve(config: Ade20kConfig, n: int) -> SegmentationProtocol:
    """The preset with the user's numbers in their places, for ``n`` training images.

    Given alone, crop_size takes stride (2/3), shorter_side (1) and longer_side (4) with it, and iterations takes
    the warm-up's share. The batch is at most ``n``.

    Raises:
        InputError: a number without meaning, or fewer than 2 training images.
    """
    own = published(config.preset)
    given = given_fields(config, SegmentationProtocol)
    if "crop_size" in given:
        given.setdefault("stride", given["crop_size"] * 2 // 3)
        given.setdefault("shorter_side", given["crop_size"])
    if "shorter_side" in given:
        given.setdefault("longer_side", 4 * given["shorter_side"])
    if "iterations" in given:
        given.setdefault("warmup", own.warmup * given["iterations"] // own.iterations)
    if n < 2:
        raise InputError(f"ade20k: {n} training image(s); it needs 2 or more")
    given.setdefault("batch_size", min(own.batch_size, n))
    recipe = replace(own, **given)
    check(recipe)
    if recipe.batch_size > n:
        raise InputError(
            f"ade20k: a batch of {recipe.batch_size} and {n} training images; give a smaller batch_size"
        )
    return recipe


def differences(
    config: Ade20kConfig, recipe: SegmentationProtocol, width: int, padded: int
) -> list[str]:
    """In words, where this run leaves the published recipe. padded: side of a window in whole patches."""
    own, said = published(config.preset), []
    if config.preset != "quick" and width != 768:
        said.append(f"numbers of ViT-B for a network of width {width}: the paper has none for it")
    for field in fields(SegmentationProtocol):
        mine, theirs = getattr(recipe, field.name), getattr(own, field.name)
        if mine != theirs:
            said.append(f"{field.name} {mine} instead of {theirs}")
    if padded != recipe.crop_size:
        said.append(f"crops and windows padded from {recipe.crop_size} to {padded}: whole patches")
    return said
