"""Numbers that are spoilt, teachers that say nothing: put into a fork before it runs a command."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cmt_mae.method import cmtmae
from cmt_mae.method.decoder import Decoder
from cmt_mae.pretraining.task import Pretraining

Now = Callable[[], bool]
"""Whether this is the moment (and the process) for the fault."""


def poison(tensor: Tensor, value: float) -> Tensor:
    """A copy in which one number is spoilt."""
    spoilt = tensor.clone()
    spoilt.view(-1)[spoilt.numel() // 2] = value
    return spoilt


def poison_image(now: Now, value: float) -> None:
    """One pixel of one image, as the device sees it."""
    real = Pretraining.to_device

    def to_device(self: Pretraining, batch: Any) -> Any:
        images, second = real(self, batch)
        return (poison(images, value), second) if now() else (images, second)

    Pretraining.to_device = to_device  # type: ignore[method-assign]


def poison_guide(which: str) -> Callable[[Now, float], None]:
    """One number of the target features of teacher or momentum student."""

    def place(now: Now, value: float) -> None:
        real = cmtmae.CachedForwards.features

        def features(self: Any, name: str, *args: Any) -> Tensor:
            made = real(self, name, *args)
            return poison(made, value) if name == which and now() else made

        cmtmae.CachedForwards.features = features  # type: ignore[method-assign]

    return place


def poison_student(now: Now, value: float) -> None:
    """One number of the student's latents."""
    real = cmtmae.encode_visible

    def encode(*args: Any) -> Tensor:
        made = real(*args)
        return poison(made, value) if now() else made

    cmtmae.encode_visible = encode


def poison_decoder(now: Now, value: float) -> None:
    """One number that leaves the decoder."""
    real = Decoder.forward

    def forward(self: Decoder, *args: Any, **more: Any) -> Tensor:
        made = real(self, *args, **more)
        return poison(made, value) if now() else made

    Decoder.forward = forward  # type: ignore[method-assign]


def poison_head(now: Now, value: float) -> None:
    """One number that the momentum student's head predicts."""
    real = cmtmae.StudentWithDecoder.__init__

    def init(self: Any, *args: Any) -> None:
        real(self, *args)
        self.heads["momentum"].register_forward_hook(
            lambda _, __, made: poison(made, value) if now() else made
        )

    cmtmae.StudentWithDecoder.__init__ = init  # type: ignore[method-assign]


POISONED_GRADIENT = "student.blocks.1.mlp.fc1.weight"


def poison_gradient(now: Now, value: float) -> None:
    """One number of one parameter's gradient, in the backward pass."""
    real = cmtmae.StudentWithDecoder.__init__

    def init(self: Any, *args: Any) -> None:
        real(self, *args)
        parameter = self.get_parameter(POISONED_GRADIENT)
        parameter.register_hook(lambda grad: poison(grad, value) if now() else grad)

    cmtmae.StudentWithDecoder.__init__ = init  # type: ignore[method-assign]


PLACES: dict[str, tuple[Callable[[Now, float], None], str]] = {
    "image": (poison_image, "image"),
    "teacher output": (poison_guide("teacher"), "teacher"),
    "momentum output": (poison_guide("momentum"), "momentum student"),
    "student": (poison_student, "student"),
    "decoder": (poison_decoder, "decoder"),
    "head": (poison_head, "head"),
    "gradient": (poison_gradient, f"gradient of {POISONED_GRADIENT}"),
}
"""Where a number is spoilt -> (how, the words in which the warning must name it)."""


def constant_teacher(_: int) -> None:
    """A teacher whose features are the same for all images and places."""
    real = cmtmae.CachedForwards.features

    def features(self: Any, name: str, *args: Any) -> Tensor:
        made = real(self, name, *args)
        return torch.ones_like(made) if name == "teacher" else made

    cmtmae.CachedForwards.features = features  # type: ignore[method-assign]


def one_line_teacher(_: int) -> None:
    """Features that differ, but all along one direction."""
    real = cmtmae.CachedForwards.features

    def features(self: Any, name: str, *args: Any) -> Tensor:
        made = real(self, name, *args)
        return made[..., :1] * torch.ones_like(made) if name == "teacher" else made

    cmtmae.CachedForwards.features = features  # type: ignore[method-assign]


def one_patch_attention(_: int) -> None:
    """A teacher that looks at one patch alone."""
    real = cmtmae.CachedForwards.attention

    def attention(self: Any, name: str, heads: str) -> tuple[Tensor, Tensor]:
        raw, mass = real(self, name, heads)
        sharp = torch.zeros_like(raw)
        sharp[:, 3] = 1.0
        return (sharp, mass) if name == "teacher" else (raw, mass)

    cmtmae.CachedForwards.attention = attention  # type: ignore[method-assign]


def nothing(_: int) -> None:
    """No fault: the settings alone do it."""


def class_token_alone(_: int) -> None:
    """A teacher whose class token looks at nothing but itself: no patch has any attention."""
    real = cmtmae.CachedForwards.attention

    def attention(self: Any, name: str, heads: str) -> tuple[Tensor, Tensor]:
        raw, mass = real(self, name, heads)
        return (0 * raw, mass) if name == "teacher" else (raw, mass)

    cmtmae.CachedForwards.attention = attention  # type: ignore[method-assign]


METHODS = {
    "cmt": [],
    "mae": ["--mask.rule=random", "--target.source=pixel", "--target.norm=mae"],
    "hog": ["--mask.rule=random", "--target.source=hog", "--target.norm=none"],
    "teacher": ["--mask.source=teacher", "--target.source=teacher"],
    "momentum": ["--mask.source=momentum", "--target.source=momentum", "--stage1_epochs=0"],
}  # fmt: skip
"""Kinds of run -> settings."""
# A student that predicts itself of the step before, unnormalised: to tell places and no images is easiest.
SELF = [*METHODS["momentum"], "--target.norm=none", "--momentum.start=0", "--momentum.end=0",
        "--momentum.schedule=constant", "--optim.weight_decay=3", "--optim.blr=1", "--epochs=60"]  # fmt: skip
COLLAPSES: dict[str, tuple[Callable[[int], None], list[str], str]] = {
    "constant teacher": (constant_teacher, [], "spread_target_teacher"),
    "teacher on one line": (one_line_teacher, [], "rank_target_teacher"),
    "attention on one patch": (one_patch_attention, [], "entropy_teacher"),
    "class token that looks at itself": (class_token_alone, [], "entropy_teacher"),
    "student that teaches itself": (nothing, SELF, "image_share_momentum"),
}
"""What is done -> (how, with which settings, the number that must sound)."""
