"""CMT-MAE as a module: who guides (teacher, momentum student) and who learns (student, decoder, heads).

Stage one: the teacher's attention hides patches, its features are predicted (Eq. 2). Stage two: the
momentum student's attention is mixed in (Eq. 3) and both networks' features are predicted (Eq. 4).
Pixel MAE (Eq. 1) and the published relatives are settings of the same two classes.
"""

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cmt_mae.core.errors import InputError
from cmt_mae.core.settings import Amount, Count, Positive, Share
from cmt_mae.method import targets as T
from cmt_mae.method.attention import Heads, Normalise, attention_map, mix_attention, normalise_map
from cmt_mae.method.decoder import Decoder, DecoderConfig
from cmt_mae.method.hog import hog_targets
from cmt_mae.method.last_block import finish, mean_of_last
from cmt_mae.method.masking import GUIDED, Mask, Rule, sample_mask
from cmt_mae.method.photo_view import at_crops
from cmt_mae.method.teacher import Teacher, TeacherOutput
from cmt_mae.method.vit import LastBlockInput, encode_visible, forward_to_last, gather_tokens

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


@dataclass
class TargetConfig:
    """What is predicted, and how the distance is measured."""

    source: Literal["pixel", "hog"] | Source = "collab"
    """pixel | hog | teacher | momentum | collab (Eq. 4; the teacher alone in stage one)."""
    norm: T.Norm = "layer_norm"
    """Of the target: layer_norm | l2 (target and prediction) | none | mae (MAE's normalised pixels)."""
    loss: T.Loss = "mse"
    """mse | smooth_l1 | cosine."""
    beta: Positive = 2.0
    """Of smooth_l1 (data2vec: 2)."""
    reduce: Literal["mean", "sum"] = "mean"
    """Over channels: mean | sum (the paper's squared norm, literally)."""
    tokens: Literal["masked", "all", "all+cls"] = "masked"
    """Where the loss is taken: masked | all | all+cls (MILAN)."""
    momentum_last_k: Count = 1
    """Momentum target: mean of the last K block outputs; 1 = last block after the final norm."""


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
        self, images: Tensor, mask: Mask, targets: dict[str, Tensor], alpha: float = 0.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (scalar fp32) and the numbers to log.

        images (B, C, H, W) normalised; targets: name -> (B, N, D_name) normalised, at the tokens that
        ``target.tokens`` names, one or both of teacher and momentum (or one of pixel, hog); alpha in 0..1
        weighs the momentum student where both are predicted (Eq. 4).
        """
        latents = encode_visible(self.student, images, mask.ids_keep)
        hidden_only = self.target.tokens == "masked"
        tokens = self.decoder(latents, mask, hidden_only)
        if not hidden_only:
            tokens = select_tokens(tokens, self.target.tokens)
        losses: dict[str, Tensor] = {}
        logs = {"spread_student": T.spread(latents), "spread_decoder": T.spread(tokens)}
        for name, target in targets.items():
            prediction = self.heads[name](tokens)
            losses[name] = T.distance(
                prediction, target, loss=self.target.loss, norm=self.target.norm,
                beta=self.target.beta, reduce=self.target.reduce,
            )  # fmt: skip
            logs[f"spread_prediction_{name}"] = T.spread(prediction)
            logs[f"loss_{name}"] = losses[name].detach()
        if len(losses) == 2:
            loss = T.combine_losses(losses["momentum"], losses["teacher"], alpha)
        else:
            (loss,) = losses.values()
        return loss, {"loss": loss.detach(), **logs}


def select_tokens(tokens: Tensor, which: str) -> Tensor:
    """Decoder tokens (B, 1 + L, W) where the loss is taken: all (B, L, W) or all+cls."""
    if which not in ("all", "all+cls"):
        raise InputError(f"target.tokens '{which}' is unknown: use masked, all or all+cls")
    return tokens if which == "all+cls" else tokens[:, 1:]


class FrozenNetworks(nn.Module):
    """The two frozen networks: from full images to the mask and the targets of a step, without gradient."""

    def __init__(
        self,
        mask: MaskConfig,
        target: TargetConfig,
        *,
        teacher: Teacher | None,
        grid: tuple[int, int],
        patch_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        dtype: torch.dtype | None = None,
    ) -> None:
        """mean, std: the student's normalisation, to show HOG the pixels themselves.

        dtype: both networks run wholly in it; None: in fp32, or as the autocast around the call says.
        """
        super().__init__()
        self.mask, self.target = mask, target
        self.teacher = teacher if teacher is None or dtype is None else teacher.to(dtype)
        self.momentum: VisionTransformer | None = None
        self.momentum_low: VisionTransformer | None = None  # the same weights rounded to dtype
        self.dtype = dtype
        self.grid, self.patch_size = grid, patch_size
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def start_momentum(self, student: VisionTransformer) -> None:
        """theta_hat := theta, at the switch of stages (spec O14)."""
        self.momentum = copy.deepcopy(student).requires_grad_(False).eval()
        self.round_momentum()

    @torch.no_grad()
    def round_momentum(self) -> None:
        """Bring the copy that runs in ``dtype`` up to date; to be called whenever ``momentum`` has changed."""
        if self.momentum is None or self.dtype is None:
            return
        if self.momentum_low is None:
            self.momentum_low = copy.deepcopy(self.momentum).to(self.dtype)
        torch._foreach_copy_(own_parts(self.momentum_low), own_parts(self.momentum))

    def momentum_runs(self) -> VisionTransformer:
        """The momentum student as it is run: itself, or its copy in ``dtype``."""
        network = self.momentum if self.dtype is None else self.momentum_low
        assert network is not None
        return network

    def running(self) -> VisionTransformer | None:
        """As ``momentum_runs``, or None in stage one."""
        return None if self.momentum is None else self.momentum_runs()

    def whole_precision(self) -> contextlib.AbstractContextManager[object]:
        """Around the networks: with ``dtype``, autocast is off, so that norms and sums stay in it too."""
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.mean.device.type, enabled=False)

    @torch.no_grad()
    def update_momentum(
        self, student: VisionTransformer, m: float, skipped: Tensor | None = None
    ) -> None:
        """theta_hat <- m * theta_hat + (1 - m) * theta, after an optimizer step (spec 5.2).

        skipped: 1.0 where that step was not taken (non-finite), 0.0 else, on the device: then nothing moves.
        """
        assert self.momentum is not None
        slow, fast = own_parts(self.momentum), own_parts(student)
        if skipped is None:
            torch._foreach_lerp_(slow, fast, 1.0 - m)
        else:  # a tensor as weight keeps the decision on the device
            weight = (1.0 - m) * (1.0 - skipped)
            torch._foreach_lerp_(slow, fast, [weight] * len(slow))  # type: ignore[list-item]
        self.round_momentum()

    @torch.no_grad()
    def forward(
        self,
        images: Tensor,
        noise: Tensor,
        n_mask: int,
        weights: Alphas,
        *,
        teacher_images: Tensor | None = None,
        teacher_output: Callable[[], TeacherOutput] | None = None,
        random_mask: bool = False,
        guided_share: float = 1.0,
    ) -> tuple[Mask, dict[str, Tensor], dict[str, Tensor]]:
        """The mask, the normalised targets by name, and numbers to log.

        images (B, C, H, W) normalised; noise (B, noise_length) uniform; teacher_images: the same crop at the
        teacher's size where it is cut from the photo again. teacher_output: called in place of the teacher, when
        it is wanted (``TeacherStore``), on the student's grid. random_mask: ignore attention at this step.
        """
        seen = images if teacher_images is None else teacher_images
        look = CachedForwards(self, images, seen, teacher_output)
        logs: dict[str, Tensor] = {}
        rule = "random" if random_mask and self.mask.rule in GUIDED else self.mask.rule
        scores = self._scores(look, weights.mask, logs) if rule in GUIDED else None
        mask = sample_mask(
            rule, n_mask, noise, self.grid, scores, temperature=self.mask.temperature,
            guided_share=guided_share, hint_share=self.mask.hint_share, square_side=self.mask.square_side,
        )  # fmt: skip
        return mask, self._targets(look, mask, weights.loss, logs), logs

    @torch.no_grad()
    def maps(
        self, images: Tensor, noise: Tensor, n_mask: int, weights: Alphas, teacher_images: Tensor
    ) -> tuple[dict[str, Tensor], Mask]:
        """For pictures: the normalised map of each network there is (and their mixture), and the mask."""
        look = CachedForwards(self, images, teacher_images)
        maps: dict[str, Tensor] = {}
        for name, network in (("teacher", self.teacher), ("momentum", self.momentum)):
            if network is not None:
                raw, _ = look.attention(name, self.mask.heads)
                maps[name] = as_shares(raw)
        if len(maps) == 2:
            maps["collab"] = mix_attention(maps["momentum"], maps["teacher"], weights.mask)
        mask, _, _ = self(images, noise, n_mask, weights, teacher_images=teacher_images)
        return maps, mask

    def _scores(self, look: "CachedForwards", alpha: float, logs: dict[str, Tensor]) -> Tensor:
        """Normalised attention that guides the mask (Eq. 3), on the student's grid."""
        maps: dict[str, Tensor] = {}
        for name, weight in shares(self.mask.source, alpha).items():
            if weight > 0:
                raw, mass = look.attention(name, self.mask.heads)
                maps[name] = normalise_map(raw, self.mask.normalise)  # type: ignore[arg-type]
                logs[f"class_mass_{name}"] = mass.mean()
                logs[f"entropy_{name}"] = T.entropy(as_shares(maps[name]))
        if len(maps) == 1:
            return next(iter(maps.values()))
        count = max(1, maps["teacher"].shape[1] // 4)
        logs["overlap"] = T.overlap(maps["teacher"], maps["momentum"], count)
        mixed = mix_attention(maps["momentum"], maps["teacher"], alpha)
        logs["entropy_collab"] = T.entropy(as_shares(mixed))
        return mixed

    def _targets(
        self, look: "CachedForwards", mask: Mask, alpha: float, logs: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        ids = mask.ids_mask if self.target.tokens == "masked" else None
        with_class = self.target.tokens == "all+cls"
        if self.target.source in FROM_IMAGE:
            if with_class:
                raise InputError(
                    "target.tokens all+cls needs a network as target: use masked or all"
                )
            raw: dict[str, Tensor] = {self.target.source: self._image_target(look.images, ids)}
        else:
            raw = {
                name: look.features(name, ids, with_class)
                for name, weight in shares(self.target.source, alpha).items()
                if weight > 0
            }
        for name, features in raw.items():
            logs[f"spread_target_{name}"] = T.spread(features)
            logs[f"rank_target_{name}"] = T.effective_rank(features)
            places = features.shape[1] if ids is None else mask.mask.shape[1]
            logs[f"image_share_{name}"] = T.image_share(features, ids, places)
        return {
            name: T.normalise_target(features, self.target.norm) for name, features in raw.items()
        }

    def _image_target(self, images: Tensor, ids: Tensor | None) -> Tensor:
        """Pixels of patches in MAE's order, or HOG of the unnormalised image; at hidden patches ids."""
        if self.target.source == "pixel":
            patches = T.patchify(images, self.patch_size)
        else:
            patches = hog_targets(images.float() * self.std + self.mean, self.patch_size)
        return (
            patches
            if ids is None
            else patches.gather(1, ids[:, :, None].expand(-1, -1, patches.shape[-1]))
        )


def as_shares(attention: Tensor) -> Tensor:
    """Maps (B, L) that sum to 1; all 0 where the class token takes everything."""
    return attention / attention.sum(-1, keepdim=True).clamp_min(1e-12)


def own_parts(network: nn.Module) -> list[Tensor]:
    """The parameters' numbers; of a network sharded over processes those on this one."""
    parts = [p.detach() for p in network.parameters()]
    return [p.to_local() if isinstance(p, DTensor) else p for p in parts]


def shares(source: str, alpha: float) -> dict[str, float]:
    """Weight of each network: the momentum student alpha, the teacher 1 - alpha (Eqs. 3 and 4).

    Raises InputError for an unknown source.
    """
    if source not in SOURCES:
        raise InputError(f"'{source}' names no network: use {', '.join(SOURCES)}")
    if source == "collab":
        return {"teacher": 1.0 - alpha, "momentum": alpha}
    return {source: 1.0}


class CachedForwards:
    """Forward passes of the guides on one batch, each run at most once and only when something asks."""

    def __init__(
        self,
        guides: FrozenNetworks,
        images: Tensor,
        teacher_images: Tensor,
        teacher_output: Callable[[], TeacherOutput] | None = None,
    ) -> None:
        self.guides, self.images, self.teacher_images = guides, images, teacher_images
        self.teacher_output = teacher_output
        self.states: dict[str, LastBlockInput] = {}
        self.known: TeacherOutput | None = None

    def teacher_given(self) -> TeacherOutput | None:
        """The teacher's outputs where they come as a whole and not from its parts, on the student's grid."""
        teacher = self.guides.teacher
        if self.known is None and self.teacher_output is not None:
            with self.guides.whole_precision():
                self.known = self.teacher_output()
        elif self.known is None and teacher is not None and teacher.grid != self.guides.grid:
            # made for whole photos and asked about a crop, as for pictures: the crop is its photo
            with_class = self.guides.target.tokens == "all+cls"
            with self.guides.whole_precision():
                whole = teacher.outputs(self.teacher_images, self.guides.mask.heads, with_class)
            box = self.images.new_tensor([[0.0, 0.0, 1.0, 1.0]]).expand(len(self.images), -1)
            self.known = at_crops(whole, teacher.grid, self.guides.grid, box)
        return self.known

    def state(self, name: str) -> LastBlockInput:
        """All but the last block of the named network."""
        if name not in self.states:
            with self.guides.whole_precision():
                self.states[name] = self._to_last(name)
        return self.states[name]

    def _to_last(self, name: str) -> LastBlockInput:
        if name == "teacher":
            assert self.guides.teacher is not None
            return self.guides.teacher.look(self.teacher_images)
        kept = self.guides.target.momentum_last_k - 1
        images = self.images if self.guides.dtype is None else self.images.to(self.guides.dtype)
        return forward_to_last(self.guides.momentum_runs(), images, kept)

    def attention(self, name: str, heads: str) -> tuple[Tensor, Tensor]:
        """Raw map (B, L) and prefix mass (B,) of the named network."""
        if name == "teacher":
            assert self.guides.teacher is not None
            known = self.teacher_given()
            if known is not None:
                return known.attention, known.mass
            return self.guides.teacher.attention(self.state(name), heads)
        return attention_map(self.guides.momentum_runs(), self.state(name), heads)  # type: ignore[arg-type]

    def features(self, name: str, ids: Tensor | None, class_token: bool) -> Tensor:
        """Targets before normalisation, (B, N, D)."""
        known = self.teacher_given() if name == "teacher" else None
        if known is not None:
            return known.features if ids is None else gather_tokens(known.features, ids)
        state = self.state(name)
        with self.guides.whole_precision():
            if name == "teacher":
                assert self.guides.teacher is not None
                return self.guides.teacher.features(state, ids, class_token)
            run = mean_of_last if self.guides.target.momentum_last_k > 1 else finish
            return run(self.guides.momentum_runs(), state, ids, with_prefix=class_token)
