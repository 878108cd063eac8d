"""CLIP's image towers: OpenAI's archive, open_clip; and what holds for Hugging Face's too.

What makes them differ from other ViTs (spec section 1.5): no bias in the patch embedding, a norm
before the blocks, LayerNorm eps 1e-5, QuickGELU x * sigmoid(1.702 x) where the weights were
trained with it, CLIP's own mean and std, and a projection after the final norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from cmt_mae.backbones.backbone import CLIP_MEAN, CLIP_STD
from cmt_mae.backbones.build import UnbuiltBackbone, pair
from cmt_mae.backbones.container import Container
from cmt_mae.backbones.licences import if_published
from cmt_mae.backbones.names import drop, rename, select
from cmt_mae.backbones.shapes import infer_vit
from cmt_mae.core.errors import InputError

CLIP_NORM = (CLIP_MEAN, CLIP_STD)
GELU_OR_QUICK = (
    "it may compute GELU or QuickGELU: put its open_clip_config.json beside it, or take NAME "
    "vit_base_patch16_clip_224 or vit_base_patch16_clip_quickgelu_224 and so on"
)

# Everything of a CLIP file that is not its image tower.
TEXT = (
    r"^(transformer|token_embedding|ln_final|text|text_decoder|text_model|text_projection"
    r"|positional_embedding|logit_scale|logit_bias|attn_mask|context_length|vocab_size"
    r"|input_resolution)(\.|$)"
)

OPENAI_RULES = (
    (r"^conv1\.", "patch_embed.proj."),
    (r"^class_embedding$", "cls_token"),
    (r"^positional_embedding$", "pos_embed"),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (r"^transformer\.resblocks\.", "blocks."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.ls_([12])\.", r".ls\1."),
)


def read_openai(state: dict[str, Tensor], container: Container) -> UnbuiltBackbone:
    """OpenAI's archive or an open_clip file: names `visual.*` (spec section 10).

    OpenAI's code has QuickGELU and heads of 64 channels; an open_clip_config.json says both; other
    files do not say whether their weights need GELU or QuickGELU.
    """
    where = str(container.path)
    tower, dropped = select(state, "visual.", TEXT)
    if any(k.startswith("layer1.") for k in tower):
        raise InputError(f"{where}: this CLIP has a ResNet as image tower; take one with a ViT")
    proj = tower.pop("proj", None)
    tower = with_batch_axis(rename(tower, OPENAI_RULES))
    settings, vision = open_clip_settings(container)
    openai = container.torchscript or "input_resolution" in state
    weights = UnbuiltBackbone(
        tower, where, proj=None if proj is None else proj.t(), dropped=dropped, ask=GELU_OR_QUICK
    )
    if openai or settings:
        quick = openai or bool(settings.get("quick_gelu", False))
        kind = "OpenAI's code" if openai else "open_clip_config.json"
        weights.architecture, kwargs = infer_vit(
            tower, where, clip="clip_quickgelu" if quick else "clip"
        )
        head_width = vision.get("head_width", 64)  # the default of both
        if isinstance(head_width, int) and head_width > 0:
            kwargs["num_heads"] = max(1, int(kwargs["embed_dim"]) // head_width)
        if isinstance(vision.get("image_size"), int | list):
            kwargs["img_size"] = pair(vision["image_size"])
        weights.kwargs, weights.square = kwargs, True
        weights.known_from = {"network": kind, "normalisation": kind, "grid": kind}
    if openai:
        weights.mean, weights.std, weights.licence = *CLIP_NORM, if_published("MIT")
    else:
        weights.mean, weights.std = normalisation(
            container.open_clip.get("preprocess_cfg"), "mean", "std"
        ) or (None, None)
    weights.source = f"{where} ({'OpenAI' if openai else 'open_clip'} CLIP)"
    return weights


def read_open_clip_trunk(state: dict[str, Tensor], container: Container) -> UnbuiltBackbone:
    """open_clip with a timm network as image tower (SigLIP and others): names `visual.trunk.*`."""
    proj = state.get("visual.head.proj.weight")
    rest = r"^(visual\.head|text|logit_scale|logit_bias|transformer|token_embedding|ln_final"
    rest += r"|positional_embedding|text_projection|attn_mask)(\.|$)"
    state, dropped = select(state, "visual.trunk.", rest)
    state, heads = drop(state, r"^head\.")
    mean, std = normalisation(container.open_clip.get("preprocess_cfg"), "mean", "std") or (
        None, None,
    )  # fmt: skip
    settings, vision = open_clip_settings(container)
    weights = UnbuiltBackbone(
        state, f"{container.path} (open_clip, timm tower)", mean=mean, std=std, proj=proj,
        dropped=dropped + heads, known_from={"normalisation": "open_clip_config.json"},
    )  # fmt: skip
    name = str(vision.get("timm_model_name")).split(".")[0]
    if settings and timm.is_model(name):
        weights.architecture = name
        weights.known_from |= {"network": "open_clip_config.json", "grid": f"timm's {name}"}
        cfg = timm.get_pretrained_cfg(name)
        size = vision.get("image_size", cfg.input_size[1:] if cfg is not None else 224)
        weights.kwargs = {"img_size": pair(size)}
        if "norm.weight" in state and "attn_pool.latent" not in state:
            weights.kwargs["global_pool"] = "token" if "cls_token" in state else ""
    return weights


def open_clip_settings(container: Container) -> tuple[dict[str, Any], dict[str, Any]]:
    """model_cfg and its vision_cfg of open_clip_config.json; empty when there is none."""
    settings = container.open_clip.get("model_cfg")
    settings = settings if isinstance(settings, dict) else {}
    vision = settings.get("vision_cfg")
    return settings, vision if isinstance(vision, dict) else {}


def with_batch_axis(tower: dict[str, Tensor]) -> dict[str, Tensor]:
    """cls_token (D) -> (1, 1, D); pos_embed (N, D) -> (1, N, D)."""
    out = dict(tower)
    if "cls_token" in out:
        out["cls_token"] = out["cls_token"].reshape(1, 1, -1)
    if "pos_embed" in out and out["pos_embed"].ndim == 2:
        out["pos_embed"] = out["pos_embed"].unsqueeze(0)
    return out


def normalisation(
    given: Any, mean: str, std: str
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and std out of a configuration, None where it has none."""
    if not isinstance(given, dict) or not given.get(mean) or not given.get(std):
        return None
    try:
        return tuple(float(v) for v in given[mean]), tuple(float(v) for v in given[std])
    except (TypeError, ValueError) as error:
        raise InputError(f"{mean} / {std} of its configuration are no numbers") from error


# --- timm's names --------------------------------------------------------------------------------


def quickgelu_name(name: str) -> str | None:
    """The timm name with QuickGELU for weights that timm also lists under plain GELU, else None.

    timm has e.g. `vit_base_patch16_clip_224.openai` beside `vit_base_patch16_clip_quickgelu_224.
    openai`: the same weights, but only the second computes what they were trained for.
    """
    architecture, _, tag = name.partition(".")
    right = architecture.replace("_clip_", "_clip_quickgelu_")
    if "quickgelu" in architecture or right == architecture or not timm.is_model(right):
        return None
    if not tag:
        cfg = timm.get_pretrained_cfg(architecture)
        tag = str(cfg.tag or "") if cfg is not None else ""
    full = f"{right}.{tag}"
    return full if full in timm.list_pretrained(f"{right}.*") else None


def check_tower(model: nn.Module, architecture: str, where: str) -> None:
    """Self-check of a CLIP tower after building; InputError when timm built something else.

    CachedForwards at the modules themselves: activation of every block, LayerNorm eps 1e-5, norm before the
    blocks, no bias in the patch embedding.
    """
    if not isinstance(model, VisionTransformer) or "_clip_" not in architecture:
        return
    wanted = "QuickGELU" if "quickgelu" in architecture else "GELU"
    blocks: Sequence[Any] = list(model.blocks)
    acts = {type(b.mlp.act).__name__ for b in blocks}
    eps = {b.norm1.eps for b in blocks} | {b.norm2.eps for b in blocks}
    if (
        acts != {wanted}
        or eps != {1e-5}
        or isinstance(model.norm_pre, nn.Identity)
        or model.patch_embed.proj.bias is not None
    ):
        raise InputError(
            f"{where}: timm {timm.__version__} builds '{architecture}' with {acts}, eps {eps}; "
            f"CLIP needs {wanted}, eps 1e-5 and a norm before its blocks; take another timm"
        )
