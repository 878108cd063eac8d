"""The networks that get no gradient: from full images to the mask and the targets of a step."""

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from cmt_mae.core.errors import InputError
from cmt_mae.method import targets as T
from cmt_mae.method.attention import (
    attention_map,
    mix_attention,
    normalise_map,
)
from cmt_mae.method.cmtmae import (
    FROM_IMAGE,
    SOURCES,
    Alphas,
    MaskConfig,
    MaskRule,
    TargetConfig,
    TargetFunction,
    takes_class_token,
)
from cmt_mae.method.last_block import finish, mean_of_last
from cmt_mae.method.masking import (
    GUIDED,
    Mask,
    from_priority,
    of_other_images,
    sample_mask,
)
from cmt_mae.method.teacher import Teacher, TeacherOutput
from cmt_mae.method.vit import (
    LastBlockInput,
    forward_to_last,
    gather_tokens,
    num_prefix,
    without_registers,
)


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
            weight = (1.0 - m) * (1.0 - skipped.to(slow[0].dtype))
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
            from cmt_mae.method.hog import hog_targets

            shown = images.float() * self.std + self.mean
            patches = hog_targets(shown, self.patch_size, gaussian=self.target.hog_window)
        return (
            patches
            if ids is None
            else patches.gather(1, ids[:, :, None].expand(-1, -1, patches.shape[-1]))
        )


def as_shares(attention: Tensor) -> Tensor:
    """Maps (B, L) that sum to 1; all 0 where the class token takes everything."""
    return attention / attention.sum(-1, keepdim=True).clamp_min(1e-12)


def own_parts(network: nn.Module) -> list[Tensor]:
    """The parameters' numbers; of a network sharded over processes (DTensors) those on this one."""
    parts: list[Any] = [p.detach() for p in network.parameters()]
    return [p.to_local() if hasattr(p, "to_local") else p for p in parts]


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
            from cmt_mae.method.photo_view import at_crops

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
            return self.networks.teacher.run_to_last(self.teacher_images)
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
            network = self.networks.momentum_runs()
            found = run(network, state, ids, with_prefix=class_token)
            return without_registers(found, num_prefix(network)) if class_token else found
