"""The fine-tuning recipes that the field quotes (specification 6.3), and how they fit a set."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from cmt_mae.core.errors import InputError
from cmt_mae.core.presets import OF_PRESET, given_fields
from cmt_mae.core.refusals import refusal
from cmt_mae.core.settings import Amount, Count, Factor, PartOf, Positive, check_fields
from cmt_mae.evaluate.features import CENTRE_CROP

if TYPE_CHECKING:
    from cmt_mae.evaluate.finetune import FinetuneConfig

Pool = Literal["mean", "cls"]
PresetName = Literal["mae", "paper256", "milan", "dbot", "ibot", "quick"]

LARGE, HUGE = 1024, 1280
"""Widths from which a backbone takes the numbers published for ViT-L and ViT-H."""
FEW_STEPS = 500  # below so many optimizer steps a run is told of


@dataclass(kw_only=True)
class FinetuneProtocol:
    """Every number that moves a fine-tuning; those left out are the preset's."""

    epochs: Count = OF_PRESET
    """Passes over the training images. Given alone, the warm-up keeps its share."""
    batch_size: Count = OF_PRESET
    """Images a step, over all processes; at most the training images."""
    blr: Positive = OF_PRESET
    """Learning rate at a batch of 256: the rate is blr * batch_size / 256."""
    layer_decay: Factor = OF_PRESET
    """The rate of a block is that of the next one times this."""
    drop_path: PartOf = OF_PRESET
    """Stochastic depth of the last block; it grows linearly from 0 at the first."""
    warmup_epochs: Amount = OF_PRESET
    """Epochs over which the rate grows from 0."""
    min_lr: Amount = OF_PRESET
    """The rate at the end of the cosine."""
    weight_decay: Amount = OF_PRESET
    """AdamW's; none for vectors, positions and class token."""
    rand_augment: str = OF_PRESET
    """timm's text, like rand-m9-mstd0.5-inc1; or none."""
    mixup: Amount = OF_PRESET
    """Both parameters of the Beta distribution that images are blended by; 0: off."""
    cutmix: Amount = OF_PRESET
    """The same for rectangles that are exchanged; with both, each is taken half of the time."""
    smoothing: PartOf = OF_PRESET
    """Share of the label spread over all classes."""
    erasing: PartOf = OF_PRESET
    """Probability that a rectangle of an image is replaced by noise."""
    smallest_crop: Factor = OF_PRESET
    """Smallest share of an image that a random crop takes."""
    pool: Pool = OF_PRESET
    """mean: of the patch tokens, with a norm of its own (published); cls: the class token."""
    ema_decay: PartOf = OF_PRESET
    """Evaluate a running average of the weights besides, with this decay (0.9999; less for short runs); 0: no."""

    @property
    def lr(self) -> float:
        """The highest learning rate."""
        return self.blr * self.batch_size / 256

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed with each other."""
        return self.mixup > 0 or self.cutmix > 0


COMMON: dict[str, Any] = {
    "epochs": 100, "batch_size": 1024, "blr": 5e-4, "layer_decay": 0.65, "drop_path": 0.1, "warmup_epochs": 5,
    "min_lr": 1e-6, "weight_decay": 0.05, "rand_augment": "rand-m9-mstd0.5-inc1", "mixup": 0.8, "cutmix": 1.0,
    "smoothing": 0.1, "erasing": 0.25, "smallest_crop": 0.08, "pool": "mean", "ema_decay": 0.0,
}  # fmt: skip
"""MAE's for ViT-B; what a preset does not say is this."""
COMMON_LARGE = COMMON | {"epochs": 50, "blr": 1e-3, "layer_decay": 0.75, "drop_path": 0.2}
QUICK = {
    "epochs": 10, "batch_size": 32, "blr": 4e-3, "layer_decay": 0.75, "drop_path": 0.0, "warmup_epochs": 1,
    "rand_augment": "none", "mixup": 0.0, "cutmix": 0.0, "erasing": 0.0, "smallest_crop": 0.25,
}  # fmt: skip
# name -> what differs from MAE's numbers for ViT-B, and for ViT-L
PRESETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mae": ({}, {}),
    "paper256": ({"batch_size": 256}, {"batch_size": 256}),
    "milan": ({"blr": 1e-4}, {"epochs": 100, "blr": 1e-4}),
    "dbot": ({"blr": 3e-4, "layer_decay": 0.75}, {"blr": 3e-4, "drop_path": 0.25}),
    "ibot": ({"blr": 1e-3, "drop_path": 0.2, "warmup_epochs": 20}, {"drop_path": 0.4}),
    "quick": (QUICK, QUICK),
}
HUGE_DROP_PATH = 0.3  # MAE's for ViT-H, whose other numbers are ViT-L's


def published(name: PresetName, width: int) -> FinetuneProtocol:
    """The recipe for a ViT of this width: the ViT-L column from 1024 on, the ViT-B column below.

    MAE's own differs for ViT-H (from 1280 on) in its drop path alone. Nothing is published for smaller networks;
    they take ViT-B's numbers.

    mae: FINETUNE.md. paper256: the CMT-MAE paper's "batch size of 256", MAE's otherwise, so that the
    rate is blr (specification 0.3 item 3: it may mean the batch that rates refer to). milan, dbot: both lower
    the rate for backbones trained on features of CLIP. dbot leaves ViT-B's layer decay and drop path at its
    program's defaults, which are MAE's (.75 and .1). ibot: 4e-3 at its batch of 1024. quick: ours, for
    small sets on a few cores: few epochs, light augmentation.

    Raises:
        InputError: unknown name.
    """
    if name not in PRESETS:
        raise InputError(refusal("preset is", name, PresetName))
    large = width >= LARGE
    recipe = FinetuneProtocol(**(COMMON_LARGE if large else COMMON) | PRESETS[name][large])
    if width >= HUGE and "drop_path" not in PRESETS[name][1]:
        recipe.drop_path = HUGE_DROP_PATH
    return recipe


def eval_crop(size: tuple[int, int]) -> tuple[float, str]:
    """How test images are resized before the centre crop, relative to it, and that in words.

    MAE's build_transform: to 256/224 of the crop up to 224 pixels, above them to the crop itself.
    """
    if max(size) > 224:
        return 1.0, "centre crop, shorter side to the size, bicubic"
    return 256 / 224, CENTRE_CROP


def resolve(config: FinetuneConfig, width: int, n: int) -> FinetuneProtocol:
    """The preset with the user's numbers in their places, its batch limited to ``n`` training images.

    The warm-up keeps its share of the epochs when only those are given.

    Raises:
        InputError: a number without meaning, or fewer than 2 training images.
    """
    own = published(config.preset, width)
    recipe = replace(own, **given_fields(config, FinetuneProtocol))
    if config.epochs is not None and config.warmup_epochs is None:
        recipe = replace(recipe, warmup_epochs=own.warmup_epochs * config.epochs / own.epochs)
    check(recipe)
    return replace(recipe, batch_size=fit_batch(recipe.batch_size, n))


def check(recipe: FinetuneProtocol) -> None:
    """Raise InputError for a number that has no meaning."""
    check_fields(recipe)
    if recipe.warmup_epochs >= recipe.epochs:
        raise InputError(
            f"fine-tuning: a warm-up of {recipe.warmup_epochs:g} epochs leaves none of {recipe.epochs} "
            "to train; shorten it or train longer"
        )


def fit_batch(batch_size: int, n: int) -> int:
    """The batch for ``n`` images: ``batch_size``, or where they are fewer a round number up to ``n``.

    Round: a multiple of 64, 8 or 2, so that processes and micro-batches can share it, and the same for any
    number of them.

    Raises:
        InputError: fewer than 2 images.
    """
    if n < 2:
        raise InputError(f"fine-tuning: {n} training image(s); it needs 2 or more")
    if batch_size <= n:
        return batch_size
    unit = 64 if n >= 256 else 8 if n >= 32 else 2
    return n // unit * unit


def differences(config: FinetuneConfig, recipe: FinetuneProtocol, width: int, n: int) -> list[str]:
    """In words, where this run leaves the published recipe, and what to expect of that."""
    own, said = published(config.preset, width), []
    if config.preset != "quick" and width < 768:
        said.append(f"numbers of ViT-B for a network of width {width}: none are published for it")
    if config.preset == "ibot":
        said.append("one learning rate; iBOT's authors swept it")
    if recipe.batch_size != own.batch_size:
        why = f"{n} training images" if config.batch_size is None else "as asked"
        said.append(
            f"batch {recipe.batch_size} instead of {own.batch_size} ({why}); the learning rate is scaled with it"
        )
    for field in fields(FinetuneProtocol):
        name = field.name
        if name != "batch_size" and getattr(recipe, name) != getattr(own, name):
            said.append(f"{name} {getattr(recipe, name)} instead of {getattr(own, name)}")
    if config.frozen_layers:
        said.append(f"frozen_layers {config.frozen_layers}")
    steps = recipe.epochs * (n // recipe.batch_size)
    if steps < FEW_STEPS:
        said.append(
            f"{steps} optimizer steps in all, which is little: a smaller batch_size or more epochs train longer"
        )
    return said
