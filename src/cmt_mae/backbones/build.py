"""From weights in timm's names to a timm model: names checked, positions resized."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import resize_rel_pos_bias_table
from timm.models import is_model_in_modules
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from cmt_mae.backbones.backbone import CROP, Backbone, backbone_digest, learned_state
from cmt_mae.backbones.selfcheck import check_features
from cmt_mae.core.errors import InputError
from cmt_mae.core.text import one_line

VIT_MODULES = ("vision_transformer", "deit", "eva", "beit")
"""Modules of timm with plain vision transformers."""
MAX_PIXELS = 8192
"""Largest accepted side of an input image: a bound on what a hostile file can make us allocate."""


# What a file may ask timm for. Everything else (checkpoint_path, pretrained_cfg, ...) could make
# timm read or fetch other files, so a file that holds it is refused.
ALLOWED_KWARGS = frozenset(
    """
    img_size patch_size in_chans embed_dim depth num_heads mlp_ratio qkv_bias qk_norm init_values
    class_token global_pool fc_norm use_fc_norm pos_embed no_embed_class reg_tokens num_reg_tokens
    pre_norm final_norm dynamic_img_size dynamic_img_pad use_abs_pos_emb use_rel_pos_bias
    use_shared_rel_pos_bias scale_mlp swiglu_mlp drop_path_rate act_layer
    """.split()  # noqa: SIM905
)


TAKE = "take a timm VisionTransformer, Eva or Beit"


@dataclass
class UnbuiltBackbone:
    """Weights of a headless ViT in timm's names, with what their file says of the network; None: it does not.

    `facts.complete` fills in what is missing, or refuses, before the model is built.
    """

    state: dict[str, Tensor]
    source: str
    architecture: str | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of timm.create_model, with img_size = the size that the weights are for."""
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    known_from: dict[str, str] = field(default_factory=dict)
    """Where network, normalisation and grid are known from."""
    usual: bool = False
    """Mean and std are those of the kind's published weights: others may be given for one's own."""
    square: bool = False
    """The code that writes such files knows square images only."""
    heads: dict[tuple[int, int], int] = field(default_factory=dict)
    """(width, depth) -> heads in the published code of this kind of file."""
    ask: str = ""
    """Why the shapes alone do not say the network (an activation that differs), and what would; "": they do."""
    licence: str | None = None
    proj: Tensor | None = None
    head: Tensor | None = None
    """A head without bias, which is the projection if the network is CLIP's."""
    self_check: list[float] = field(default_factory=list)
    """Features of a fixed picture when the file was written, see selfcheck.py; empty: not known."""
    teacher: dict[str, str] = field(default_factory=dict)
    """name, licence, ... of the network that taught it, where the file says so."""
    dropped: list[str] = field(default_factory=list)
    """Keys that the source's format is known to hold and that a backbone does not need."""


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) from one number or two."""
    height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    return height, width


def patch_of(state: dict[str, Tensor], where: str) -> tuple[int, int]:
    """Patch height and width. InputError where there is no patch embedding."""
    conv = state.get("patch_embed.proj.weight")
    if conv is None or conv.ndim != 4:
        raise InputError(f"{where}: no patch embedding; this is no vision transformer we know")
    return int(conv.shape[-2]), int(conv.shape[-1])


def some(names: Iterable[str], limit: int = 6) -> str:
    """The first names of a list, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more


def plain_kwargs(given: dict[str, Any], where: str) -> dict[str, Any]:
    """Sizes that a file gives to timm, with tuples for lists; InputError for anything but sizes."""
    kwargs = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    foreign = sorted(kwargs.keys() - ALLOWED_KWARGS)
    plain = all(
        isinstance(n, int | float | str | None)
        for v in kwargs.values()
        for n in (v if isinstance(v, tuple) else (v,))
    )
    if foreign or not plain:
        raise InputError(f"{where}: gives timm more than sizes: {one_line(str(foreign or kwargs))}")
    return kwargs


def create(architecture: str, kwargs: dict[str, Any], where: str) -> nn.Module:
    """The timm model without head. InputError when timm refuses or it is no vision transformer."""
    require_vit(architecture, where)
    try:
        model: nn.Module = timm.create_model(
            architecture, pretrained=False, num_classes=0, **kwargs
        )
    except (
        TypeError,
        ValueError,
        AssertionError,
        RuntimeError,
        LookupError,
        ArithmeticError,
    ) as error:
        raise InputError(
            f"{where}: timm cannot build '{architecture}' with {kwargs}: {one_line(error)}"
        ) from error
    if not isinstance(model, VisionTransformer | Eva | Beit):
        raise InputError(f"{where}: '{architecture}' is a {type(model).__name__}; {TAKE}")
    return model


def require_vit(architecture: str, where: str) -> None:
    """InputError unless the name is that of one of timm's plain vision transformers."""
    if not timm.is_model(architecture):
        raise InputError(f"{where}: timm {timm.__version__} has no model '{architecture}'")
    if not is_model_in_modules(architecture, VIT_MODULES):
        raise InputError(f"{where}: '{architecture}' is no plain vision transformer; {TAKE}")


def resize_positions(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Position table (1, prefix + old_h * old_w, D) for another grid; prefix rows stay.

    Bicubic, align_corners False, no antialias, as MAE does (spec section 10; util/pos_embed.py).
    """
    prefix = table.shape[1] - old[0] * old[1]
    head, grid = table[:, :prefix].float(), table[:, prefix:].float()
    grid = grid.reshape(1, old[0], old[1], -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=new, mode="bicubic", align_corners=False)
    return torch.cat([head, grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def _resized(
    state: dict[str, Tensor],
    target: dict[str, Tensor],
    old: tuple[int, int],
    new: tuple[int, int],
) -> dict[str, Tensor]:
    """State with its tables of positions brought from the old grid to the new one."""
    if old == new:
        return state
    out = dict(state)
    for name in state.keys() & target.keys():
        if name == "pos_embed" and state[name].shape[1] >= old[0] * old[1]:
            out[name] = resize_positions(state[name], old, new)
        elif name.endswith("relative_position_bias_table"):
            # BEiT's own way (geometric steps), which timm has; it holds for square grids
            with warnings.catch_warnings():  # timm indexes in a way that torch warns of
                warnings.simplefilter("ignore")
                shape = tuple(target[name].shape)
                out[name] = resize_rel_pos_bias_table(state[name].float(), new, shape)
    return out


def check_keys(
    given: dict[str, Tensor], wanted: dict[str, Tensor], where: str, dropped: Sequence[str] = ()
) -> None:
    """InputError that names every kind of key that does not fit: missing, unexpected, misshapen."""
    wrong = [
        f"{k} {tuple(given[k].shape)} instead of {tuple(wanted[k].shape)}"
        for k in given.keys() & wanted.keys()
        if given[k].shape != wanted[k].shape
    ]
    found = {
        "missing": wanted.keys() - given.keys(),
        "unexpected": given.keys() - wanted.keys(),
        "of another shape": wrong,
    }
    parts = [f"{len(v)} {label}: {some(v)}" for label, v in found.items() if v]
    if parts:
        known = f" (besides {len(dropped)} known extras that were left out)" if dropped else ""
        raise InputError(f"{where}: weights do not fit the model; {'; '.join(parts)}{known}")


def check_size(size: tuple[int, int], patch: tuple[int, int], where: str) -> None:
    """InputError unless the image size is sane and splits into whole patches."""
    if not all(0 < side <= MAX_PIXELS for side in size):
        raise InputError(f"{where}: image size {size[0]}x{size[1]} is not within 1..{MAX_PIXELS}")
    if size[0] % patch[0] or size[1] % patch[1]:
        raise InputError(
            f"{where}: image size {size[0]}x{size[1]} does not split into patches of "
            f"{patch[0]}x{patch[1]}; take a multiple"
        )


def _check_claims(weights: UnbuiltBackbone, patches: int, where: str) -> None:
    """InputError when the sizes given to timm are far beyond the tensors: a hostile file."""
    kwargs, state = weights.kwargs, weights.state
    elements = sum(v.numel() for v in state.values())
    rows = [v.shape[-2] for k, v in state.items() if "pos_embed" in k or "position_bias" in k]
    try:
        width, depth = int(kwargs.get("embed_dim", 1)), int(kwargs.get("depth", 1))
        claimed = depth * width * width * (4 + float(kwargs.get("mlp_ratio", 4)))
    except (TypeError, ValueError, OverflowError):
        claimed = float("inf")
    # slack for extras such as registers, and for networks without any table of positions
    if not 0 < claimed <= 2 * elements + 1000 or patches > max(rows, default=1 << 14):
        raise InputError(f"{where}: the sizes it claims do not fit its tensors; it is damaged")


def build(weights: UnbuiltBackbone, img_size: int | Sequence[int] | None, where: str) -> Backbone:
    """The timm model filled with the weights, at another image size if one is wanted."""
    native = pair(weights.kwargs["img_size"])
    size = native if img_size is None else pair(img_size)
    patch = pair(weights.kwargs.get("patch_size", patch_of(weights.state, where)))
    check_size(native, patch, where)
    check_size(size, patch, where)
    _check_claims(weights, (native[0] // patch[0]) * (native[1] // patch[1]), where)
    kwargs = weights.kwargs | {"img_size": size}
    assert weights.architecture is not None
    with torch.random.fork_rng(devices=[]):  # the random numbers of the init are not ours to spend
        model = create(weights.architecture, kwargs, where)
    old = (native[0] // patch[0], native[1] // patch[1])
    new = (size[0] // patch[0], size[1] // patch[1])
    target = learned_state(model)
    state = _resized(weights.state, target, old, new)
    check_keys(state, target, where, weights.dropped)
    broken = [k for k, v in state.items() if not torch.isfinite(v).all()]
    if broken:
        raise InputError(f"{where}: weights that are not finite: {some(broken)}; take another file")
    constants = {k: v for k, v in model.state_dict().items() if k not in target}
    model.load_state_dict({k: v.float() for k, v in state.items()} | constants, strict=True)
    backbone = as_backbone(model, weights, kwargs, where)
    if weights.self_check and size == native:
        check_features(weights.self_check, model, backbone.mean, backbone.std, native, where)
    return backbone


def resized(backbone: Backbone, img_size: int | Sequence[int]) -> Backbone:
    """The same backbone, weights copied to the CPU, with positions for another image size."""
    weights = UnbuiltBackbone(
        {k: v.detach().cpu() for k, v in learned_state(backbone.model).items()}, backbone.source,
        backbone.architecture, dict(backbone.kwargs), backbone.mean, backbone.std, backbone.known_from,
        licence=backbone.licence, proj=backbone.proj, teacher=backbone.teacher,
    )  # fmt: skip
    return build(weights, img_size, backbone.source)


def as_backbone(
    model: nn.Module, weights: UnbuiltBackbone, kwargs: dict[str, Any], where: str
) -> Backbone:
    """A finished model with its description, also as timm's own (`pretrained_cfg`)."""
    assert weights.architecture is not None
    assert weights.mean is not None
    assert weights.std is not None
    model.float().eval()
    channels = int(model.patch_embed.proj.weight.shape[1])  # type: ignore[union-attr, index]
    for name, values in (("mean", weights.mean), ("std", weights.std)):
        if len(values) != channels:
            raise InputError(f"{where}: {channels} channels, but {name} for {len(values)}")
    proj = None if weights.proj is None else weights.proj.detach().float().contiguous()
    backbone = Backbone(
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
        prefix_tokens=int(model.num_prefix_tokens),  # type: ignore[arg-type]
        teacher=weights.teacher,
        known_from=weights.known_from,
    )
    described: Any = model
    described.pretrained_cfg = described.default_cfg = pretrained_cfg(backbone, channels)
    return backbone


def pretrained_cfg(backbone: Backbone, channels: int) -> dict[str, Any]:
    """timm's description of weights: input size and normalisation, for `timm.data.resolve_model_data_config`."""
    return {
        "architecture": backbone.architecture,
        "input_size": (channels, *backbone.img_size),
        "fixed_input_size": True,
        "mean": backbone.mean,
        "std": backbone.std,
        "interpolation": "bicubic",
        "crop_pct": CROP,
        "crop_mode": "center",
        "num_classes": 0 if backbone.proj is None else backbone.proj.shape[0],
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": backbone.licence,
    }
