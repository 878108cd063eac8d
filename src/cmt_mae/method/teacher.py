"""The frozen teacher: a ViT with its own normalisation and input size, its grid aligned to the student's."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmt_mae.core.backbone_facts import BackboneFacts
from cmt_mae.core.errors import InputError
from cmt_mae.core.settings import Count, CountOrNone, resume_safe
from cmt_mae.method.attention import attention_map
from cmt_mae.method.last_block import finish, mean_of_last
from cmt_mae.method.vit import (
    LastBlockInput,
    Vit,
    block_number,
    forward_to_last,
    grid_of,
    has_class_token,
    num_prefix,
)


@dataclass
class TeacherConfig(BackboneFacts):
    """The frozen network that guides masks and gives targets."""

    prefix: ClassVar[str] = "--teacher."

    name: str = "vit_base_patch16_clip_quickgelu_224.openai"
    """A timm name, 'embedded' (the small teacher in the package), a run directory, or a weights file
    (MAE, DINO, iBOT, MoCo v3, BEiT, data2vec, CLIP, open_clip, Hugging Face, I-JEPA, DeiT)."""
    feature: Literal["projected", "tokens", "last_k"] = "projected"
    """projected (final norm, then the network's own projection where it has one, as CLIP) | tokens (final
    norm) | last_k (mean of the outputs of the last blocks)."""
    last_k: Count = 6
    """How many blocks the mean of 'last_k' takes."""
    grid_align: Literal["input", "resample"] = "input"
    """input (the teacher sees the size at which its grid is the student's) | resample (its own size; map and
    features are resampled)."""
    pixels: Literal["auto", "resize", "crop"] = "auto"
    """resize (the student's crop, resized on the device) | crop (the same crop cut again from the photo) |
    auto (crop where the teacher's input is larger than the student's)."""
    cache: bool = False
    """view crop: keep the teacher's outputs in OUT/teacher_cache, so that it runs once an image; needs
    data.crops fixed. (view photo always keeps them.)"""
    cache_folder: str = resume_safe("")
    """Keep them below this folder instead, where every run with the same images and teacher (with view crop:
    the same crops too) reads what another one wrote."""
    attention_block: int = -1
    """Block whose attention is the map: -1 the last (as the paper), -2 the one before, or 0, 1, ... from the
    first."""
    view: Literal["crop", "photo"] = "crop"
    """crop (the teacher sees every crop) | photo (it sees each whole photo once, squeezed to a square; its map
    and features are kept and read at the box of each crop: an approximation)."""
    view_size: CountOrNone = 0
    """view photo: side in pixels at which the teacher sees the photos; 0: the size it was trained at."""
    keep_as: Literal["auto", "fp32", "fp16", "int8"] = "auto"
    """How features are kept on the disk: fp32 (exact) | fp16 | int8 (with one scale a token) | auto (fp16 with
    view photo, else fp32)."""
    project_to: CountOrNone = 0
    """The target is the features times a fixed random matrix (orthonormal rows) with so many rows, so that less
    has to be kept and predicted; 0: the features themselves."""
    channels: list[CountOrNone] = field(default_factory=list)
    """Which of the student's channels the teacher sees; empty: all three, or a grey channel three times."""


@dataclass
class TeacherOutput:
    """The teacher's outputs for a batch, in place of a forward pass."""

    attention: Tensor
    """(B, L) fp32, raw map on the student's grid."""
    mass: Tensor
    """(B,) fp32, attention on prefix tokens."""
    features: Tensor
    """(B, L, E) fp32 before normalisation, or (B, 1 + L, E) with the class token's in front."""


class Teacher(nn.Module):
    """A frozen timm ViT. ``run_to_last`` runs all but the last block, ``attention`` and ``features`` read from it.

    The change from the student's normalisation to the teacher's is folded into the patch embedding, exactly
    (spec 1.5), so that both networks take the same tensor.
    """

    def __init__(
        self,
        model: Vit,
        config: TeacherConfig,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        student_mean: Sequence[float],
        student_std: Sequence[float],
        grid: tuple[int, int],
        projection: Tensor | None = None,
    ) -> None:
        """projection: (E, D) applied to tokens after the final norm, or None. grid: the student's."""
        super().__init__()
        self.model: Vit = model.requires_grad_(False).eval()
        self.projection: Tensor | None
        self.feature, self.last_k, self.grid = config.feature, config.last_k, grid
        self.attention_block = config.attention_block
        block_number(model, config.attention_block)
        if config.feature == "last_k" and config.last_k > len(model.blocks):
            raise InputError(
                f"teacher.last_k {config.last_k}: the teacher has {len(model.blocks)} blocks, give at most so many"
            )
        self.channels = teacher_channels(config.channels, len(student_mean))
        fold_normalisation(
            self.model,
            source=(
                [student_mean[c] for c in self.channels],
                [student_std[c] for c in self.channels],
            ),
            goal=(mean, std),
        )
        if config.feature != "projected":
            projection = None
        if config.project_to:
            projection = random_projection(config.project_to, int(model.embed_dim), projection)
        self.register_buffer("projection", projection)
        self.input_size = _input_size(model)
        self.own_grid = grid_of(model)
        if config.feature not in ("projected", "tokens", "last_k"):
            raise InputError(f"teacher.feature '{config.feature}': use projected, tokens or last_k")
        if config.grid_align == "input" and self.own_grid != grid:
            raise InputError(
                f"the teacher's grid {self.own_grid} cannot be aligned to the student's {grid} by its input "
                "size: set teacher.grid_align to resample"
            )

    @property
    def width(self) -> int:
        """Channels of a target feature."""
        return int(
            self.projection.shape[0] if self.projection is not None else self.model.embed_dim
        )

    def run_to_last(self, images: Tensor) -> LastBlockInput:
        """images (B, C, H, W), normalised for the STUDENT, of any size; resized here where needed."""
        kept = self.last_k - 1 if self.feature == "last_k" else 0
        return forward_to_last(self.model, self.prepared(images), kept, self.attention_block)

    def outputs(self, images: Tensor, heads: str, class_token: bool) -> TeacherOutput:
        """Map and features of every token, in one go; images as ``run_to_last``."""
        state = self.run_to_last(images)
        attention, mass = self.attention(state, heads)
        features = self.features(state, None, class_token)
        return TeacherOutput(attention.float(), mass.float(), features.float())

    def prepared(self, images: Tensor) -> Tensor:
        """The images of ``run_to_last`` as the network itself takes them: its channels, size and number type."""
        if self.channels != tuple(range(images.shape[1])):
            images = images[:, list(self.channels)]
        if images.shape[-2:] != self.input_size:
            images = F.interpolate(
                images.float(), self.input_size, mode="bicubic", antialias=True, align_corners=False
            )
        weight: Tensor = self.model.patch_embed.proj.weight
        return images.to(weight.dtype)

    def attention(self, state: LastBlockInput, heads: str = "mean") -> tuple[Tensor, Tensor]:
        """Raw map (B, L) on the student's grid, fp32, and the mass on prefix tokens (B,)."""
        raw, mass = attention_map(self.model, state, heads, block=self.attention_block)  # type: ignore[arg-type]
        if self.own_grid != self.grid:
            raw = resample(raw[:, :, None], self.own_grid, self.grid, "area").squeeze(-1)
        return raw, mass

    def features(
        self, state: LastBlockInput, ids: Tensor | None, class_token: bool = False
    ) -> Tensor:
        """Targets before normalisation: (B, K, E) at patches ids, or (B, L, E) for None; fp32 or autocast.

        class_token: put the class token's feature in front. Raises InputError where there is none.
        """
        if class_token and not has_class_token(self.model):
            raise InputError("target.tokens all+cls needs a teacher with a class token: use all")
        same_grid = self.own_grid == self.grid
        run = mean_of_last if self.feature == "last_k" else finish
        tokens = run(self.model, state, ids if same_grid else None, with_prefix=class_token)
        prefix = num_prefix(self.model) if class_token else 0
        patches = tokens[:, prefix:]
        if not same_grid:
            patches = resample(patches, self.own_grid, self.grid, "bilinear")
            if ids is not None:
                patches = patches.gather(1, ids[:, :, None].expand(-1, -1, patches.shape[-1]))
        if class_token:
            patches = torch.cat([tokens[:, :1], patches], dim=1)
        return patches if self.projection is None else patches @ self.projection.T.to(patches.dtype)


def random_projection(rows: int, width: int, first: Tensor | None = None) -> Tensor:
    """A fixed random matrix with orthonormal rows (rows, E), after the projection ``first`` (E, D) if there is
    one: (rows, D). Raises InputError for more rows than E."""
    width = width if first is None else first.shape[0]
    if rows > width:
        raise InputError(
            f"teacher.project_to {rows}: the features have {width} channels, give at most so many"
        )
    generator = torch.Generator().manual_seed(0)
    square = torch.linalg.qr(torch.randn(width, rows, generator=generator, dtype=torch.float64))[0]
    matrix = square.T.float()
    return matrix if first is None else matrix.to(first) @ first


def teacher_channels(wanted: Sequence[int], available: int) -> tuple[int, ...]:
    """Indices of the student's channels that the teacher's three inputs take."""
    if wanted:
        if len(wanted) != 3 or not all(0 <= c < available for c in wanted):
            raise InputError(
                f"teacher.channels {list(wanted)}: give three indices below {available}"
            )
        return tuple(wanted)
    if available == 1:
        return (0, 0, 0)
    if available == 3:
        return (0, 1, 2)
    raise InputError(
        f"images have {available} channels and the teacher 3: name three of them with teacher.channels"
    )


@torch.no_grad()
def fold_normalisation(
    model: Vit,
    source: tuple[Sequence[float], Sequence[float]],
    goal: tuple[Sequence[float], Sequence[float]],
) -> None:
    """Make a network made for ``goal`` (mean, std) take images normalised by ``source`` (mean, std).

    W' = W * s_in / s_goal and b' = b + sum W * (m_in - m_goal) / s_goal: exact, since the patch embedding
    has stride = kernel and no padding (spec 1.5). Raises InputError for another kind of embedding.
    """
    conv = model.patch_embed.proj
    if not isinstance(conv, nn.Conv2d) or conv.stride != conv.kernel_size or any(conv.padding):
        raise InputError(
            "the teacher's patch embedding is no plain convolution: its normalisation cannot be folded"
        )
    weight = conv.weight.double()
    mean_in, std_in, mean_goal, std_goal = (
        torch.tensor(list(v), dtype=torch.float64, device=weight.device).view(1, -1, 1, 1)
        for v in (*source, *goal)
    )
    shift = (weight * (mean_in - mean_goal) / std_goal).sum((1, 2, 3))
    conv.weight.copy_((weight * std_in / std_goal).to(conv.weight.dtype))
    if conv.bias is None:
        conv.bias = nn.Parameter(shift.to(conv.weight.dtype), requires_grad=False)
    else:
        conv.bias.copy_((conv.bias.double() + shift).to(conv.weight.dtype))


def resample(tokens: Tensor, source: tuple[int, int], goal: tuple[int, int], mode: str) -> Tensor:
    """Tokens (B, rows * columns, D) from one grid to another: area or bilinear (spec 1.3)."""
    image = tokens.transpose(1, 2).unflatten(2, source)
    options = {} if mode == "area" else {"align_corners": False}
    return F.interpolate(image, goal, mode=mode, **options).flatten(2).transpose(1, 2)  # type: ignore[arg-type]


def _input_size(model: Vit) -> tuple[int, int]:
    size = model.patch_embed.img_size
    return (int(size[0]), int(size[1]))
