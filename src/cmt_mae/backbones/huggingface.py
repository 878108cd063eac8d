"""Folders of transformers: ViT, ViTMAE, MSN, DeiT, I-JEPA, DINOv2, DINOv3, BEiT, data2vec, CLIP, SigLIP.

Names of version 4 and 5, on disk and in memory, are brought to timm's. Heads, activation, eps and
image size stand in config.json, mean and std in preprocessor_config.json.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from cmt_mae.backbones.backbone import HALF, IMAGENET_MEAN, IMAGENET_STD
from cmt_mae.backbones.build import UnbuiltBackbone, pair
from cmt_mae.backbones.clip import CLIP_NORM, TEXT, normalisation, with_batch_axis
from cmt_mae.backbones.container import Container
from cmt_mae.backbones.names import drop, fuse_qkv, rename, with_registers
from cmt_mae.backbones.shapes import infer_beit, infer_vit, sizes_of
from cmt_mae.core.errors import InputError

RULES = (
    (r"^(vit|deit|vit_mae|vit_msn|dinov2|dinov2_with_registers|dinov3_vit|ijepa|beit|data2vec_vision)\.", ""),
    (r"^(?:siglip\.|clip\.|model\.)?vision_model\.", ""),
    (r"^embeddings\.(cls_token|class_embedding)$", "cls_token"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.register_tokens$", "register_tokens"),
    (r"^embeddings\.(position_embeddings|position_embedding\.weight)$", "pos_embed"),
    (r"^embeddings\.patch_embeddings?\.(projection\.)?", "patch_embed.proj."),
    (r"^(model\.)?(encoder\.)?layers?\.", "blocks."),
    (r"^encoder\.relative_position_bias\.", "rel_pos_bias."),
    (r"^shared_position_bias\.", "rel_pos_bias."),
    (r"(\.attention)?(\.attention)?\.relative_position_bias\.", ".attn."),
    (r"\.(?:attention\.attention|attention|self_attn)\.([qkv])(?:uery|ey|alue|_proj)\.", r".attn.\1."),
    (r"\.(attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.weights_out\.", ".mlp.fc2."),
    (r"\.(layernorm_before|layer_norm1)\.", ".norm1."),
    (r"\.(layernorm_after|layer_norm2)\.", ".norm2."),
    (r"^(layernorm|post_layernorm|norm)\.", "norm."),
    (r"^pre_layrnorm\.", "norm_pre."),  # the name's typing error is theirs
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.lambda_([12])$", r".gamma_\1"),
    (r"^pooler\.layernorm\.", "fc_norm."),  # BEiT fine-tuned on pooled tokens
    (r"^head\.probe$", "attn_pool.latent"),
    (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"^head\.layernorm\.", "attn_pool.norm."),
    (r"^head\.mlp\.", "attn_pool.mlp."),
)  # fmt: skip
EXTRAS = (
    r"^(decoder|classifier|pooler\.(?!layernorm)|cls_classifier|distillation_classifier|auxiliary_head|fpn\d)\."
    r"|mask_token$|position_ids$|relative_position_index$|rope_embeddings\."
)
# Kinds whose published weights all have one normalisation, for folders without preprocessor_config.json.
USUAL = {
    "vit_mae": (IMAGENET_MEAN, IMAGENET_STD),
    "dinov2": (IMAGENET_MEAN, IMAGENET_STD),
    "dinov2_with_registers": (IMAGENET_MEAN, IMAGENET_STD),
    **dict.fromkeys(("clip", "clip_vision_model"), CLIP_NORM),
    **dict.fromkeys(("siglip", "siglip_vision_model"), (HALF, HALF)),
}
ACTIVATIONS = {"gelu": None, "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu",
               "silu": "silu"}  # fmt: skip
"""hidden_act -> timm's act_layer; None: what its networks have anyway."""
NO_CONFIG = "put its config.json beside it, which says heads, activation and eps"


def is_hugging_face(state: dict[str, Tensor]) -> bool:
    """Names of transformers' vision models."""
    return any(
        re.search(r"(^|\.)embeddings\.(patch_embeddings?\.|class_embedding$)", k) for k in state
    )


def read_hugging_face(state: dict[str, Tensor], container: Container) -> UnbuiltBackbone:
    """Weights of one of transformers' vision transformers, with what its config.json says."""
    where, config = str(container.path), container.config
    kind = str(config.get("model_type", ""))
    vision = config.get("vision_config")
    config = vision if isinstance(vision, dict) else config
    proj = state.pop("visual_projection.weight", None)
    decoder = any(k.startswith("decoder.") for k in state)
    state, dropped = drop(state, EXTRAS)
    if any("vision_model." in k for k in state):
        state, text = drop(state, TEXT)
        dropped += text
    state = with_batch_axis(rename(state, RULES))
    state = _attention_pool(state)
    weights = UnbuiltBackbone(
        state, f"{where} (Hugging Face {kind or 'weights'})", ask=NO_CONFIG, proj=proj,
        dropped=dropped, known_from=dict.fromkeys(("network", "grid"), "config.json"),
    )  # fmt: skip
    _describe(weights, config, kind, where)
    given = normalisation(container.preprocessor, "image_mean", "image_std")
    usual = USUAL.get("vit_mae" if decoder else kind)
    if given or usual:
        weights.mean, weights.std = given or usual or (None, None)
        weights.usual = given is None
        weights.known_from["normalisation"] = (
            "preprocessor_config.json" if given else f"{kind or 'ViTMAE'}'s published weights"
        )
    return weights


def _describe(weights: UnbuiltBackbone, config: dict[str, Any], kind: str, where: str) -> None:
    """Fill in architecture and arguments from a config.json; without one the user has to name the network."""
    state = weights.state
    if kind == "dinov3_vit":
        _describe_dinov3(weights, config, where)
    elif kind in ("beit", "data2vec-vision"):
        weights.state = state = fuse_qkv(state, where)
        weights.architecture, weights.kwargs = infer_beit(state, where)
        if not {"norm.weight", "fc_norm.weight"} & state.keys():
            raise InputError(
                f"{where}: a BEiT without its norm after pooling; save it with its pooling layer"
            )
    else:
        weights.state = state = with_registers(_gates(fuse_qkv(state, where)))
        if not kind and "num_attention_heads" not in config:
            return
        act = config.get("hidden_act", "quick_gelu" if kind.startswith("clip") else "gelu")
        clip = (
            ("clip_quickgelu" if act == "quick_gelu" else "clip")
            if "norm_pre.weight" in state
            else None
        )
        weights.architecture, weights.kwargs = infer_vit(state, where, clip=clip)
    act = config.get("hidden_act", "gelu")
    if not isinstance(act, str) or act not in ACTIVATIONS:
        raise InputError(f"{where}: hidden_act {act!r}; known: {', '.join(ACTIVATIONS)}")
    gated = "silu" if ".mlp.fc1_g." in str(state.keys()) or config.get("use_swiglu_ffn") else act
    if ACTIVATIONS[act] and "clip" not in str(weights.architecture) and gated != "silu":
        weights.kwargs["act_layer"] = ACTIVATIONS[act]
    eps = float(config.get("layer_norm_eps", 1e-5 if kind.startswith("clip") else 1e-6))
    wanted = 1e-5 if "clip" in str(weights.architecture) or kind == "dinov3_vit" else 1e-6
    if eps > wanted or (wanted == 1e-5 and eps != wanted):
        raise InputError(
            f"{where}: layer_norm_eps {eps}; networks of this kind with {wanted:g} are known"
        )
    if eps != wanted:
        weights.source += f"; its LayerNorm eps {eps:g} is {wanted:g} here"
    if isinstance(config.get("num_attention_heads"), int):
        weights.kwargs.setdefault("num_heads", config["num_attention_heads"])
    if isinstance(config.get("image_size"), int | list | tuple):
        weights.kwargs["img_size"] = pair(config["image_size"])


def _describe_dinov3(weights: UnbuiltBackbone, config: dict[str, Any], where: str) -> None:
    """DINOv3: rotary positions, an MLP with or without gate, biases of query and value."""
    gated = bool(config.get("use_gated_mlp", False))
    up = (r"\.mlp\.up_proj\.", ".mlp.fc1_x." if gated else ".mlp.fc1.")
    rules = (up, (r"\.mlp\.gate_proj\.", ".mlp.fc1_g."), (r"\.mlp\.down_proj\.", ".mlp.fc2."),
             (r"^register_tokens$", "reg_token"), (r"\.ls([12])\.gamma$", r".gamma_\1"))  # fmt: skip
    state = fuse_qkv(rename(weights.state, rules), where)
    if config.get("rope_theta", 100.0) != 100.0 or any(k.endswith("attn.qkv.bias") for k in state):
        raise InputError(
            f"{where}: a DINOv3 with another rope_theta than 100 or with a key bias is not known"
        )
    weights.state = state
    weights.architecture, weights.kwargs = dinov3_architecture(
        sizes_of(state, where), gated, "blocks.0.attn.q_bias" in state
    )


def dinov3_architecture(
    sizes: dict[str, Any], gated: bool, biases: bool
) -> tuple[str, dict[str, Any]]:
    """timm's name and arguments of a DINOv3; gated: SwiGLU; biases: of query and value."""
    name = "vit_small_plus_patch16_dinov3" if gated else "vit_small_patch16_dinov3"
    return (f"{name}_qkvb" if biases else name), dict(sizes)


def _gates(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """DINOv2's gated MLP in memory of version 5: gate and input apart, one matrix in timm and on disk."""
    out = dict(state)
    for name in [k for k in state if ".mlp.gate_proj." in k]:
        up, down = name.replace("gate_proj", "up_proj"), name.replace("gate_proj", "down_proj")
        packed = torch.cat([out.pop(name), out.pop(up)])
        out[name.replace("gate_proj", "fc1")] = packed
        out[name.replace("gate_proj", "fc2")] = out.pop(down)
    return out


def _attention_pool(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """SigLIP's pooling: one matrix for query, key and value there, two here."""
    out = dict(state)
    for part in ("weight", "bias"):
        whole = out.pop(f"head.attention.in_proj_{part}", None)
        if whole is not None:
            third = whole.shape[0] // 3
            out[f"attn_pool.q.{part}"], out[f"attn_pool.kv.{part}"] = whole[:third], whole[third:]
    return out
