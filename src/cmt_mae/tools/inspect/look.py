"""What the networks make of a few images. Each forward pass runs once, when something first asks for it."""

import torch
from torch import Tensor
from torch.nn import functional as F

from cmt_mae.core.errors import InputError
from cmt_mae.method import targets as T
from cmt_mae.method.attention import attention_rows, mix_attention, normalise_map, reduce_heads
from cmt_mae.method.frozen import as_shares
from cmt_mae.method.last_block import finish
from cmt_mae.method.masking import GUIDED, RULES, Mask, noise_length, sample_mask
from cmt_mae.method.other_attention import column_means
from cmt_mae.method.photo_view import at_crops, box_weights, sample
from cmt_mae.method.teacher import TeacherOutput, resample
from cmt_mae.method.vit import (
    LastBlockInput,
    Vit,
    block_number,
    encode_visible,
    forward_to_last,
    grid_of,
    num_prefix,
    up_to,
)
from cmt_mae.tools.inspect.images import Inputs
from cmt_mae.tools.inspect.networks import Networks, Who

Grid = tuple[int, int]
Maps = dict[str, Tensor]
"""teacher, student, collab -> attention (B, L) on the student's grid, each row sums to 1."""


class Inspector:
    """Networks and images, without gradient; B images, L patches. The networks run where they are, what comes out
    is on the CPU in fp32. Where the teacher sees whole photos, its outputs are those at the crops' boxes."""

    def __init__(self, networks: Networks, inputs: Inputs) -> None:
        self.networks, self.inputs = networks, inputs
        self._states: dict[tuple[Who, int], LastBlockInput] = {}
        self._raw: dict[tuple[Who, int, str], Tensor] = {}
        self._targets: dict[str, Tensor] | None = None
        self.images = self.normalised(inputs.images)
        """(B, C, H, W) as the student takes them, on its device."""

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> fp32 with the student's mean and standard deviation."""
        mean, std = (torch.tensor(part).view(1, -1, 1, 1) for part in self.networks.stats)
        device = next(self.networks.student.parameters()).device
        return ((images.float() / 255 - mean) / std).to(device)

    def seen_by_teacher(self) -> Tensor:
        """What the teacher takes: the student's images, the crop at its own size, or the whole photo."""
        other = self.inputs.second if self.inputs.photos is None else self.inputs.photos
        return self.images if other is None else self.normalised(other)

    def at_crops(self, who: Who, tokens: Tensor, own: Grid) -> tuple[Tensor, Grid]:
        """Values of patches (B, L, E) on a network's own grid -> those of the crops, fp32, and their grid."""
        tokens = tokens.float().cpu()
        if who == "student" or self.inputs.boxes is None:
            return tokens, own
        goal = self.networks.grid
        return sample(tokens, own, box_weights(self.inputs.boxes, own, goal)), goal

    def teacher_output(self) -> TeacherOutput:
        """The teacher's map and features at the crops, where it sees whole photos."""
        networks, boxes = self.networks, self.inputs.boxes
        assert networks.teacher is not None
        assert boxes is not None
        found = networks.teacher.outputs(self.seen_by_teacher(), networks.config.mask.heads, False)
        return at_crops(found, networks.teacher.own_grid, networks.grid, boxes)

    def depth(self, who: Who) -> int:
        """How many blocks the network has."""
        return len(self._model(who).blocks)

    def _model(self, who: Who) -> Vit:
        teacher = self.networks.teacher
        if who == "student":
            return self.networks.student
        if teacher is None:
            raise InputError("there is no teacher here: name one with --teacher")
        return teacher.model

    def state(self, who: Who, layer: int = 0) -> tuple[Vit, LastBlockInput]:
        """The network cut after block ``layer`` (1.., 0: all of them), and its tokens before that block."""
        model, number = up_to(self._model(who), layer), layer or self.depth(who)
        if (who, number) not in self._states:
            teacher = self.networks.teacher
            with torch.inference_mode():
                if who == "student":
                    state = forward_to_last(model, self.images)
                else:
                    assert teacher is not None
                    state = forward_to_last(model, teacher.prepared(self.seen_by_teacher()))
            self._states[who, number] = state
        return model, self._states[who, number]

    def head_maps(self, who: Who, layer: int = 0) -> tuple[Tensor, tuple[int, int]]:
        """Attention of every head to each patch (B, heads, L), shares that sum to 1; on the network's own grid."""
        model, state = self.state(who, layer)
        with torch.inference_mode():
            rows = attention_rows(model, state)[:, :, num_prefix(model) :]
            maps, grid = self.at_crops(who, rows.transpose(1, 2), grid_of(model))
        return as_shares(maps.transpose(1, 2)), grid

    def raw(self, who: Who, layer: int = 0, head: int = -1) -> Tensor:
        """Raw attention (B, L) on the student's grid, of block ``layer`` (from 1; 0: the one that guides the run).

        head -1: all, brought together as the settings say.
        """
        mask = self.networks.config.mask
        block = (
            mask.student_block if who == "student" else self.networks.config.teacher.attention_block
        )
        model, state = self.state(who, layer or block_number(self._model(who), block) + 1)
        read = (
            column_means
            if who == "student" and mask.student_map == "column_mean"
            else attention_rows
        )
        heads = self.networks.config.mask.heads
        key = (who, layer, heads if head < 0 else str(head))
        if key not in self._raw:
            with torch.inference_mode():
                rows = read(model, state)[:, :, num_prefix(model) :]
                one = reduce_heads(rows, heads) if head < 0 else rows[:, head]  # type: ignore[arg-type]
                tokens, grid = self.at_crops(who, one[:, :, None], grid_of(model))
                if grid != self.networks.grid:
                    tokens = resample(tokens, grid, self.networks.grid, "area")
            self._raw[key] = tokens.squeeze(-1)
        return self._raw[key]

    def maps(self, alpha: float | None = None, layer: int = 0, head: int = -1) -> Maps:
        """A_t, A_s and, where both networks take part, A_c = alpha A_s + (1 - alpha) A_t (Eq. 3).

        alpha: 0..1, None: the run's at this step. ``layer`` and ``head`` are those of both networks.
        """
        maps: Maps = {}
        if self.networks.teacher is not None:
            maps["teacher"] = as_shares(self.raw("teacher", layer, head))
        maps["student"] = as_shares(self.raw("student", layer, head))
        if len(maps) == 2 and (alpha is not None or 0 < self.networks.alpha < 1):
            maps["collab"] = as_shares(self.scores(alpha, layer, head))
        return maps

    def scores(self, alpha: float | None = None, layer: int = 0, head: int = -1) -> Tensor:
        """What guides a mask (B, L): the mixture, or the map of the one network that takes part.

        In stage one that is the teacher alone. Without a teacher it is the student, also where its run hides
        patches at random.
        """
        how = self.networks.config.mask.normalise
        weight = self.networks.alpha if alpha is None else alpha
        if self.networks.teacher is None or weight == 1:
            return normalise_map(self.raw("student", layer, head), how)  # type: ignore[arg-type]
        teacher = normalise_map(self.raw("teacher", layer, head), how)  # type: ignore[arg-type]
        if weight == 0:
            return teacher
        student = normalise_map(self.raw("student", layer, head), how)  # type: ignore[arg-type]
        return mix_attention(student, teacher, weight)

    def features(self, who: Who, layer: int = 0) -> tuple[Tensor, tuple[int, int]]:
        """Patch tokens (B, L, D) after block ``layer`` and the final norm, and their grid."""
        model, state = self.state(who, layer)
        with torch.inference_mode():
            return self.at_crops(who, finish(model, state, with_prefix=False), grid_of(model))

    def pooled(self, who: Who) -> Tensor:
        """One vector per image (B, D): the mean of its patch tokens."""
        return self.features(who)[0].mean(1)

    def targets(self) -> dict[str, Tensor]:
        """What the run predicts, at every patch and normalised: name -> (B, L, D); empty for a plain backbone."""
        if self._targets is None:
            self._targets, networks = {}, self.networks
            if networks.target_source():
                noise = draw_noise("random", networks.grid, len(self.images))
                with torch.inference_mode():
                    _, self._targets, _ = networks.guides(
                        self.images, noise, networks.n_mask, networks.weights,
                        teacher_images=self.seen_by_teacher(),
                        teacher_output=self.teacher_output if self.inputs.boxes is not None else None,
                    )  # fmt: skip
                    self._targets = {name: self._compared(t) for name, t in self._targets.items()}
        return self._targets

    def predictions(self, mask: Mask) -> dict[str, Tensor]:
        """What the heads say at every patch when ``mask`` is hidden: name -> (B, L, D)."""
        learner = self.networks.learner
        if learner is None:
            raise InputError("only a checkpoint of a run holds a decoder that predicts: give --run")
        with torch.inference_mode():
            latents = encode_visible(learner.student, self.images, mask.ids_keep)
            tokens = learner.decoder(latents, mask)[:, 1:]
            found = {name: head(tokens) for name, head in learner.heads.items()}
        return {name: self._compared(found[name]) for name in self.targets()}

    def _compared(self, features: Tensor) -> Tensor:
        """Of unit length where the loss sees directions alone."""
        target = self.networks.config.target
        if target.norm == "l2" or target.loss == "cosine":
            return F.normalize(features.float(), dim=-1)
        return features

    def reconstruction(self, mask: Mask) -> Tensor:
        """Pixels in 0..1 (B, C, H, W): predicted at hidden patches, the image itself elsewhere.

        MAE's normalised targets lose mean and contrast of a patch; they are taken from the true patch here,
        as in MAE's own pictures. Raises InputError where the run does not predict pixels.
        """
        if "pixel" not in self.targets():
            raise InputError("this run predicts no pixels: choose another picture with --what")
        networks, side = self.networks, self.networks.config.student.patch_size
        true = T.patchify(self.images, side)
        said = self.predictions(mask)["pixel"]
        if networks.config.target.norm == "mae":
            said = said * (true.var(-1, keepdim=True) + 1e-6).sqrt() + true.mean(-1, keepdim=True)
        whole = T.unpatchify(torch.where(mask.mask[:, :, None], said, true), side, networks.grid)
        return (whole * networks.guides.std + networks.guides.mean).clamp(0, 1)


def draw_noise(rule: str, grid: tuple[int, int], images: int, seed: int = 0) -> Tensor:
    """The uniform numbers (B, N) that a rule draws a mask from; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(images, noise_length(rule, grid[0] * grid[1]), generator=generator).clamp_min(
        2**-25
    )


def hidden(
    look: Inspector,
    rule: str,
    *,
    scores: Tensor | None = None,
    n_mask: int = 0,
    temperature: float | None = None,
    seed: int = 0,
) -> Mask:
    """The mask of one rule on these images. scores: default those of the run; n_mask 0: as many as the run.

    mix_random is shown as at the end of a run, when the guided share is largest.
    """
    config = look.networks.config.mask
    guided = rule in GUIDED
    return sample_mask(
        rule, n_mask or look.networks.n_mask,
        draw_noise(rule, look.networks.grid, len(look.images), seed), look.networks.grid,
        (look.scores() if scores is None else scores) if guided else None,
        temperature=temperature or config.temperature, hint_share=config.hint_share,
        guided_share=config.mix_random_end, square_side=config.square_side,
    )  # fmt: skip


def every_rule(look: Inspector, seed: int = 0) -> dict[str, Mask]:
    """The mask of every rule of ``method/masking.py`` from the same numbers and the same attention."""
    return {rule: hidden(look, rule, seed=seed) for rule in RULES}


def overlap(maps: Maps) -> Tensor:
    """Share of the most attended quarter that A_t and A_s have in common, (B,); chance is 0.25."""
    first, second = maps["teacher"], maps["student"]
    count = max(1, first.shape[1] // 4)
    return torch.stack(
        [T.overlap(a[None], b[None], count) for a, b in zip(first, second, strict=True)]
    )
