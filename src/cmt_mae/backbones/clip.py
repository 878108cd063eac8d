"""CLIP's image towers: OpenAI's archive, open_clip, Hugging Face.

What makes them differ from other ViTs (spec section 1.5): no bias in the patch embedding, a norm
before the blocks, LayerNorm eps 1e-5, QuickGELU x * sigmoid(1.702 x) where the weights were
trained with it, CLIP's own mean and std, and a projection after the final norm.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import timm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from cmt_mae.backbones.backbone import CLIP_MEAN, CLIP_STD, HALF
from cmt_mae.backbones.build import Weights
from cmt_mae.backbones.container import Container
from cmt_mae.backbones.infer import infer_vit, pair
from cmt_mae.backbones.names import fuse_qkv, rename, select
from cmt_mae.core.errors import InputError

CLIP_NORM = (CLIP_MEAN, CLIP_STD)

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

HF_RULES = (
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^pre_layrnorm\.", "norm_pre."),  # the name's typing error is theirs
    (r"^post_layernorm\.", "norm."),
    (r"^encoder\.layers\.", "blocks."),
    (r"\.self_attn\.([qkv])_proj\.", r".attn.\1."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.layer_norm([12])\.", r".norm\1."),
)


def read_openai(state: dict[str, Tensor], container: Container) -> Weights:
    """OpenAI's archive or an open_clip file: names `visual.*` (spec section 10)."""
    where = str(container.path)
    tower, dropped = select(state, "visual.", TEXT)
    if any(k.startswith("layer1.") for k in tower):
        raise InputError(f"{where}: this CLIP has a ResNet as image tower; take one with a ViT")
    proj = tower.pop("proj", None)
    tower = _with_batch_axis(rename(tower, OPENAI_RULES))
    settings, vision = open_clip_settings(container)
    quick, why = _quickgelu(state, container, settings)
    width = int(tower["cls_token"].shape[-1]) if "cls_token" in tower else 0
    head_width = vision.get("head_width")
    heads = width // head_width if isinstance(head_width, int) and head_width > 0 else None
    architecture, kwargs = infer_vit(
        tower,
        where,
        heads=heads,
        img_size=_size(vision.get("image_size")),
        clip="clip_quickgelu" if quick else "clip",
    )
    mean, std = normalisation(container.open_clip.get("preprocess_cfg"), "mean", "std", CLIP_NORM)
    openai = container.torchscript or "input_resolution" in state
    return Weights(
        tower,
        architecture,
        kwargs,
        mean,
        std,
        f"{where} ({'OpenAI' if openai else 'open_clip'} CLIP, {why})",
        "MIT (as published)" if openai else None,
        proj=None if proj is None else proj.t(),
        dropped=dropped,
    )


def read_hf_clip(state: dict[str, Tensor], container: Container) -> Weights:
    """transformers' CLIPModel, CLIPVisionModel or CLIPVisionModelWithProjection."""
    where, config = str(container.path), container.config
    vision = config.get("vision_config")
    vision = vision if isinstance(vision, dict) else config
    act = vision.get("hidden_act", "quick_gelu" if config else None)
    if act not in ("quick_gelu", "gelu"):
        raise InputError(
            f"{where}: activation {act!r} unknown; a Hugging Face CLIP needs its config.json "
            "beside it, with hidden_act gelu or quick_gelu"
        )
    proj = state.pop("visual_projection.weight", None)
    if any(k.startswith("vision_model.") for k in state):
        tower, dropped = select(state, "vision_model.", TEXT)
    else:
        tower, dropped = dict(state), []
    dropped += [k for k in tower if k.endswith("position_ids")]
    tower = {k: v for k, v in tower.items() if k not in dropped}
    tower = fuse_qkv(_with_batch_axis(rename(tower, HF_RULES)), where)
    eps = float(vision.get("layer_norm_eps", 1e-5))
    if eps != 1e-5:
        raise InputError(f"{where}: layer_norm_eps {eps}; CLIP towers with 1e-5 are known")
    architecture, kwargs = infer_vit(
        tower,
        where,
        heads=vision.get("num_attention_heads"),
        img_size=_size(vision.get("image_size")),
        clip="clip_quickgelu" if act == "quick_gelu" else "clip",
    )
    mean, std = normalisation(container.preprocessor, "image_mean", "image_std", CLIP_NORM)
    source = f"{where} (Hugging Face CLIP, {act})"
    return Weights(tower, architecture, kwargs, mean, std, source, proj=proj, dropped=dropped)


def trunk_normalisation(
    container: Container, state: dict[str, Tensor]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of an open_clip file with a timm tower: its config's, else its kind's habit.

    SigLIP (an attention pool, no class token) is trained with 0.5 / 0.5.
    """
    given = container.open_clip.get("preprocess_cfg")
    if not given and "attn_pool.latent" in state and "cls_token" not in state:
        return HALF, HALF
    return normalisation(given, "mean", "std", CLIP_NORM)


def open_clip_settings(container: Container) -> tuple[dict[str, Any], dict[str, Any]]:
    """model_cfg and its vision_cfg of open_clip_config.json; empty when there is none."""
    settings = container.open_clip.get("model_cfg")
    settings = settings if isinstance(settings, dict) else {}
    vision = settings.get("vision_cfg")
    return settings, vision if isinstance(vision, dict) else {}


def _quickgelu(
    state: dict[str, Tensor], container: Container, settings: dict[str, Any]
) -> tuple[bool, str]:
    """Whether the tower computes QuickGELU, and how that is known.

    OpenAI's files always do. open_clip's config says so; its names say "quickgelu", and the tags
    openai, metaclip and dfn were trained with it; all its other weights with plain GELU.
    """
    if container.torchscript or "input_resolution" in state:
        return True, "QuickGELU"
    if settings:
        quick = bool(settings.get("quick_gelu", False))
        return quick, ("QuickGELU" if quick else "GELU") + " by its config"
    name = f"{container.path.parent.name}/{container.path.name}".lower()
    if re.search(r"quick_?gelu|openai|metaclip|dfn", name):
        return True, "QuickGELU by its file name"
    return False, "GELU, as nothing says QuickGELU"


def _with_batch_axis(tower: dict[str, Tensor]) -> dict[str, Tensor]:
    """cls_token (D) -> (1, 1, D); pos_embed (N, D) -> (1, N, D)."""
    out = dict(tower)
    if "cls_token" in out:
        out["cls_token"] = out["cls_token"].reshape(1, 1, -1)
    if "pos_embed" in out and out["pos_embed"].ndim == 2:
        out["pos_embed"] = out["pos_embed"].unsqueeze(0)
    return out


def normalisation(
    given: Any, mean: str, std: str, usual: tuple[tuple[float, ...], tuple[float, ...]]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std out of a configuration, the usual ones where it has none."""
    if not isinstance(given, dict) or not given.get(mean) or not given.get(std):
        return usual
    try:
        return tuple(float(v) for v in given[mean]), tuple(float(v) for v in given[std])
    except (TypeError, ValueError) as error:
        raise InputError(f"{mean} / {std} of its configuration are no numbers") from error


def _size(given: Any) -> tuple[int, int] | None:
    """Image size out of a configuration: a number or two."""
    return None if not isinstance(given, int | list | tuple) else pair(given)


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
