"""The fine-tuning recipes that the field quotes (specification 6.3), and how they fit a set."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Literal

from cmt_mae.core.errors import InputError
from cmt_mae.evaluate.features import CENTRE_CROP

if TYPE_CHECKING:
    from cmt_mae.evaluate.finetune import FinetuneConfig

PresetName = Literal["mae", "paper256", "milan", "dbot", "ibot", "quick"]
Pool = Literal["mean", "cls"]

LARGE, HUGE = 1024, 1280
"""Widths from which a backbone takes the numbers published for ViT-L and ViT-H."""
FEW_STEPS = 500  # below so many optimizer steps a run is told of


@dataclass(frozen=True)
class Recipe:
    """Every number that moves a fine-tuning. Defaults are MAE's, common to all published recipes."""

    epochs: int
    batch_size: int
    blr: float
    """Learning rate at a batch of 256; the rate is ``blr * batch_size / 256``."""
    layer_decay: float
    drop_path: float
    warmup_epochs: float
    min_lr: float = 1e-6
    weight_decay: float = 0.05
    rand_augment: str = "rand-m9-mstd0.5-inc1"
    mixup: float = 0.8
    cutmix: float = 1.0
    smoothing: float = 0.1
    erasing: float = 0.25
    smallest_crop: float = 0.08
    pool: Pool = "mean"
    ema_decay: float = 0.0

    @property
    def lr(self) -> float:
        """The highest learning rate."""
        return self.blr * self.batch_size / 256

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed with each other."""
        return self.mixup > 0 or self.cutmix > 0

    def check(self) -> None:
        """Raise InputError for a number that has no meaning."""
        shares = ("drop_path", "smoothing", "erasing", "ema_decay")
        for name in ("epochs", "batch_size", "blr", "layer_decay", "smallest_crop"):
            if not getattr(self, name) > 0:
                raise InputError(
                    f"fine-tuning: {name} is {getattr(self, name)}; it must be above 0"
                )
        for name in ("min_lr", "weight_decay", "mixup", "cutmix", "warmup_epochs", *shares):
            if not getattr(self, name) >= 0:
                raise InputError(
                    f"fine-tuning: {name} is {getattr(self, name)}; it must be 0 or more"
                )
        for name in shares:
            if getattr(self, name) >= 1:
                raise InputError(
                    f"fine-tuning: {name} is {getattr(self, name)}; it must be below 1"
                )
        for name in ("layer_decay", "smallest_crop"):
            if getattr(self, name) > 1:
                raise InputError(f"fine-tuning: {name} is {getattr(self, name)}; it is 1 at most")
        if self.warmup_epochs >= self.epochs:
            raise InputError(
                f"fine-tuning: a warm-up of {self.warmup_epochs:g} epochs leaves none of {self.epochs} "
                "to train; shorten it or train longer"
            )


def published(name: PresetName, width: int) -> Recipe:
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
    large = width >= LARGE
    epochs = 50 if large else 100
    mae = Recipe(
        epochs=epochs,
        batch_size=1024,
        blr=1e-3 if large else 5e-4,
        layer_decay=0.75 if large else 0.65,
        drop_path=0.3 if width >= HUGE else 0.2 if large else 0.1,
        warmup_epochs=5,
    )
    if name == "mae":
        return mae
    if name == "paper256":
        return replace(mae, batch_size=256)
    if name == "milan":
        return replace(mae, epochs=100, blr=1e-4)
    if name == "dbot":
        return replace(mae, blr=3e-4, layer_decay=0.75, drop_path=0.25 if large else 0.1)
    if name == "ibot":
        return replace(
            mae, blr=1e-3, drop_path=0.4 if large else 0.2, warmup_epochs=5 if large else 20
        )
    if name == "quick":
        return Recipe(
            epochs=10,
            batch_size=32,
            blr=4e-3,
            layer_decay=0.75,
            drop_path=0.0,
            warmup_epochs=1,
            rand_augment="none",
            mixup=0.0,
            cutmix=0.0,
            erasing=0.0,
            smallest_crop=0.25,
        )
    raise InputError(f"unknown preset {name!r}; use mae, paper256, milan, dbot, ibot or quick")


def eval_crop(size: tuple[int, int]) -> tuple[float, str]:
    """How test images are resized before the centre crop, relative to it, and that in words.

    MAE's build_transform: to 256/224 of the crop up to 224 pixels, above them to the crop itself.
    """
    if max(size) > 224:
        return 1.0, "centre crop, shorter side to the size, bicubic"
    return 256 / 224, CENTRE_CROP


def resolve(config: FinetuneConfig, width: int, n: int) -> Recipe:
    """The preset with the user's numbers in their places, its batch limited to ``n`` training images.

    The warm-up keeps its share of the epochs when only those are given.

    Raises:
        InputError: a number without meaning, or fewer than 2 training images.
    """
    own = published(config.preset, width)
    given = {f.name: getattr(config, f.name) for f in fields(Recipe)}
    given = {name: value for name, value in given.items() if value is not None}
    recipe = replace(own, **given)
    if config.epochs is not None and config.warmup_epochs is None:
        recipe = replace(recipe, warmup_epochs=own.warmup_epochs * config.epochs / own.epochs)
    recipe.check()
    return replace(recipe, batch_size=fit_batch(recipe.batch_size, n))


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


def differences(config: FinetuneConfig, recipe: Recipe, width: int, n: int) -> list[str]:
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
    for field in fields(Recipe):
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
