"""The architecture of a vision transformer from the shapes of its weights (timm's names)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import timm
from torch import Tensor

from cmt_mae.core.errors import InputError

# Widths whose heads are not 64 wide: So400m, ViT-H, ViT-g and ViT-G all have 16 heads.
HEADS_OF_WIDTH = {1152: 16, 1280: 16, 1408: 16, 1664: 16}

# Sizes that timm has under a name of their own: (width, depth) -> word in the name.
SIZE_WORDS = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large"}
SIZE_WORDS |= {(1280, 32): "huge", (1408, 40): "giant", (1664, 48): "gigantic"}

GIVE_NAME = "name the file after its timm model (NAME.safetensors) or put its config.json beside it"


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) from one number or two."""
    height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    return height, width


def infer_vit(
    state: dict[str, Tensor],
    where: str,
    *,
    heads: int | None = None,
    img_size: Sequence[int] | None = None,
    clip: str | None = None,
) -> tuple[str, dict[str, Any]]:
    """Architecture and kwargs of a timm VisionTransformer from a state dict in timm's names.

    `heads` is needed where heads are not 64 wide; `img_size` where the grid is not a square.
    `clip` is "clip" or "clip_quickgelu" for CLIP's towers: norm before the blocks, LayerNorm eps
    1e-5, GELU or QuickGELU; None for the rest: eps 1e-6, GELU.
    Raises InputError that names `where` when the shapes make no vision transformer.
    """
    kwargs, patch = _common(state, where, heads)
    if "pos_embed" not in state:
        raise InputError(f"{where}: no table of positions; kind of network unknown; {GIVE_NAME}")
    has_cls = "cls_token" in state
    kwargs["img_size"], with_prefix = native_size(state, patch, where, img_size)
    if not with_prefix:
        kwargs["no_embed_class"] = True
    if not has_cls:
        kwargs["class_token"] = False
    if "reg_token" in state:
        kwargs["reg_tokens"] = state["reg_token"].shape[1]
    if "blocks.0.attn.qkv.bias" not in state:
        kwargs["qkv_bias"] = False
    if "blocks.0.attn.q_norm.weight" in state:
        kwargs["qk_norm"] = True
    if "blocks.0.ls1.gamma" in state:
        kwargs["init_values"] = 1e-5  # any number: it makes the parameter, the file fills it
    if "attn_pool.latent" in state:
        kwargs["global_pool"] = "map"
    elif "norm.weight" not in state:
        kwargs["global_pool"] = "avg"  # fine-tuned on pooled tokens: fc_norm instead of norm
    elif not has_cls:
        kwargs |= {"global_pool": "avg", "fc_norm": False}
    return _architecture(state, where, kwargs, clip), kwargs


def infer_beit(state: dict[str, Tensor], where: str) -> tuple[str, dict[str, Any]]:
    """Architecture and kwargs of a timm Beit: relative positions and layer scale in its forward.

    The number of heads and the grid are those of the tables of relative positions
    ((2h-1)(2w-1)+3 rows, one column a head); a square grid is taken for granted.
    """
    tables = [v for k, v in state.items() if k.endswith("relative_position_bias_table")]
    heads = tables[0].shape[1] if tables else None
    kwargs, patch = _common(state, where, heads)
    absolute = state.get("pos_embed")
    if tables:
        side = (math.isqrt(max(tables[0].shape[0] - 3, 0)) + 1) // 2
        fits = (2 * side - 1) ** 2 + 3 == tables[0].shape[0]
    else:
        patches = 0 if absolute is None else absolute.shape[1] - 1
        side = math.isqrt(max(patches, 0))
        fits = side > 0 and side * side == patches
    if not fits:
        raise InputError(f"{where}: its positions are no square grid; image size unknown")
    kwargs |= {
        "img_size": (side * patch[0], side * patch[1]),
        "use_abs_pos_emb": absolute is not None,
        "use_shared_rel_pos_bias": "rel_pos_bias.relative_position_bias_table" in state,
        "use_rel_pos_bias": "blocks.0.attn.relative_position_bias_table" in state,
        "qkv_bias": "blocks.0.attn.q_bias" in state,
        "init_values": 0.1 if "blocks.0.gamma_1" in state else None,
        "global_pool": "token" if "norm.weight" in state else "avg",
    }
    word = SIZE_WORDS.get((kwargs["embed_dim"], kwargs["depth"]), "base")
    named = f"beit_{word}_patch{patch[0]}_224"
    return (named if timm.is_model(named) else "beit_base_patch16_224"), kwargs


def _common(
    state: dict[str, Tensor], where: str, heads: int | None
) -> tuple[dict[str, Any], tuple[int, int]]:
    """Width, depth, heads, patch size, channels and MLP ratio; checks that the blocks are whole."""
    conv = state.get("patch_embed.proj.weight")
    if conv is None or conv.ndim != 4:
        raise InputError(f"{where}: no patch embedding; this is no vision transformer we know")
    width, channels, patch_h, patch_w = conv.shape
    blocks = {int(m[1]) for k in state if (m := re.match(r"blocks\.(\d{1,4})\.", k))}
    hidden = state.get("blocks.0.mlp.fc1.weight")
    if blocks != set(range(len(blocks))) or hidden is None or hidden.ndim != 2:
        raise InputError(f"{where}: its blocks are not complete or not those of a ViT; {GIVE_NAME}")
    heads = heads or HEADS_OF_WIDTH.get(width) or width // 64
    if heads < 1 or width % heads:
        raise InputError(f"{where}: width {width} is no multiple of 64: heads unknown; {GIVE_NAME}")
    ratio = hidden.shape[0] / width
    if int(width * ratio) != hidden.shape[0]:  # rounding
        ratio = math.nextafter(ratio, math.inf)
    kwargs: dict[str, Any] = {
        "patch_size": patch_h if patch_h == patch_w else (patch_h, patch_w),
        "in_chans": channels,
        "embed_dim": width,
        "depth": len(blocks),
        "num_heads": heads,
        "mlp_ratio": ratio,
    }
    return kwargs, (patch_h, patch_w)


def native_size(
    state: dict[str, Tensor],
    patch: tuple[int, int],
    where: str,
    img_size: Sequence[int] | None = None,
) -> tuple[tuple[int, int], bool]:
    """Image size that the table of positions is for, and whether it has rows for prefix tokens.

    `img_size` is taken if the table fits it; otherwise the grid is a square. InputError if neither.
    """
    rows = state["pos_embed"].shape[1]
    prefix = int("cls_token" in state) + int("dist_token" in state)
    prefix += state["reg_token"].shape[1] if "reg_token" in state else 0
    for inside in (prefix, 0):
        grid = _grid(rows - inside, patch, img_size)
        if grid is not None:
            return (grid[0] * patch[0], grid[1] * patch[1]), inside == prefix
    raise InputError(f"{where}: {rows} positions are no square grid; image size unknown")


def _grid(
    patches: int, patch: tuple[int, int], img_size: Sequence[int] | None
) -> tuple[int, int] | None:
    """The grid of a known image size if it has so many patches, else the square one, else None."""
    if img_size is not None:
        rows, columns = pair(img_size)[0] // patch[0], pair(img_size)[1] // patch[1]
        if rows * columns == patches:
            return rows, columns
    side = math.isqrt(max(patches, 0))
    return (side, side) if side and side * side == patches else None


def _architecture(
    state: dict[str, Tensor], where: str, kwargs: dict[str, Any], clip: str | None
) -> str:
    """The timm name that the kwargs are laid over: it decides activation, norm eps, kind of MLP."""
    if ("norm_pre.weight" in state) != (clip is not None):
        raise InputError(
            f"{where}: a CLIP tower, and nothing says if it computes GELU or QuickGELU; {GIVE_NAME}"
            if clip is None
            else f"{where}: no norm before its blocks; this is no CLIP tower we know"
        )
    if "dist_token" in state:
        return "deit_base_distilled_patch16_224"
    fc1, fc2 = state["blocks.0.mlp.fc1.weight"], state.get("blocks.0.mlp.fc2.weight")
    if fc2 is not None and fc1.shape[0] == 2 * fc2.shape[1]:
        return "vit_giant_patch14_dinov2"  # its SwiGLU cannot be asked for by a plain kwarg
    word = SIZE_WORDS.get((kwargs["embed_dim"], kwargs["depth"]), "base")
    kind = f"_{clip}_" if clip else "_"
    named = f"vit_{word}_patch{kwargs['patch_size']}{kind}224"
    return named if timm.is_model(named) else f"vit_base_patch16{kind}224"
