"""Tiny networks of every family of timm that a teacher may have, with weights that matter.

24 x 32 pixels in patches of 8: 3 rows and 4 columns, so that a transposed grid shows.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from timm.layers import QuickGELU
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from cmt_mae.method.cmtmae import Alphas, MaskConfig, StudentWithDecoder, TargetConfig
from cmt_mae.method.decoder import DecoderConfig
from cmt_mae.method.frozen import FrozenNetworks
from cmt_mae.method.masking import Mask, noise_length
from cmt_mae.method.teacher import Teacher, TeacherConfig
from cmt_mae.method.vit import StudentConfig, build_student

GRID = (3, 4)
SIZE = (24, 32)
WIDTH = 32
HEADS = 4
DEPTH = 3
SHAPE: dict[str, Any] = {
    "img_size": SIZE,
    "patch_size": 8,
    "embed_dim": WIDTH,
    "depth": DEPTH,
    "num_heads": HEADS,
    "num_classes": 0,
}
CLIP: dict[str, Any] = {
    "pre_norm": True,
    "act_layer": QuickGELU,
    "norm_layer": partial(nn.LayerNorm, eps=1e-5),
}

WITH_CLASS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: VisionTransformer(**SHAPE),
    "dinov2 (registers, layer scale)": lambda: VisionTransformer(
        **SHAPE, reg_tokens=4, init_values=1e-5, no_embed_class=True
    ),
    "qk norm": lambda: VisionTransformer(**SHAPE, qk_norm=True),
    "clip (pre-norm, QuickGELU)": lambda: VisionTransformer(**SHAPE, **CLIP),
    "dinov3 (rotary, registers)": lambda: timm.create_model("vit_small_patch16_dinov3", **SHAPE),
    "eva02 (rotary, separate q k v)": lambda: timm.create_model("eva02_base_patch14_224", **SHAPE),
    "rope vit": lambda: timm.create_model("vit_small_patch16_rope_224", **SHAPE),
    "beit (relative positions)": lambda: timm.create_model("beit_base_patch16_224", **SHAPE),
    "beit (shared relative positions)": lambda: Beit(
        **SHAPE, use_abs_pos_emb=False, use_shared_rel_pos_bias=True, init_values=0.1
    ),
}
WITHOUT_CLASS: dict[str, Callable[[], nn.Module]] = {
    "ijepa": lambda: VisionTransformer(**SHAPE, class_token=False, global_pool="avg"),
    "rotary with registers": lambda: Eva(
        **SHAPE, class_token=False, num_reg_tokens=2, use_rot_pos_emb=True, global_pool="avg"
    ),
}
PROBE: dict[str, Callable[[], nn.Module]] = {
    "siglip": lambda: VisionTransformer(**SHAPE, class_token=False, global_pool="map"),
}
FAMILIES = WITH_CLASS | WITHOUT_CLASS | PROBE


def network(name: str, seed: int = 0) -> Any:
    """A tiny network of the named family, in eval mode, random in every parameter."""
    torch.manual_seed(seed)
    return randomise(FAMILIES[name](), seed).eval()


def randomise(model: nn.Module, seed: int = 0, scale: float = 0.25) -> nn.Module:
    """Add noise to every parameter: timm starts biases, layer scales and tables at or near 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def pictures(batch: int = 2, channels: int = 3, seed: int = 1) -> Tensor:
    """(B, C, 24, 32) normal noise."""
    return torch.randn(batch, channels, *SIZE, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def full_map(model: Any, images: Tensor, block: int = -1) -> Tensor:
    """(B, heads, N, N) softmaxed attention of a block, out of timm's own forward pass."""
    attention = model.blocks[block].attn
    seen: list[Tensor] = []
    attention.fused_attn = False  # timm then multiplies the map out and hands it to its dropout
    handle = attention.attn_drop.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model.forward_features(images)
    handle.remove()
    attention.fused_attn = True
    (found,) = seen
    return found


N_MASK = 9
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STUDENT: dict[str, Any] = {
    "img_size": list(SIZE), "patch_size": 8, "width": 24, "depth": 3, "heads": 3,
}  # fmt: skip


def student(**more: Any) -> Any:
    torch.manual_seed(0)
    return randomise(build_student(StudentConfig(**STUDENT, **more)), scale=0.1)


def learner(
    target: TargetConfig | None = None, kind: str = "mae", heads: dict[str, int] | None = None
) -> StudentWithDecoder:
    made = student()
    torch.manual_seed(1)
    return StudentWithDecoder(
        made,
        DecoderConfig(kind=kind, width=16, depth=2, heads=2),
        target or TargetConfig(),
        heads or {"teacher": SHAPE["embed_dim"], "momentum": 24},
    )


def guides(
    mask: MaskConfig | None = None,
    target: TargetConfig | None = None,
    family: str = "vit",
    **more: Any,
) -> FrozenNetworks:
    """A teacher of the family and, as after the switch of stages, a momentum student of its own."""
    teacher = Teacher(
        network(family), TeacherConfig(**more), mean=MEAN, std=STD, student_mean=MEAN, student_std=STD,
        grid=GRID,
    )  # fmt: skip
    made = FrozenNetworks(
        mask or MaskConfig(), target or TargetConfig(), teacher=teacher, grid=GRID, patch_size=8,
        mean=MEAN, std=STD,
    )  # fmt: skip
    made.start_momentum(randomise(student(), seed=7, scale=0.2))  # type: ignore[arg-type]
    return made


def numbers(rule: str = "sampled_high", batch: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, noise_length(rule, 12), generator=generator)


def look(
    made: FrozenNetworks, alpha: float = 0.3, **more: Any
) -> tuple[Mask, dict[str, Tensor], Any]:
    return made(pictures(), numbers(made.mask.rule), N_MASK, Alphas(alpha, alpha), **more)


def close(ours: Tensor, wanted: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(ours, wanted, atol=atol, rtol=0)
