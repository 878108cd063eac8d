"""CMT-MAE as modules: the frozen networks (teacher, momentum student) and what learns (student, decoder, heads).

Stage one: the teacher's attention hides patches, its features are predicted (Eq. 2). Stage two: the
momentum student's attention is mixed in (Eq. 3) and both networks' features are predicted (Eq. 4).
Pixel MAE (Eq. 1) and the published relatives are settings of the same two classes.
"""

import contextlib
import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from cmt_mae.core.errors import InputError
from cmt_mae.core.settings import Amount, Count, Positive, Share
from cmt_mae.method import targets as T
from cmt_mae.method.attention import (
    Heads,
    Normalise,
    Reading,
    attention_map,
    mix_attention,
    normalise_map,
)
from cmt_mae.method.decoder import Decoder, DecoderConfig, Tokens
from cmt_mae.method.hog import hog_targets
from cmt_mae.method.last_block import finish, mean_of_last
from cmt_mae.method.masking import (
    GUIDED,
    Mask,
    Rule,
    from_priority,
    of_other_images,
    sample_mask,
)
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
    student_block: int = -1
    """Block of the momentum student whose attention is its map: -1 the last (as the paper), 0 the first."""
    student_map: Reading = "class"
    """How its map is read: class (the class token's row, as the paper) | column_mean (of all tokens' rows)."""
    other_image: bool = False
    """The attention of another image of the batch guides the mask: the control that tells what attention does."""


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
        higher it is than with the own ones: 0 means that the student tells the decoder nothing about an image.

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
        self.means = T.RunningMeans()
        """Of each target as it is predicted (by name) and, with ``target.centre``, before ("raw" + name)."""
        self.grid, self.patch_size = grid, patch_size
        self.mask_rule: MaskRule | None = None
        self.target_function: TargetFunction | None = None
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
        forwards = CachedForwards(self, images, seen, teacher_output)
        logs: dict[str, Tensor] = {}
        mask = self._mask(forwards, noise, n_mask, weights.mask, logs, random_mask, guided_share)
        return mask, self._targets(forwards, mask, weights.loss, logs), logs

    def _mask(
        self,
        forwards: "CachedForwards",
        noise: Tensor,
        n_mask: int,
        alpha: float,
        logs: dict[str, Tensor],
        random_mask: bool = False,
        guided_share: float = 1.0,
    ) -> Mask:
        rule = "random" if random_mask and self.mask.rule in GUIDED else self.mask.rule
        scores = self._scores(forwards, alpha, logs) if rule in GUIDED else None
        if scores is not None and self.mask.other_image:
            scores = of_other_images(scores)
        if self.mask_rule is not None:
            uniform = noise[:, : self.grid[0] * self.grid[1]]
            return from_priority(self.mask_rule(scores, uniform, self.grid), n_mask)
        return sample_mask(
            rule, n_mask, noise, self.grid, scores, temperature=self.mask.temperature,
            guided_share=guided_share, hint_share=self.mask.hint_share, square_side=self.mask.square_side,
        )  # fmt: skip

    def _scores(self, forwards: "CachedForwards", alpha: float, logs: dict[str, Tensor]) -> Tensor:
        """Normalised attention that guides the mask (Eq. 3), on the student's grid."""
        maps: dict[str, Tensor] = {}
        for name, weight in shares(self.mask.source, alpha).items():
            if weight > 0:
                raw, mass = forwards.attention(name, self.mask.heads)
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
        self, forwards: "CachedForwards", mask: Mask, alpha: float, logs: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        ids = mask.ids_mask if self.target.tokens.startswith("masked") else None
        with_class = takes_class_token(self.target)
        if self.target.source in FROM_IMAGE:
            if with_class:
                raise InputError(
                    f"target.tokens {self.target.tokens} needs a network as target: use masked or all"
                )
            raw: dict[str, Tensor] = {self.target.source: self._image_target(forwards.images, ids)}
        else:
            raw = {
                name: forwards.features(name, ids, with_class)
                for name, weight in shares(self.target.source, alpha).items()
                if weight > 0
            }
        for name, features in raw.items():
            logs[f"spread_target_{name}"] = T.spread(features)
            logs[f"rank_target_{name}"] = T.effective_rank(features)
            places = features.shape[1] if ids is None else mask.mask.shape[1] + with_class
            at = ids if ids is None or not with_class else F.pad(1 + ids, (1, 0))
            logs[f"image_share_{name}"] = T.image_share(features, at, places)
        return {name: self._normalised(name, features) for name, features in raw.items()}

    def _normalised(self, name: str, features: Tensor) -> Tensor:
        """A target as it is predicted: centred if wanted, then normalised; both means are kept."""
        if self.target.centre:
            mean = self.means.means.get(f"raw {name}")
            self.means.add(f"raw {name}", features)
            features = features if mean is None else features - mean
        target = T.normalise_target(features, self.target.norm)
        unit = F.normalize(target, dim=-1) if self.target.loss == "cosine" else target
        self.means.add(name, unit)
        return target

    def _image_target(self, images: Tensor, ids: Tensor | None) -> Tensor:
        """Pixels of patches in MAE's order, or HOG of the unnormalised image; at hidden patches ids."""
        if self.target_function is not None:
            patches = self.target_function(images)
        elif self.target.source == "pixel":
            patches = T.patchify(images, self.patch_size)
        else:
            shown = images.float() * self.std + self.mean
            patches = hog_targets(shown, self.patch_size, gaussian=self.target.hog_window)
        return (
            patches
            if ids is None
            else patches.gather(1, ids[:, :, None].expand(-1, -1, patches.shape[-1]))
        )


def uncompiled(network: VisionTransformer) -> contextlib.AbstractContextManager[object]:
    """Inside, compiled blocks run as written. (Asking torch for it loads its compiler, which takes seconds.)"""
    if network.blocks[0]._compiled_call_impl is None:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


def takes_class_token(target: TargetConfig) -> bool:
    """Whether the class token's feature is predicted too."""
    return target.tokens.endswith("+cls")


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
    """Forward passes of the frozen networks on one batch, each run at most once and only where it is needed."""

    def __init__(
        self,
        networks: FrozenNetworks,
        images: Tensor,
        teacher_images: Tensor,
        teacher_output: Callable[[], TeacherOutput] | None = None,
    ) -> None:
        self.networks, self.images, self.teacher_images = networks, images, teacher_images
        self.teacher_output = teacher_output
        self.states: dict[str, LastBlockInput] = {}
        self.given: TeacherOutput | None = None

    def teacher_given(self) -> TeacherOutput | None:
        """The teacher's outputs where they come as a whole and not from its parts, on the student's grid."""
        teacher = self.networks.teacher
        if self.given is None and self.teacher_output is not None:
            with self.networks.whole_precision():
                self.given = self.teacher_output()
        elif self.given is None and teacher is not None and teacher.grid != self.networks.grid:
            # made for whole photos but given a crop, as for pictures: the crop is taken for a photo
            with_class = takes_class_token(self.networks.target)
            with self.networks.whole_precision():
                whole = teacher.outputs(self.teacher_images, self.networks.mask.heads, with_class)
            box = self.images.new_tensor([[0.0, 0.0, 1.0, 1.0]]).expand(len(self.images), -1)
            self.given = at_crops(whole, teacher.grid, self.networks.grid, box)
        return self.given

    def state(self, name: str) -> LastBlockInput:
        """All but the last block of the named network."""
        if name not in self.states:
            with self.networks.whole_precision():
                self.states[name] = self._to_last(name)
        return self.states[name]

    def _to_last(self, name: str) -> LastBlockInput:
        if name == "teacher":
            assert self.networks.teacher is not None
            return self.networks.teacher.look(self.teacher_images)
        kept = self.networks.target.momentum_last_k - 1
        images = self.images if self.networks.dtype is None else self.images.to(self.networks.dtype)
        return forward_to_last(
            self.networks.momentum_runs(), images, kept, self.networks.mask.student_block
        )

    def attention(self, name: str, heads: str) -> tuple[Tensor, Tensor]:
        """Raw map (B, L) and prefix mass (B,) of the named network."""
        if name == "teacher":
            assert self.networks.teacher is not None
            given = self.teacher_given()
            if given is not None:
                return given.attention, given.mass
            return self.networks.teacher.attention(self.state(name), heads)
        mask = self.networks.mask
        return attention_map(
            self.networks.momentum_runs(), self.state(name), heads,  # type: ignore[arg-type]
            block=mask.student_block, read=mask.student_map,  # type: ignore[arg-type]
        )  # fmt: skip

    def features(self, name: str, ids: Tensor | None, class_token: bool) -> Tensor:
        """Targets before normalisation, (B, N, D)."""
        given = self.teacher_given() if name == "teacher" else None
        if given is not None:
            if ids is None:
                return given.features
            return gather_tokens(given.features, F.pad(1 + ids, (1, 0)) if class_token else ids)
        state = self.state(name)
        with self.networks.whole_precision():
            if name == "teacher":
                assert self.networks.teacher is not None
                return self.networks.teacher.features(state, ids, class_token)
            run = mean_of_last if self.networks.target.momentum_last_k > 1 else finish
            return run(self.networks.momentum_runs(), state, ids, with_prefix=class_token)
