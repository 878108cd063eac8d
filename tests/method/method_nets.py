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
