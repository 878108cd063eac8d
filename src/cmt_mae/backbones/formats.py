"""Every published kind of ViT file, brought to timm's names (spec section 10).

Each kind has an exact set of names that a backbone does not need (heads, decoders, predictors,
text towers). Those are left out and counted; every other name must be in the model, or the file is
refused with the names that do not fit.
"""

from __future__ import annotations

import re
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg
from torch import Tensor

from cmt_mae.backbones.backbone import HALF, IMAGENET_MEAN, IMAGENET_STD, learned_state
from cmt_mae.backbones.build import Weights, create, one_line, plain_kwargs
from cmt_mae.backbones.clip import (
    normalisation,
    open_clip_settings,
    quickgelu_name,
    read_hf_clip,
    read_openai,
    trunk_normalisation,
)
from cmt_mae.backbones.container import Container, choose
from cmt_mae.backbones.infer import infer_beit, infer_vit, native_size, pair
from cmt_mae.backbones.names import drop, fuse_qkv, rename, select
from cmt_mae.core.errors import InputError

# Which entry of a nested file is the backbone. I-JEPA: target_encoder; DINO, iBOT, AttMask:
# teacher; MAE, BEiT, data2vec, DeiT: model (deepspeed: module); MoCo v3, open_clip: state_dict.
ENTRIES = ("target_encoder", "teacher", "model", "module", "state_dict")

# Heads and training parts of files whose names are timm's already.
EXTRAS = (
    r"^(head|head_dist|pre_logits|lm_head|classifier|fc)\.|^(mask_token|masked_embed)$"
    r"|^decoder_(embed|pos_embed|blocks|norm|pred)(\.|$)"
)

DINOV2_RULES = ((r"\.mlp\.w12\.", ".mlp.fc1."), (r"\.mlp\.w3\.", ".mlp.fc2."))

HF_VIT_RULES = (
    (r"^vit\.", ""),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(encoder\.layer|layers)\.", "blocks."),
    (r"\.attention\.attention\.(q)uery\.", r".attn.\1."),
    (r"\.attention\.attention\.(k)ey\.", r".attn.\1."),
    (r"\.attention\.attention\.(v)alue\.", r".attn.\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.attention\.([qkv])_proj\.", r".attn.\1."),  # transformers 5 in memory
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"^layernorm\.", "norm."),
)
HF_VIT_EXTRAS = r"^(decoder|classifier|pooler|cls_classifier|distillation_classifier)\.|mask_token$"

FAIRSEQ_RULES = (
    (r"^encoder\.", ""),
    (r"^cls_emb$", "cls_token"),
    (r"^patch_embed\.conv\.", "patch_embed.proj."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.2\.", ".mlp.fc2."),
)


def read_foreign(container: Container, key: str | None) -> Weights:
    """Weights in timm's names from a file of any known kind; the kind is seen from its names.

    `key` picks another entry of a file with several ("student", "encoder", "momentum_encoder").
    InputError when the kind is unknown.
    """
    state, entry = choose(container, key, ENTRIES)
    state = without_wrapper(state)
    names = state.keys()
    if "visual.class_embedding" in names:
        return read_openai(state, container)
    if any(k.startswith("visual.trunk.") for k in names):
        return read_open_clip_trunk(state, container)
    if any(k.endswith("embeddings.class_embedding") for k in names):
        return read_hf_clip(state, container)
    if any(k.endswith("embeddings.patch_embeddings.projection.weight") for k in names):
        return read_hf_vit(state, container)
    if "cls_emb" in names and "patch_embed.conv.weight" in names:
        return read_fairseq(state, container)
    if any(k.startswith("base_encoder.") for k in names):
        return read_moco(state, container)
    return read_timm_names(state, container, entry)


def without_wrapper(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take off what DDP, torch.compile or a wrapper put before all names."""
    for wrapper in ("module.", "_orig_mod.", "module."):
        if all(k.startswith(wrapper) for k in state):
            state = {k.removeprefix(wrapper): v for k, v in state.items()}
    return state


def read_timm_names(state: dict[str, Tensor], container: Container, entry: str) -> Weights:
    """MAE, DINO, iBOT, AttMask, I-JEPA, DeiT, DINOv2, BEiT, timm: names that are timm's already."""
    where = str(container.path)
    dropped: list[str] = []
    if any(k.startswith("backbone.") for k in state):  # DINO, iBOT: backbone and head together
        state, dropped = select(state, "backbone.", r"^head\.")
    named = read_named(state, container)
    if named is not None:
        return named
    # BEiT predicts one of 8192; data2vec's is as wide as the net
    words = state.get("lm_head.weight")
    mae = "decoder_embed.weight" in state
    state, extras = drop(state, EXTRAS)
    dropped += extras
    if _is_beit(state):
        features = words is not None and words.shape[0] == words.shape[1]
        return read_beit(state, container, dropped, features)
    state = rename(_registers(state), (*DINOV2_RULES, (r"\.gamma_([12])$", r".ls\1.gamma")))
    heads = 12 if looks_like_moco(state) else None  # its ViT-S has 12 heads of 32
    architecture, kwargs = infer_vit(state, where, heads=heads)
    kind, licence = "timm names: MAE, DINO, iBOT, DeiT, ...", None
    if mae:
        kind, licence = "MAE with decoder", "CC-BY-NC-4.0 (as published)"
    elif entry in ("target_encoder", "encoder"):
        kind, licence = f"I-JEPA {entry}", "CC-BY-NC-4.0 (as published)"
    elif entry in ("teacher", "student"):
        kind, licence = f"DINO / iBOT / AttMask {entry}", "Apache-2.0 (as published)"
    return Weights(
        state, architecture, kwargs, IMAGENET_MEAN, IMAGENET_STD, f"{where} ({kind})", licence,
        dropped=dropped,
    )  # fmt: skip


def _registers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """DINOv2 with registers: timm adds the class token's position to the token itself."""
    if "register_tokens" not in state or "cls_token" not in state or "pos_embed" not in state:
        return state
    out = {k: v for k, v in state.items() if k != "register_tokens"}
    out["reg_token"] = state["register_tokens"]
    out["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
    out["pos_embed"] = state["pos_embed"][:, 1:]
    return out


def looks_like_moco(state: dict[str, Tensor]) -> bool:
    """A ViT-S with MoCo v3's fixed table of positions: the first half of it encodes the ROW.

    (MAE's table is the same with the halves swapped, spec section 4.) The number of heads cannot
    be seen from shapes, and MoCo v3's ViT-S has 12 where all others have 6.
    """
    table = state.get("pos_embed")
    if table is None or table.ndim != 3 or table.shape[-1] != 384 or table.shape[1] < 3:
        return False
    zero, first, second = table[0, 0], table[0, 1], table[0, 2]
    start = torch.tensor([0.0, 1.0, 0.0, 1.0]).repeat_interleave(96)
    fixed = not zero.any() and torch.allclose(first.float(), start, atol=1e-6)
    return fixed and torch.equal(first[:192], second[:192])


def read_moco(state: dict[str, Tensor], container: Container) -> Weights:
    """MoCo v3 checkpoint: base_encoder, momentum_encoder and predictor together."""
    where = str(container.path)
    state, dropped = select(state, "base_encoder.", r"^(momentum_encoder|predictor)\.")
    state, heads_dropped = drop(state, r"^head\.")
    width = state["cls_token"].shape[-1] if "cls_token" in state else 0
    architecture, kwargs = infer_vit(state, where, heads=12 if width == 384 else None)
    return Weights(
        state, architecture, kwargs, IMAGENET_MEAN, IMAGENET_STD, f"{where} (MoCo v3)",
        "CC-BY-NC-4.0 (as published)", dropped=dropped + heads_dropped,
    )  # fmt: skip


def _is_beit(state: dict[str, Tensor]) -> bool:
    """Separate biases of q and v, or relative positions: a network of BEiT's family."""
    return any(re.search(r"(\.q_bias|relative_position_bias_table)$", k) for k in state)


def read_beit(
    state: dict[str, Tensor], container: Container, dropped: list[str], features: bool
) -> Weights:
    """BEiT, or data2vec's fork of it, which regresses features where BEiT predicts 8192 words.

    BEiT's published weights are pre-trained on ImageNet-22k and fine-tuned with 0.5 / 0.5;
    data2vec's pre-training takes ImageNet's mean and std (their READMEs).
    """
    where = str(container.path)
    state, index = drop(state, r"relative_position_index$")
    architecture, kwargs = infer_beit(state, where)
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if features else (HALF, HALF)
    kind = "data2vec, BEiT fork" if features else "BEiT"
    licence = "CC-BY-NC-4.0 (as published)" if features else "MIT (as published)"
    return Weights(
        state, architecture, kwargs, mean, std, f"{where} ({kind})", licence,
        dropped=dropped + index,
    )  # fmt: skip


def read_fairseq(state: dict[str, Tensor], container: Container) -> Weights:
    """fairseq's data2vec_vision: the student; its teacher lies beside it as `_ema`."""
    where = str(container.path)
    state, dropped = drop(state, r"^(mask_emb$|final_proj\.)|relative_position_index$")
    state = rename(state, FAIRSEQ_RULES)
    architecture, kwargs = infer_beit(state, where)
    return Weights(
        state, architecture, kwargs, IMAGENET_MEAN, IMAGENET_STD,
        f"{where} (data2vec, fairseq; its LayerNorm eps 1e-5 is 1e-6 here)",
        "MIT (as published)", dropped=dropped,
    )  # fmt: skip


def read_hf_vit(state: dict[str, Tensor], container: Container) -> Weights:
    """transformers' ViTModel, ViTForImageClassification, ViTMAEModel, ViTMAEForPreTraining."""
    where, config = str(container.path), container.config
    act = config.get("hidden_act", "gelu")
    eps = float(config.get("layer_norm_eps", 1e-12))
    if act != "gelu" or eps > 1e-6:
        raise InputError(f"{where}: hidden_act {act!r}, layer_norm_eps {eps}; known: gelu, <= 1e-6")
    mae = config.get("model_type") == "vit_mae" or any(k.startswith("decoder.") for k in state)
    state, dropped = drop(state, HF_VIT_EXTRAS)
    state = fuse_qkv(rename(state, HF_VIT_RULES), where)
    size = config.get("image_size")
    architecture, kwargs = infer_vit(
        state,
        where,
        heads=config.get("num_attention_heads"),
        img_size=None if size is None else pair(size),
    )
    usual = (IMAGENET_MEAN, IMAGENET_STD) if mae else (HALF, HALF)  # their processors' defaults
    mean, std = normalisation(container.preprocessor, "image_mean", "image_std", usual)
    kind = f"Hugging Face {'ViTMAE' if mae else 'ViT'}"
    note = "" if eps == 1e-6 else f"; its LayerNorm eps {eps:g} is 1e-6 here"
    return Weights(
        state, architecture, kwargs, mean, std, f"{where} ({kind}{note})", dropped=dropped
    )


def read_open_clip_trunk(state: dict[str, Tensor], container: Container) -> Weights:
    """open_clip with a timm network as image tower (SigLIP and others): names `visual.trunk.*`."""
    proj = state.get("visual.head.proj.weight")
    rest = r"^(visual\.head|text|logit_scale|logit_bias|transformer|token_embedding|ln_final"
    rest += r"|positional_embedding|text_projection|attn_mask)(\.|$)"
    state, dropped = select(state, "visual.trunk.", rest)
    state, heads = drop(state, r"^head\.")
    mean, std = trunk_normalisation(container, state)
    name = open_clip_settings(container)[1].get("timm_model_name")
    where = str(container.path)
    if isinstance(name, str) and timm.is_model(name.split(".")[0]):
        architecture = name.split(".")[0]
        cfg = timm.get_pretrained_cfg(architecture)
        kwargs: dict[str, Any] = {"img_size": pair(cfg.input_size[1:] if cfg is not None else 224)}
        if "norm.weight" in state and "attn_pool.latent" not in state:
            kwargs |= {"global_pool": "token" if "cls_token" in state else ""}
    else:
        architecture, kwargs = infer_vit(state, where)
    return Weights(
        state, architecture, kwargs, mean, std, f"{where} (open_clip, timm tower)", proj=proj,
        dropped=dropped + heads,
    )  # fmt: skip


# --- files that say which timm model they are ----------------------------------------------------


def read_named(state: dict[str, Tensor], container: Container) -> Weights | None:
    """Weights of a file whose config.json or file name is a timm model's, else None.

    A config.json of the hub (architecture, pretrained_cfg, model_args) is binding. A file name is a
    hint: it counts when the names and shapes are those of the model, positions left aside.
    """
    config, where = container.config, str(container.path)
    declared = config.get("architecture")
    if isinstance(declared, str) and timm.is_model(declared):
        cfg = config.get("pretrained_cfg")
        cfg = cfg if isinstance(cfg, dict) else {}
        name = f"{declared}.{cfg.get('tag')}" if cfg.get("tag") else declared
    else:
        name, cfg = container.path.stem, {}
        if not timm.is_model(name) and not timm.is_model(name.split(".")[0]):
            return None
        declared = None
    name = _known(name)
    name = quickgelu_name(name) or name  # the weights of a wrong name under their right one
    known = timm.get_pretrained_cfg(name) or PretrainedCfg()
    try:
        size = pair(cfg.get("input_size", known.input_size)[1:])
        mean = tuple(float(v) for v in cfg.get("mean", known.mean))
        std = tuple(float(v) for v in cfg.get("std", known.std))
    except (TypeError, ValueError, IndexError) as error:
        raise InputError(f"{where}: its config.json is damaged ({one_line(error)})") from error
    architecture = name.split(".")[0]
    kwargs = _model_args(config, where) if declared else {}
    bare, dropped = drop(state, r"^(head|head_dist|pre_logits)\.|relative_position_index$")
    if declared is None and not _fits(bare, architecture, size):
        return None
    if bare.get("pos_embed") is not None and "patch_embed.proj.weight" in bare:
        size, _ = native_size(bare, pair(bare["patch_embed.proj.weight"].shape[-2:]), where, size)
    kwargs["img_size"] = size
    head = [state.get("head.weight"), state.get("head.bias")]
    clip = "_clip_" in architecture and head[0] is not None
    proj = head[0] if clip and (head[1] is None or not head[1].any()) else None
    return Weights(
        bare, architecture, kwargs, mean, std, f"{where} (timm {name})",
        cfg.get("license") or known.license, proj=proj, dropped=dropped,
    )  # fmt: skip


def _known(name: str) -> str:
    """The name without its tag where timm does not know the tag."""
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError:
        return name.split(".")[0]
    return name


def _model_args(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Sizes that a timm config.json gives beyond its architecture's own."""
    given = config.get("model_args")
    return plain_kwargs(given, where) if isinstance(given, dict) else {}


def _fits(state: dict[str, Tensor], architecture: str, size: tuple[int, int]) -> bool:
    """Names and shapes are those of the timm model; tables of positions may differ in length."""
    with torch.random.fork_rng(devices=[]):
        wanted = learned_state(create(architecture, {"img_size": size}, architecture))
    free = [k for k in wanted if "pos_embed" in k or "relative_position" in k]
    return state.keys() == wanted.keys() and all(
        state[k].shape == v.shape for k, v in wanted.items() if k not in free
    )
