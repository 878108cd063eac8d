"""The linear probes that the field quotes (specification 6.1 and 6.2), and how they fit a set."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Literal

from cmt_mae.core.errors import InputError
from cmt_mae.evaluate.sweep import Head, Training

ProtocolName = Literal["mae", "milan", "dino", "ibot", "sweep"]

# With the learning rate tied to the batch, how far a head can move depends on how many images it
# sees: 115 million in MAE's probe on ImageNet, 0.85 million on Imagenette in the same 90 epochs.
# There, on features of DeiT-Tiny's blocks 2, 4 and 12, 90 epochs of LARS ended 4 to 19 points under
# scikit-learn's best logistic regression, 3 million images 0 to 3 points under it.
IMAGES_SEEN = 3_000_000
MOST_EPOCHS = 30_000


@dataclass(frozen=True)
class Protocol:
    """A linear probe. The first entry of each list is its own choice, the default head."""

    training: Training
    pools: tuple[str, ...]
    blrs: tuple[float, ...]
    weight_decays: tuple[float, ...] = (0.0,)
    norms: tuple[bool, ...] = (True,)
    takes_best: bool = False
    """Whether the number to quote is the best head's on the val images."""
    lengthen: bool = True
    """Whether cached features of a small set get more epochs (see IMAGES_SEEN)."""


def published(name: ProtocolName, width: int, has_cls: bool) -> Protocol:
    """The protocol for a ViT of this width.

    mae: main_linprobe.py and FINETUNE.md (lr 0.1 * batch / 256). milan: its README. Both also train
    the rates that their authors and MILAN use and mean-pooled features; these are reported beside.
    dino, ibot: eval_linear.py, eval_linear_multi.py: class tokens of the last four blocks for small
    ViTs, class token beside mean-pooled patches for ViT-B and larger. sweep: ours.

    Raises:
        InputError: unknown name.
    """
    large = width >= 1024
    mae_pools = ("cls", "mean") if has_cls else ("mean",)
    dino_pool = ("blocks4" if width <= 384 else "cls+mean") if has_cls else "mean"
    dino = Training("sgd", 100, 1024, lr_by="epoch", init="normal")
    if name == "mae":
        training = Training("lars", 50 if large else 90, 16384, warmup_epochs=10)
        return Protocol(training, mae_pools, (0.1, 0.05, 0.02))
    if name == "milan":
        training = Training("lars", 100, 16384, warmup_epochs=10)
        return Protocol(training, mae_pools, (0.02, 0.05, 0.1) if large else (0.05, 0.02, 0.1))
    if name == "dino":
        return Protocol(dino, (dino_pool,), (0.001,), norms=(False,))
    if name == "ibot":
        grid = [float(f"{n}e{e}") for e in range(-4, 1) for n in range(1, 10)]
        blrs = (0.001, *(blr for blr in grid if blr != 0.001))  # DINO's rate is the default head
        return Protocol(dino, (dino_pool,), blrs, norms=(False,), takes_best=True, lengthen=False)
    if name == "sweep":
        return Protocol(
            Training("sgd", 100, 1024, warmup_epochs=10),
            ("cls", "mean", "cls+mean") if has_cls else ("mean",),
            (0.01, 0.001, 0.003, 0.03, 0.1, 0.3),
            weight_decays=(0.0, 0.001),
            norms=(True, False),
            lengthen=False,
        )
    raise InputError(f"unknown protocol {name!r}; use mae, milan, dino, ibot or sweep")


def make_heads(protocol: Protocol) -> list[Head]:
    """Every combination; the default head is the first."""
    every = itertools.product(protocol.pools, protocol.norms, protocol.blrs, protocol.weight_decays)
    return [Head(pool, blr, wd, norm) for pool, norm, blr, wd in every]


def fit_training(
    protocol: Protocol, n: int, *, epochs: int | None, batch_size: int | None, cached: bool
) -> Training:
    """The protocol's training for ``n`` images, with the user's epochs and batch where given.

    The batch is at most n (the learning rate follows it), the warm-up keeps its share of the
    epochs, and cached features get the epochs that show IMAGES_SEEN images in all.

    Raises:
        InputError: fewer than 2 images a batch, or no epoch.
    """
    given = protocol.training
    batch = min(given.batch_size if batch_size is None else batch_size, n)
    if batch < 2:
        raise InputError(
            f"linear probe: a batch of {batch} ({n} training images); it needs 2 or more"
        )
    if epochs is None:
        epochs = given.epochs
        if cached and protocol.lengthen:
            epochs = max(epochs, min(MOST_EPOCHS, -(-IMAGES_SEEN // n)))
    if epochs < 1:
        raise InputError(f"linear probe: {epochs} epochs; it needs at least 1")
    warmup = given.warmup_epochs * epochs / given.epochs
    return replace(given, epochs=epochs, batch_size=batch, warmup_epochs=warmup)
