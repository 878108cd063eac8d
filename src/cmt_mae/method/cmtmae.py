"""CMT-MAE as modules: here the settings and what learns (student, decoder, heads), in frozen.py what does not.

Stage one: the teacher's attention hides patches, its features are predicted (Eq. 2). Stage two: the
momentum student's attention is mixed in (Eq. 3) and both networks' features are predicted (Eq. 4).
Pixel MAE (Eq. 1) and the published relatives are settings of the same two classes.
"""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from cmt_mae.core.settings import Amount, Count, Positive, Share
from cmt_mae.method import targets as T
from cmt_mae.method.attention import (
    Heads,
    Normalise,
    Reading,
)
from cmt_mae.method.decoder import Decoder, DecoderConfig, Tokens
from cmt_mae.method.masking import (
    Mask,
    Rule,
    of_other_images,
)
from cmt_mae.method.vit import encode_visible

Source = Literal["teacher", "momentum", "collab"]
SOURCES: tuple[str, ...] = get_args(Source)
FROM_IMAGE = ("pixel", "hog")  # targets that are computed from the image, without a network


@dataclass
class MaskConfig:
    """Which patches are hidden."""

    rule: Rule = "sampled_high"
    """random | block (BEiT) | square (SimMIM) | sampled_high (drawn by attention) | high | low | hint
    (AttMask) | sampled_visible (MILAN: attended patches stay visible) | mix_random (HPM's ramp)."""
    source: Source = "collab"
    """Whose attention guides the rule: teacher | momentum | collab (Eq. 3; the teacher alone in stage one)."""
    ratio: float = 0.75
    """Share of hidden patches, in (0, 1)."""
    temperature: Positive = 1.0
    """Of the drawing; larger is closer to random."""
    heads: Heads = "mean"
    """How the heads' maps become one: mean | max | minmax_mean (AMT)."""
    normalise: Normalise = "sum"
    """Scale of the two maps before they are mixed: sum | none | minmax | rank | zscore_softmax."""
    hint_share: Share = 0.1
    """Share of top patches that AttMask's hint reveals from."""
    square_side: Count = 2
    """Side of SimMIM's squares, in patches."""
    random_until_epoch: Amount = 0.0
    """Random masks before this epoch (AMT: 40)."""
    mix_random_start: Share = 0.0
    """mix_random: guided share of the hidden patches at the first step."""
    mix_random_end: Share = 0.5
    """mix_random: guided share at the last step."""
    student_block: int = -1
    """Block of the momentum student whose attention is its map: -1 the last (as the paper), 0 the first."""
    student_map: Reading = "class"
    """How its map is read: class (the class token's row, as the paper) | column_mean (of all tokens' rows)."""
    other_image: bool = False
    """The attention of another image of the batch guides the mask: the control for what attention contributes."""


@dataclass
class TargetConfig:
    """What is predicted, and how the distance is measured."""

    source: Literal["pixel", "hog"] | Source = "collab"
    """pixel | hog | teacher | momentum | collab (Eq. 4; the teacher alone in stage one)."""
    norm: T.Norm = "layer_norm"
    """Of the target: layer_norm | l2 (target and prediction) | none | mae (MAE's normalised pixels)."""
    loss: T.Loss = "mse"
    """mse | l1 | smooth_l1 | cosine."""
    beta: Positive = 2.0
    """Of smooth_l1 (data2vec: 2)."""
    reduce: Literal["mean", "sum"] = "mean"
    """Over channels: mean | sum (the paper's squared norm, literally)."""
    tokens: Tokens = "masked"
    """Where the loss is taken: masked | masked+cls (and the class token) | all | all+cls (MILAN)."""
    momentum_last_k: Count = 1
    """Momentum target: mean of the last K block outputs; 1 = last block after the final norm."""
    centre: bool = False
    """Subtract the running mean of a network's features before they are normalised."""
    hog_window: bool = True
    """hog: weigh gradients by a Gaussian of 16 pixels (Meta's runs of MaskFeat do without)."""


MaskRule = Callable[[Tensor | None, Tensor, tuple[int, int]], Tensor]
"""(scores (B, L) of the guiding attention, or None for a rule without; uniform numbers (B, L) in (0, 1); the grid)
-> priorities (B, L): the patches of highest priority are hidden. It may draw no random numbers of its own."""
TargetFunction = Callable[[Tensor], Tensor]
"""Normalised images (B, C, H, W) -> features (B, L, D) to predict, patches in raster order."""


@dataclass
class Alphas:
    """Weights of the two networks at one step: alpha of Eq. 3 and of Eq. 4."""

    mask: float
    loss: float


class StudentWithDecoder(nn.Module):
    """Everything that receives gradient: student, decoder, one linear head for each predicted network."""

    def __init__(
        self,
        student: VisionTransformer,
        decoder: DecoderConfig,
        target: TargetConfig,
        head_widths: dict[str, int],
    ) -> None:
        """head_widths: channels of each target, e.g. {"teacher": 512, "momentum": 768} or {"pixel": 768}."""
        super().__init__()
        self.student, self.target = student, target
        self.decoder = Decoder(decoder, student.embed_dim, student.patch_embed.grid_size)
        heads: dict[str, nn.Module] = {}
        for name, width in head_widths.items():
            # one by one: a further head changes no other's start
            heads[name] = head = nn.Linear(decoder.width, width)
            nn.init.xavier_uniform_(head.weight)
            nn.init.zeros_(head.bias)
        self.heads = nn.ModuleDict(heads)

    def activate(self, names: set[str]) -> None:
        """Heads outside ``names`` stay as they are: no gradient, so the optimizer leaves them alone."""
        for name, head in self.heads.items():
            head.requires_grad_(name in names)

    def forward(
        self,
        images: Tensor,
        mask: Mask,
        targets: dict[str, Tensor],
        alpha: float = 0.0,
        *,
        constants: dict[str, Tensor] | None = None,
        compare: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (scalar fp32) and the numbers to log.

        images (B, C, H, W) normalised; targets: name -> (B, N, D_name) normalised, at the tokens that
        ``target.tokens`` names, one or both of teacher and momentum (or one of pixel, hog); alpha in 0..1
        weighs the momentum student where both are predicted (Eq. 4). constants: running means of the targets
        (D_name,), against which the explained share is logged. compare: log the loss with other images' latents.
        """
        latents = encode_visible(self.student, images, mask.ids_keep)
        tokens, predictions = self.predict(latents, mask, targets)
        loss, each = self._loss(predictions, targets, alpha)
        logs = {"spread_student": T.spread(latents), "spread_decoder": T.spread(tokens)}
        unit = self.target.norm == "l2" or self.target.loss == "cosine"
        for name, prediction in predictions.items():
            logs[f"spread_prediction_{name}"] = T.spread(prediction)
            logs[f"loss_{name}"] = each[name].detach()
            if constants and name in constants:
                logs[f"explained_{name}"] = T.explained_share(
                    prediction, targets[name], constants[name], unit=unit
                )
        if compare:
            logs |= self.with_other_images(images, mask, targets, predictions, alpha)
        return loss, {"loss": loss.detach(), **logs}

    def predict(
        self, latents: Tensor, mask: Mask, names: Iterable[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Decoder tokens (B, N, W) where the loss is taken, and each named head's prediction (B, N, D_name)."""
        tokens = self.decoder(latents, mask, self.target.tokens)
        return tokens, {name: self.heads[name](tokens) for name in names}

    def _loss(
        self, predictions: dict[str, Tensor], targets: dict[str, Tensor], alpha: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 4, or the one loss there is; and each network's own."""
        target = self.target
        each = {
            name: T.distance(
                prediction, targets[name], loss=target.loss, norm=target.norm, beta=target.beta,
                reduce=target.reduce,
            )
            for name, prediction in predictions.items()
        }  # fmt: skip
        if len(each) == 2:
            return T.combine_losses(each["momentum"], each["teacher"], alpha), each
        (loss,) = each.values()
        return loss, each

    @torch.no_grad()
    def with_other_images(
        self,
        images: Tensor,
        mask: Mask,
        targets: dict[str, Tensor],
        predictions: dict[str, Tensor],
        alpha: float,
        most: int = 32,
    ) -> dict[str, Tensor]:
        """The loss where the decoder gets another image's latents, of the same visible places; and how much
        higher it is than with the own ones: 0 means that the latents carry nothing about the image.

        Of at most ``most`` images. No drop path, so that the run's random numbers stay where they are.
        """
        mask = Mask(mask.ids_keep[:most], mask.ids_mask[:most], mask.mask[:most])
        targets = {name: target[:most] for name, target in targets.items()}
        training = self.student.training
        self.student.eval()
        with uncompiled(self.student):  # a shape of its own is not worth compiling
            latents = encode_visible(self.student, of_other_images(images[:most]), mask.ids_keep)
            _, others = self.predict(latents, mask, targets)
        self.student.train(training)
        other, _ = self._loss(others, targets, alpha)
        own, _ = self._loss({name: p[:most] for name, p in predictions.items()}, targets, alpha)
        return {"other_image_loss": other, "image_gain": other - own}


def takes_class_token(target: TargetConfig) -> bool:
    """Whether the class token's feature is predicted too."""
    return target.tokens.endswith("+cls")


def uncompiled(network: VisionTransformer) -> contextlib.AbstractContextManager[object]:
    """Inside, compiled blocks run as written. (Asking torch for it loads its compiler, which takes seconds.)"""
    if network.blocks[0]._compiled_call_impl is None:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")
