"""From weights in timm's names to a timm model: sizes inferred, names checked, positions resized."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import resize_rel_pos_bias_table
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from cmt_mae.backbones.backbone import Backbone, backbone_digest
from cmt_mae.errors import InputError

# Widths whose heads are not 64 wide: So400m, ViT-H, ViT-g and ViT-G all have 16 heads.
HEADS_OF_WIDTH = {1152: 16, 1280: 16, 1408: 16, 1664: 16}

# Plain ViTs that timm has under a name of their own: (width, depth, heads) -> size.
PLAIN_SIZES = {(192, 12, 3): "tiny", (384, 12, 6): "small", (768, 12, 12): "base"}
PLAIN_SIZES |= {(1024, 24, 16): "large", (1280, 32, 16): "huge"}

MAX_PIXELS = 8192
"""Largest accepted side of an input image: a bound on what a hostile file can make us allocate."""


@dataclass
class Weights:
    """Weights of a headless ViT in timm's names, with all that is needed to build the model."""

    state: dict[str, Tensor]
    architecture: str
    kwargs: dict[str, Any]
    """Arguments of timm.create_model, with img_size = the size that the weights are for."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str
    licence: str | None = None
    proj: Tensor | None = None
    dropped: list[str] = field(default_factory=list)
    """Keys that the source's format is known to hold and that a backbone does not need."""


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) from one number or two."""
    height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    return height, width


def create(architecture: str, kwargs: dict[str, Any]) -> nn.Module:
    """The timm model without head. InputError when timm refuses or it is no vision transformer."""
    if not timm.is_model(architecture):
        raise InputError(f"timm {timm.__version__} has no model '{architecture}'; update timm")
    try:
        model = timm.create_model(architecture, pretrained=False, num_classes=0, **kwargs)
    except (TypeError, ValueError, AssertionError, RuntimeError, ZeroDivisionError) as error:
        raise InputError(f"timm cannot build '{architecture}' with {kwargs}: {one_line(error)}") from error
    require_vit(model, architecture)
    return model


def require_vit(model: nn.Module, name: str) -> None:
    """InputError unless the model is one of timm's plain vision transformers."""
    if not isinstance(model, (VisionTransformer, Eva, Beit)) or not hasattr(
        model.patch_embed, "patch_size"
    ):
        raise InputError(
            f"'{name}' is a {type(model).__name__}, not a plain vision transformer; "
            "take a timm VisionTransformer, Eva or Beit"
        )


def one_line(error: BaseException) -> str:
    """An error's text on one line of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + "..."


def some(names: Iterable[str], limit: int = 6) -> str:
    """The first names of a list, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more


# --- sizes from shapes ---------------------------------------------------------------------------


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
    `clip` is the architecture to start from for CLIP (LayerNorm eps 1e-5, its activation).
    Raises InputError that names `where` when shapes are missing or make no vision transformer.
    """
    conv = state.get("patch_embed.proj.weight")
    if conv is None or conv.ndim != 4:
        raise InputError(f"{where}: no patch_embed.proj.weight; this is not a vision transformer")
    width, channels, patch_h, patch_w = conv.shape
    blocks = [int(m[1]) for k in state if (m := re.match(r"blocks\.(\d+)\.norm1\.weight$", k))]
    hidden = state.get("blocks.0.mlp.fc1.weight")
    if not blocks or sorted(blocks) != list(range(len(blocks))) or hidden is None:
        raise InputError(f"{where}: blocks.0 ... blocks.n are not complete; the file is damaged")
    if heads is None:
        heads = HEADS_OF_WIDTH.get(width) or width // 64
    if heads < 1 or width % heads:
        raise InputError(f"{where}: width {width} does not split into heads of 64; heads unknown")
    patch: int | tuple[int, int] = patch_h if patch_h == patch_w else (patch_h, patch_w)
    kwargs: dict[str, Any] = {
        "patch_size": patch,
        "in_chans": channels,
        "embed_dim": width,
        "depth": len(blocks),
        "num_heads": heads,
        "mlp_ratio": _mlp_ratio(width, hidden.shape[0]),
    }
    kwargs |= _prefix_and_positions(state, where, (patch_h, patch_w), img_size)
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
    elif "cls_token" not in state:
        kwargs |= {"global_pool": "avg", "fc_norm": False}
    return clip or _base_architecture(state, kwargs), kwargs


def _base_architecture(state: dict[str, Tensor], kwargs: dict[str, Any]) -> str:
    """The timm name that the kwargs are laid over; all of these have LayerNorm eps 1e-6, GELU."""
    if "norm_pre.weight" in state:
        return "vit_base_patch16_clip_224"
    if "dist_token" in state:
        return "deit_base_distilled_patch16_224"
    fc1, fc2 = state["blocks.0.mlp.fc1.weight"], state["blocks.0.mlp.fc2.weight"]
    if fc1.shape[0] == 2 * fc2.shape[1]:
        return "vit_giant_patch14_dinov2"  # its SwiGLU cannot be asked for by a plain kwarg
    size = PLAIN_SIZES.get((kwargs["embed_dim"], kwargs["depth"], kwargs["num_heads"]), "base")
    named = f"vit_{size}_patch{kwargs['patch_size']}_224"
    return named if timm.is_model(named) else "vit_base_patch16_224"


def _mlp_ratio(width: int, hidden: int) -> float:
    """A ratio with int(width * ratio) == hidden, in spite of rounding."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _prefix_and_positions(
    state: dict[str, Tensor], where: str, patch: tuple[int, int], img_size: Sequence[int] | None
) -> dict[str, Any]:
    """Class token, registers, kind and size of the position table, as kwargs."""
    kwargs: dict[str, Any] = {}
    has_cls = "cls_token" in state
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    if not has_cls:
        kwargs["class_token"] = False
    if registers:
        kwargs["reg_tokens"] = registers
    table = state.get("pos_embed")
    if table is None:
        if img_size is None:
            raise InputError(f"{where}: no pos_embed and no image size; give the image size")
        return kwargs | {"pos_embed": "none", "img_size": pair(img_size)}
    prefix = int(has_cls) + registers + int("dist_token" in state)
    tokens = table.shape[-2]
    for inside in (prefix, 0):  # is there a row for each prefix token, or for patches alone?
        grid = _grid(tokens - inside, patch, img_size)
        if grid is not None:
            if inside == 0 and prefix:
                kwargs["no_embed_class"] = True
            return kwargs | {"img_size": (grid[0] * patch[0], grid[1] * patch[1])}
    raise InputError(f"{where}: pos_embed has {tokens} rows, which is no square grid; size unknown")


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


# --- another image size --------------------------------------------------------------------------


def resize_positions(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Position table (1, prefix + old_h * old_w, D) for another grid; prefix rows stay.

    Bicubic, align_corners False, no antialias, as MAE does (spec section 10; util/pos_embed.py).
    """
    prefix = table.shape[1] - old[0] * old[1]
    head, grid = table[:, :prefix], table[:, prefix:]
    grid = grid.float().reshape(1, old[0], old[1], -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=new, mode="bicubic", align_corners=False)
    return torch.cat([head.float(), grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def _resized(
    state: dict[str, Tensor],
    target: dict[str, Tensor],
    old: tuple[int, int],
    new: tuple[int, int],
) -> dict[str, Tensor]:
    """State with position tables brought from the old grid to the new one (as `target` wants)."""
    out = dict(state)
    for name, tensor in state.items():
        if name not in target or tensor.shape == target[name].shape and old == new:
            continue
        if name == "pos_embed":
            out[name] = resize_positions(tensor, old, new)
        elif name.endswith("relative_position_bias_table"):
            if old[0] != old[1]:
                raise InputError("relative positions of a grid that is no square cannot be resized")
            out[name] = resize_rel_pos_bias_table(tensor.float(), new, tuple(target[name].shape))
    return out


# --- weights -> model ----------------------------------------------------------------------------


def check_keys(
    given: dict[str, Tensor], wanted: dict[str, Tensor], where: str, dropped: Sequence[str] = ()
) -> None:
    """InputError that names every missing, unexpected or misshapen key (the first of each kind)."""
    missing, unexpected = wanted.keys() - given.keys(), given.keys() - wanted.keys()
    wrong = [
        f"{k} {tuple(given[k].shape)} instead of {tuple(wanted[k].shape)}"
        for k in given.keys() & wanted.keys()
        if given[k].shape != wanted[k].shape
    ]
    parts = []
    for label, names in (("missing", missing), ("unexpected", unexpected), ("shape", wrong)):
        if names:
            parts.append(f"{len(names)} {label}: {some(names)}")
    if parts:
        known = f" (left out as known extras: {len(dropped)})" if dropped else ""
        raise InputError(f"{where}: weights do not fit the model; {'; '.join(parts)}{known}")


def check_size(size: tuple[int, int], patch: tuple[int, int], where: str) -> None:
    """InputError unless the image size is sane and splits into whole patches."""
    if not all(0 < side <= MAX_PIXELS for side in size):
        raise InputError(f"{where}: image size {size} is out of range 1..{MAX_PIXELS}")
    if size[0] % patch[0] or size[1] % patch[1]:
        raise InputError(
            f"{where}: image size {size[0]}x{size[1]} does not split into patches of "
            f"{patch[0]}x{patch[1]}; take a multiple"
        )


def build(weights: Weights, img_size: int | Sequence[int] | None, where: str) -> Backbone:
    """The timm model filled with the weights, at another image size if one is asked for."""
    native = pair(weights.kwargs["img_size"])
    size = native if img_size is None else pair(img_size)
    patch = state_patch(weights.state, weights.kwargs)
    check_size(native, patch, where)
    check_size(size, patch, where)
    kwargs = weights.kwargs | {"img_size": size}
    with torch.random.fork_rng(devices=[]):  # the random numbers of the init are not ours to spend
        model = create(weights.architecture, kwargs)
    target = model.state_dict()
    old = (native[0] // patch[0], native[1] // patch[1])
    new = (size[0] // patch[0], size[1] // patch[1])
    state = _resized(weights.state, target, old, new)
    check_keys(state, target, where, weights.dropped)
    model.load_state_dict({k: v.float() for k, v in state.items()}, strict=True)
    return as_backbone(model, weights, kwargs)


def state_patch(state: dict[str, Tensor], kwargs: dict[str, Any]) -> tuple[int, int]:
    """Patch height and width, from kwargs or from the patch embedding's own shape."""
    if "patch_size" in kwargs:
        return pair(kwargs["patch_size"])
    height, width = state["patch_embed.proj.weight"].shape[-2:]
    return int(height), int(width)


def as_backbone(model: nn.Module, weights: Weights, kwargs: dict[str, Any]) -> Backbone:
    """A finished model with its description; checks the number of channels of mean and std."""
    model.float().eval()
    proj = None if weights.proj is None else weights.proj.detach().float().contiguous()
    return Backbone(
        model=model,
        architecture=weights.architecture,
        kwargs=kwargs,
        mean=tuple(weights.mean),
        std=tuple(weights.std),
        img_size=pair(kwargs["img_size"]),
        proj=proj,
        source=weights.source,
        licence=weights.licence,
        digest=backbone_digest(model, proj),
        has_cls=getattr(model, "cls_token", None) is not None,
        prefix_tokens=int(getattr(model, "num_prefix_tokens")),  # noqa: B009 (nn.Module in types)
    )
