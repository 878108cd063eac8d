"""What the shapes of a vision transformer's weights (in timm's names) say: sizes, and timm's networks that fit."""

from __future__ import annotations

import math
import re
from functools import cache
from typing import Any

import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from cmt_mae.backbones.backbone import learned_state, network_facts
from cmt_mae.backbones.build import VIT_MODULES, pair, patch_of
from cmt_mae.core.errors import InputError

# (width, depth) -> heads of the networks that MAE, DINO, iBOT, DINOv2, I-JEPA and BEiT have published code for.
PUBLISHED_HEADS = {
    (192, 12): 3, (384, 12): 6, (768, 12): 12, (1024, 24): 16, (1280, 32): 16, (1408, 40): 16,
    (1536, 40): 24, (1664, 48): 16,
}  # fmt: skip

# Sizes that timm has under a name of their own: (width, depth) -> word in the name.
SIZE_WORDS = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large"}
SIZE_WORDS |= {(1280, 32): "huge", (1408, 40): "giant", (1664, 48): "gigantic"}

POSITIONS = ("pos_embed", "relative_position_bias_table")


def sizes_of(state: dict[str, Tensor], where: str) -> dict[str, Any]:
    """patch_size, in_chans, embed_dim, depth and mlp_ratio as timm's arguments; the blocks must be whole."""
    patch = patch_of(state, where)
    width, channels = state["patch_embed.proj.weight"].shape[:2]
    blocks = {int(m[1]) for k in state if (m := re.match(r"blocks\.(\d{1,4})\.", k))}
    hidden = state.get("blocks.0.mlp.fc1.weight", state.get("blocks.0.mlp.fc1_x.weight"))
    if blocks != set(range(len(blocks))) or hidden is None or hidden.ndim != 2:
        raise InputError(f"{where}: its blocks are not complete or not those of a ViT we know")
    ratio = hidden.shape[0] / width
    if int(width * ratio) != hidden.shape[0]:  # rounding
        ratio = math.nextafter(ratio, math.inf)
    return {
        "patch_size": patch[0] if patch[0] == patch[1] else patch,
        "in_chans": channels,
        "embed_dim": width,
        "depth": len(blocks),
        "mlp_ratio": ratio,
    }


def infer_vit(
    state: dict[str, Tensor], where: str, clip: str | None = None
) -> tuple[str, dict[str, Any]]:
    """Architecture and arguments of a timm VisionTransformer of a known kind; heads and image size are left out.

    `clip` is "clip" or "clip_quickgelu" for CLIP's towers: norm before the blocks, LayerNorm eps
    1e-5, GELU or QuickGELU; None for the rest: eps 1e-6, GELU.
    Raises InputError that names `where` when the shapes make no vision transformer.
    """
    kwargs = sizes_of(state, where)
    has_cls = "cls_token" in state
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
    if ("norm_pre.weight" in state) != (clip is not None):
        raise InputError(
            f"{where}: {'no' if clip else 'a'} norm before its blocks: not the kind of network that it says it is"
        )
    return _family(state, kwargs, clip), kwargs


def _family(state: dict[str, Tensor], kwargs: dict[str, Any], clip: str | None) -> str:
    """The timm name that the arguments are laid over: it decides activation, norm eps, kind of MLP."""
    if "dist_token" in state:
        return "deit_base_distilled_patch16_224"
    fc1, fc2 = state["blocks.0.mlp.fc1.weight"], state.get("blocks.0.mlp.fc2.weight")
    if fc2 is not None and fc1.shape[0] == 2 * fc2.shape[1]:
        return "vit_giant_patch14_dinov2"  # its SwiGLU is no plain argument
    word = SIZE_WORDS.get((kwargs["embed_dim"], kwargs["depth"]), "base")
    kind = f"_{clip}_" if clip else "_"
    named = f"vit_{word}_patch{kwargs['patch_size']}{kind}224"
    return named if timm.is_model(named) else f"vit_base_patch16{kind}224"


def infer_beit(state: dict[str, Tensor], where: str) -> tuple[str, dict[str, Any]]:
    """Architecture and arguments of a timm Beit: relative positions and layer scale in its forward.

    The number of heads is that of the tables of relative positions, which have one column a head.
    """
    kwargs = sizes_of(state, where)
    tables = [v for k, v in state.items() if k.endswith("relative_position_bias_table")]
    if tables:
        kwargs["num_heads"] = tables[0].shape[1]
    kwargs |= {
        "use_abs_pos_emb": "pos_embed" in state,
        "use_shared_rel_pos_bias": "rel_pos_bias.relative_position_bias_table" in state,
        "use_rel_pos_bias": "blocks.0.attn.relative_position_bias_table" in state,
        "qkv_bias": "blocks.0.attn.q_bias" in state,
        "init_values": 0.1 if "blocks.0.gamma_1" in state else None,
        "global_pool": "token" if "norm.weight" in state else "avg",
    }
    word = SIZE_WORDS.get((kwargs["embed_dim"], kwargs["depth"]), "base")
    named = f"beit_{word}_patch{kwargs['patch_size']}_224"
    return (named if timm.is_model(named) else "beit_base_patch16_224"), kwargs


# --- the grid of positions -----------------------------------------------------------------------


def table_holds(state: dict[str, Tensor], grid: tuple[int, int]) -> bool:
    """Whether the tables of positions are for this grid; True where there are none (rotary positions)."""
    rows, columns = grid
    absolute = state.get("pos_embed")
    if absolute is not None and absolute.shape[-2] - rows * columns not in (0, prefix_of(state)):
        return False
    wanted = (2 * rows - 1) * (2 * columns - 1) + 3
    return all(v.shape[0] == wanted for k, v in state.items() if k.endswith(POSITIONS[1]))


def prefix_of(state: dict[str, Tensor]) -> int:
    """Tokens before the patches: class token, distillation token, registers."""
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    return int("cls_token" in state) + int("dist_token" in state) + registers


def square_grid(state: dict[str, Tensor]) -> tuple[int, int] | None:
    """The square grid that the tables of positions can be for, if any."""
    absolute = state.get("pos_embed")
    tables = [v for k, v in state.items() if k.endswith(POSITIONS[1])]
    if absolute is not None:
        patches = [absolute.shape[-2] - prefix_of(state), absolute.shape[-2]]
        sides = [math.isqrt(n) for n in patches if n > 0 and math.isqrt(n) ** 2 == n]
    else:
        sides = [(math.isqrt(max(t.shape[0] - 3, 0)) + 1) // 2 for t in tables[:1]]
    return next(((s, s) for s in sides if s > 0 and table_holds(state, (s, s))), None)


def positions_without_prefix(state: dict[str, Tensor], grid: tuple[int, int]) -> bool:
    """Whether the table of positions has rows for patches alone, though there are other tokens."""
    table = state.get("pos_embed")
    patches = grid[0] * grid[1]
    return table is not None and prefix_of(state) > 0 and table.shape[-2] == patches


def fixed_positions(table: Tensor | None) -> tuple[str, tuple[int, int]] | None:
    """("mae" or "moco", grid) of a fixed sine-cosine table (1, 1 + rows * columns, D), else None.

    MAE's first half of the channels encodes the column, MoCo v3's the row (spec section 4).
    """
    if table is None or table.ndim != 3 or table.shape[-1] % 4 or table[0, 0].any():
        return None
    patches, quarter = table.shape[1] - 1, table.shape[-1] // 4
    omega = 1 / 10000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    for rows in (n for n in range(1, patches + 1) if patches % n == 0):
        grid = (rows, patches // rows)
        row, column = (
            v.flatten()[:, None] * omega
            for v in torch.meshgrid(*map(torch.arange, grid), indexing="ij")
        )
        halves = {
            "mae": torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], 1),
            "moco": torch.cat([row.sin(), row.cos(), column.sin(), column.cos()], 1),
        }
        for kind, wanted in halves.items():
            if torch.allclose(table[0, 1:].double(), wanted, atol=2e-3):  # of files in fp16 too
                return kind, grid
    return None


# --- timm's networks that have just these shapes -------------------------------------------------


def meta_model(name: str, **kwargs: Any) -> nn.Module | None:
    """A timm model without memory behind its weights; None where timm does not build it so."""
    try:
        with torch.device("meta"):
            model: nn.Module = timm.create_model(name, num_classes=0, **kwargs)
    except (TypeError, ValueError, AssertionError, RuntimeError, KeyError):
        return None
    return model


@cache
def _with_one_block(name: str) -> dict[str, tuple[int, ...]]:
    model = meta_model(name, depth=1)
    return {} if model is None else shapes(learned_state(model))


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Name -> shape, with what may differ in a file of the same network made comparable.

    Lengths of positions and the number of channels are left out; a norm after pooling (fine-tuned
    networks) counts as the norm after the blocks.
    """
    found = {k: tuple(v.shape) for k, v in state.items()}
    if "fc_norm.weight" in found and "norm.weight" not in found:
        found = {re.sub(r"^fc_norm\.", "norm.", k): v for k, v in found.items()}
    for name, shape in found.items():
        if name.endswith(POSITIONS):
            found[name] = shape[:-2] + shape[-1:]
        elif name == "patch_embed.proj.weight":
            found[name] = shape[:1] + shape[2:]
    return found


def is_just(state: dict[str, Tensor], name: str) -> bool:
    """Whether names and shapes are those of a timm architecture, positions and channels left aside."""
    wanted = shapes(state)
    one = {k: v for k, v in wanted.items() if not re.match(r"blocks\.[1-9]", k)}
    if _with_one_block(name) != one:
        return False
    model = meta_model(name)
    return model is not None and shapes(learned_state(model)) == wanted


def fitting(state: dict[str, Tensor], patch: tuple[int, int]) -> list[str]:
    """timm's plain vision transformers with just these names and shapes, the likeliest first."""
    names = [n for module in VIT_MODULES for n in timm.list_models(module=module)]
    named = [m and int(m[1]) for m in (re.search(r"patch(\d+)", n) for n in names)]
    fits = [
        n for n, p in zip(names, named, strict=True) if p in (None, patch[0]) and is_just(state, n)
    ]
    return sorted(fits, key=lambda n: (not table_holds(state, native_grid(n, patch)), len(n), n))


def native_grid(name: str, patch: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches of a timm architecture at its own image size."""
    model: Any = meta_model(name, depth=1)
    height, width = pair(model.patch_embed.img_size) if model is not None else (0, 0)
    return height // patch[0], width // patch[1]


def behaviour(name: str) -> tuple[Any, ...]:
    """What a timm architecture computes beyond its shapes, for telling two of the same shapes apart."""
    model: Any = meta_model(name, depth=1)
    rope = getattr(model, "rope", None)
    turning = (
        {k: str(v) for k, v in vars(rope).items() if k[0] != "_" and k != "feat_shape"}
        if rope is not None
        else {}
    )
    kind = next((k for k in (VisionTransformer, Eva) if isinstance(model, k)), type(model))
    facts = network_facts(model)
    return kind, repr(model.blocks[0]), repr(model.norm_pre) if kind is VisionTransformer else "", [
        *facts.values(), *turning.items(),
    ]  # fmt: skip
