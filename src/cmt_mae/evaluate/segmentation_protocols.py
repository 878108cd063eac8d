"""The ADE20K recipes that the field quotes (specification 8), and how they fit a data set."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from cmt_mae.core.errors import InputError

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


@dataclass(frozen=True)
class Recipe:
    """Every number that moves a segmentation. Defaults are common to the published recipes."""

    lr: float
    layer_decay: float
    iterations: int = 160_000
    batch_size: int = 16
    warmup: int = 1500
    """Iterations over which the rate grows from ``warmup_ratio`` of itself."""
    warmup_ratio: float = 1e-6
    power: float = 1.0
    weight_decay: float = 0.05
    drop_path: float = 0.1
    crop_size: int = 512
    """Side of training crops and of windows at test time."""
    stride: int = 341
    """Of the windows at test time."""
    shorter_side: int = 512
    longer_side: int = 2048
    """An image is resized to fit both, at test time and (times a random ratio) in training."""
    smallest_ratio: float = 0.5
    largest_ratio: float = 2.0
    cat_max_ratio: float = 0.75
    channels: int = 768
    """Of UPerNet."""
    dropout: float = 0.1
    auxiliary_weight: float = 0.4
    relative_bias: bool = False
    layer_scale: float = 0.0

    def check(self) -> None:
        """Raise InputError for a number that has no meaning."""
        positive = (
            "lr", "layer_decay", "iterations", "batch_size", "crop_size", "stride", "shorter_side",
            "longer_side", "smallest_ratio", "channels", "cat_max_ratio",
        )  # fmt: skip
        for name in positive:
            if not getattr(self, name) > 0:
                raise InputError(f"ade20k: {name} is {getattr(self, name)}; it must be above 0")
        for name in (
            "warmup",
            "weight_decay",
            "drop_path",
            "auxiliary_weight",
            "layer_scale",
            "dropout",
        ):
            if not getattr(self, name) >= 0:
                raise InputError(f"ade20k: {name} is {getattr(self, name)}; it must be 0 or more")
        for name in ("drop_path", "dropout"):
            if getattr(self, name) >= 1:
                raise InputError(f"ade20k: {name} is {getattr(self, name)}; it must be below 1")
        if self.layer_decay > 1:
            raise InputError(f"ade20k: layer_decay is {self.layer_decay}; it is 1 at most")
        if self.stride > self.crop_size:
            raise InputError(
                f"ade20k: windows of {self.crop_size} every {self.stride} pixels leave gaps; give a stride of "
                f"{self.crop_size} at most"
            )
        if self.longer_side < self.shorter_side or self.largest_ratio < self.smallest_ratio:
            raise InputError(
                f"ade20k: longer_side {self.longer_side} and largest_ratio {self.largest_ratio} may not be below "
                f"shorter_side {self.shorter_side} and smallest_ratio {self.smallest_ratio}"
            )
        if self.warmup >= self.iterations:
            raise InputError(
                f"ade20k: a warm-up of {self.warmup} iterations leaves none of {self.iterations} to train; "
                "shorten it or train longer"
            )


def published(name: PresetName) -> Recipe:
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
    paper = Recipe(lr=3e-5, layer_decay=0.9)
    if name in ("paper", "paper_ft"):
        return paper
    if name == "mae":
        return replace(paper, lr=1e-4, layer_decay=0.65, relative_bias=True, layer_scale=1.0)
    if name == "quick":
        return Recipe(
            lr=2e-3,
            layer_decay=0.65,
            iterations=400,
            batch_size=4,
            warmup=20,
            drop_path=0.0,
            crop_size=128,
            stride=85,
            shorter_side=128,
            longer_side=512,
            channels=64,
        )
    raise InputError(f"unknown preset {name!r}; use paper, paper_ft, mae or quick")


def resolve(config: Ade20kConfig, n: int) -> Recipe:
    """The preset with the user's numbers in their places, for ``n`` training images.

    Given alone, crop_size takes stride (2/3), shorter_side (1) and longer_side (4) with it, and iterations takes
    the warm-up's share. The batch is at most ``n``.

    Raises:
        InputError: a number without meaning, or fewer than 2 training images.
    """
    own = published(config.preset)
    given: dict[str, Any] = {}
    for field in fields(Recipe):
        value = getattr(config, field.name, None)
        if value is not None:
            given[field.name] = value
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
    recipe.check()
    if recipe.batch_size > n:
        raise InputError(
            f"ade20k: a batch of {recipe.batch_size} and {n} training images; give a smaller batch_size"
        )
    return recipe


def differences(config: Ade20kConfig, recipe: Recipe, width: int, padded: int) -> list[str]:
    """In words, where this run leaves the published recipe. padded: side of a window in whole patches."""
    own, said = published(config.preset), []
    if config.preset != "quick" and width != 768:
        said.append(f"numbers of ViT-B for a network of width {width}: the paper has none for it")
    for field in fields(Recipe):
        mine, theirs = getattr(recipe, field.name), getattr(own, field.name)
        if mine != theirs:
            said.append(f"{field.name} {mine} instead of {theirs}")
    if padded != recipe.crop_size:
        said.append(f"crops and windows padded from {recipe.crop_size} to {padded}: whole patches")
    return said
