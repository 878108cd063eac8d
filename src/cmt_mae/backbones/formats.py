"""Published kinds of ViT files with names that are timm's, or nearly, brought to them (spec section 10).

Each kind has an exact set of names that a backbone does not need (heads, decoders, predictors,
text towers). Those are left out and counted; every other name must be in the model, or the file is
refused with the names that do not fit.
"""

from __future__ import annotations

from typing import Any

import timm
from timm.models import PretrainedCfg
from torch import Tensor

from cmt_mae.backbones.backbone import HALF, IMAGENET_MEAN, IMAGENET_STD
from cmt_mae.backbones.build import UnbuiltBackbone, pair, plain_kwargs
from cmt_mae.backbones.clip import quickgelu_name, read_open_clip_trunk, read_openai
from cmt_mae.backbones.container import Container, choose
from cmt_mae.backbones.facts import checked_hash, timm_normalisations
from cmt_mae.backbones.huggingface import dinov3_architecture, is_hugging_face, read_hugging_face
from cmt_mae.backbones.licences import if_published
from cmt_mae.backbones.names import drop, refuse_unknown_prefix, rename, select, with_registers
from cmt_mae.backbones.shapes import (
    PUBLISHED_HEADS,
    fixed_positions,
    infer_beit,
    infer_vit,
    sizes_of,
)
from cmt_mae.core.errors import InputError
from cmt_mae.core.text import one_line

# Which entry of a nested file is the backbone. I-JEPA: target_encoder; DINO, iBOT, AttMask:
# teacher; MAE, BEiT, data2vec, DeiT: model (deepspeed: module); MoCo v3, open_clip: state_dict.
ENTRIES = ("target_encoder", "teacher", "model", "module", "state_dict")

# Heads and training parts of files whose names are timm's already.
EXTRAS = (
    r"^(head|head_dist|pre_logits|lm_head|classifier|fc|cls_pt_layers|cls_pt_lm_head)\."
    r"|^(mask_token|masked_embed)$|^decoder_(embed|pos_embed|blocks|norm|pred)(\.|$)"
)

TIMM_RULES = (
    (r"\.mlp\.w12\.", ".mlp.fc1."), (r"\.mlp\.w3\.", ".mlp.fc2."), (r"\.gamma_([12])$", r".ls\1.gamma"),
)  # fmt: skip

FAIRSEQ_RULES = (
    (r"^encoder\.", ""),
    (r"^cls_emb$", "cls_token"),
    (r"^patch_embed\.conv\.", "patch_embed.proj."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.2\.", ".mlp.fc2."),
)

MOCO = ("base_encoder", "momentum_encoder")
NON_COMMERCIAL = if_published("CC-BY-NC-4.0")
IMAGENET: dict[str, Any] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "usual": True}


def read_foreign(container: Container, key: str | None) -> UnbuiltBackbone:
    """Weights in timm's names from a file of any known kind; the kind is seen from its names.

    `key` picks another entry or prefix of a file with several ("student", "encoder", "momentum_encoder").
    InputError when the kind is unknown.
    """
    state, entry = choose(container, key, ENTRIES)
    names = state.keys()
    if "visual.class_embedding" in names:
        return read_openai(state, container)
    if any(k.startswith("visual.trunk.") for k in names):
        return read_open_clip_trunk(state, container)
    if is_hugging_face(state):
        return read_hugging_face(state, container)
    if "cls_emb" in names and "patch_embed.conv.weight" in names:
        return read_fairseq(state, container)
    if any(k.startswith("base_encoder.") for k in names) or entry in MOCO:
        return read_moco(state, container)
    if "storage_tokens" in names:
        return read_dinov3(state, container)
    return read_timm_names(state, container, entry)


def of_kind(kind: str, project: str = "") -> dict[str, str]:
    """Where facts of a recognised kind of file are known from."""
    return {"network": kind, "normalisation": project or kind, "grid": kind}


def read_timm_names(state: dict[str, Tensor], container: Container, entry: str) -> UnbuiltBackbone:
    """MAE, DINO, iBOT, AttMask, I-JEPA, DeiT, DINOv2, BEiT, timm: names that are timm's already."""
    where = str(container.path)
    dropped: list[str] = []
    training = any(k.startswith("teacher.backbone.") for k in state)
    if training:  # DINOv2's training: teacher and student together
        state, dropped = select(state, "teacher.", r"^(student|dino_loss|ibot_patch_loss)\.")
    whole = entry in container.tree
    of_dino = (whole and entry in ("teacher", "student")) or training
    if of_dino and any(k.startswith("backbone.") for k in state):  # backbone and head together
        state, heads = select(state, "backbone.", r"^(head|dino_head|ibot_head)\.")
        dropped += heads
    refuse_unknown_prefix(state, where)
    named = read_named(state, container)
    if named is not None:
        return named
    words = state.get("lm_head.weight")
    parts = state.keys()
    head = state.get("head.weight") if not _any(state.get("head.bias")) else None
    kind, licence = "", None
    if "decoder_embed.weight" in parts or (
        entry == "model" and (fixed_positions(state.get("pos_embed")) or "")[:1] == ("mae",)
    ):
        kind, licence = "MAE", NON_COMMERCIAL
    elif whole and "target_encoder" in container.tree:
        kind, licence = f"I-JEPA {entry}", NON_COMMERCIAL
    elif _is_dinov2(state):
        kind, licence = "DINOv2", if_published("Apache-2.0")
    elif of_dino or "masked_embed" in parts:
        kind, licence = f"DINO / iBOT / AttMask {entry}", if_published("Apache-2.0")
    clusters = any(k.startswith("cls_pt_layers.") for k in parts)
    state, extras = drop(state, EXTRAS)
    relative = any(k.endswith("relative_position_bias_table") for k in state)
    if relative or (words is not None and "blocks.0.attn.q_bias" in parts):
        return read_beit(state, container, dropped + extras, words, clusters)
    if "blocks.0.gamma_1" in state and "reg_token" not in state:
        state = rename(state, TIMM_RULES)
    state = rename(with_registers(state), TIMM_RULES[:2])
    if not kind and (fixed_positions(state.get("pos_embed")) or "")[:1] == ("moco",):
        kind, licence = "MoCo v3 by its positions", NON_COMMERCIAL
    weights = UnbuiltBackbone(
        state, f"{where} ({kind or 'names of timm'})", licence=licence, head=head,
        dropped=dropped + extras,
    )  # fmt: skip
    if kind:
        weights.architecture, weights.kwargs = infer_vit(state, where)
        weights.mean, weights.std, weights.usual = IMAGENET_MEAN, IMAGENET_STD, True
        weights.known_from, weights.square = of_kind(f"{kind.split()[0]}'s published code"), True
        weights.heads = PUBLISHED_HEADS | ({(384, 12): 12} if kind.startswith("MoCo") else {})
    return weights


def _any(tensor: Tensor | None) -> bool:
    return tensor is not None and bool(tensor.any())


def _is_dinov2(state: dict[str, Tensor]) -> bool:
    """Layer scale and a token for hidden patches of shape (1, width), as DINOv2's own code writes them."""
    token = state.get("mask_token")
    return "blocks.0.ls1.gamma" in state and token is not None and token.ndim == 2


def read_moco(state: dict[str, Tensor], container: Container) -> UnbuiltBackbone:
    """MoCo v3 checkpoint: base_encoder, momentum_encoder and predictor together; its ViT-S has 12 heads."""
    where = str(container.path)
    state, dropped = select(state, "base_encoder.", r"^(momentum_encoder|predictor)\.")
    state, heads_dropped = drop(state, r"^head\.")
    architecture, kwargs = infer_vit(state, where)
    return UnbuiltBackbone(
        state, f"{where} (MoCo v3)", architecture, kwargs, **IMAGENET, square=True,
        known_from=of_kind("MoCo v3's code"), heads=PUBLISHED_HEADS | {(384, 12): 12},
        licence=NON_COMMERCIAL, dropped=dropped + heads_dropped,
    )  # fmt: skip


def read_dinov3(state: dict[str, Tensor], container: Container) -> UnbuiltBackbone:
    """Meta's own file of DINOv3: rotary positions, registers called storage tokens, biases with a mask.

    The ViT-L and the ViT-7B exist for photos and for satellite images, with another normalisation each.
    """
    where, path = str(container.path), container.path
    state, dropped = drop(
        state, r"^(mask_token|rope_embed\.periods)$|^(local_cls_norm|projectors)\.|\.bias_mask$"
    )
    gated = "blocks.0.mlp.w1.weight" in state
    state = rename(state, (
        (r"^storage_tokens$", "reg_token"), (r"\.ls([12])\.gamma$", r".gamma_\1"),
        (r"\.mlp\.w1\.", ".mlp.fc1_g."), (r"\.mlp\.w2\.", ".mlp.fc1_x."), (r"\.mlp\.w3\.", ".mlp.fc2."),
    ))  # fmt: skip
    biases = {k: v for k, v in state.items() if k.endswith(".attn.qkv.bias")}
    state = {k: v for k, v in state.items() if k not in biases}
    used = any(_any(part) for v in biases.values() for part in v.chunk(3)[::2])
    for name, bias in biases.items():
        query, _, value = bias.chunk(3)
        if used:  # else all zero: the key's is zero by its mask
            state[name.replace("qkv.bias", "q_bias")] = query
            state[name.replace("qkv.bias", "v_bias")] = value
    kwargs = sizes_of(state, where)
    width = int(kwargs["embed_dim"])
    heads = {384: 6, 768: 12, 1024: 16, 1280: 20, 4096: 32}.get(width)
    weights = UnbuiltBackbone(
        state, f"{where} (DINOv3)", *dinov3_architecture(kwargs, gated, used),
        known_from=of_kind("DINOv3's code"), usual=True, licence=if_published("DINOv3 License"),
        dropped=dropped,
    )  # fmt: skip
    weights.kwargs["img_size"] = (
        256,
        256,
    )  # rotary positions: any size; theirs at the end of training
    if heads:
        weights.kwargs["num_heads"] = heads
    satellite = "sat493m" in path.name
    if width not in (1024, 4096) or (checked_hash(path) and not satellite):
        weights.mean, weights.std = IMAGENET_MEAN, IMAGENET_STD
    elif checked_hash(path):
        (norm,) = timm_normalisations("vit_large_patch16_dinov3.sat493m")
        weights.mean, weights.std = norm
    return weights


def read_beit(
    state: dict[str, Tensor],
    container: Container,
    dropped: list[str],
    words: Tensor | None,
    clusters: bool,
) -> UnbuiltBackbone:
    """BEiT, or data2vec's fork of it, which regresses features where BEiT predicts 8192 words.

    words: the weight of that prediction, if there; clusters: BEiT v2's extra blocks are in the file.
    BEiT's own weights are trained with 0.5 / 0.5, BEiT v2's and data2vec's with ImageNet's mean and std;
    fine-tuned files without these parts do not say which they are.
    """
    where = str(container.path)
    state, index = drop(state, r"relative_position_index$")
    architecture, kwargs = infer_beit(state, where)
    kind, licence, norm = "BEiT's family", None, None
    if words is not None and words.shape[0] == words.shape[1]:
        kind, licence = "data2vec, BEiT fork", NON_COMMERCIAL
        norm = (IMAGENET_MEAN, IMAGENET_STD)
    elif words is not None:
        kind, licence = "BEiT v2" if clusters else "BEiT", if_published("MIT")
        norm = (IMAGENET_MEAN, IMAGENET_STD) if clusters else (HALF, HALF)
    mean, std = norm or (None, None)
    return UnbuiltBackbone(
        state, f"{where} ({kind})", architecture, kwargs, mean, std, of_kind(f"{kind}'s code"),
        usual=True, square=True, heads=PUBLISHED_HEADS, licence=licence, dropped=dropped + index,
    )  # fmt: skip


def read_fairseq(state: dict[str, Tensor], container: Container) -> UnbuiltBackbone:
    """fairseq's data2vec_vision: the student; its teacher lies beside it as `_ema`."""
    where = str(container.path)
    state, dropped = drop(state, r"^(mask_emb$|final_proj\.)|relative_position_index$")
    state = rename(state, FAIRSEQ_RULES)
    architecture, kwargs = infer_beit(state, where)
    return UnbuiltBackbone(
        state, f"{where} (data2vec, fairseq; its LayerNorm eps 1e-5 is 1e-6 here)", architecture,
        kwargs, **IMAGENET, known_from=of_kind("fairseq's code"), square=True,
        heads=PUBLISHED_HEADS, licence=if_published("MIT"), dropped=dropped,
    )  # fmt: skip


# --- files that say which timm model they are ----------------------------------------------------


def read_named(state: dict[str, Tensor], container: Container) -> UnbuiltBackbone | None:
    """Weights whose config.json, as timm writes it to the hub, names their model, else None."""
    config, where = container.config, str(container.path)
    architecture = config.get("architecture")
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        return None
    cfg = config.get("pretrained_cfg")
    cfg = cfg if isinstance(cfg, dict) else {}
    name = _known(f"{architecture}.{cfg.get('tag')}" if cfg.get("tag") else architecture)
    name = quickgelu_name(name) or name  # the weights of a wrong name under their right one
    known = timm.get_pretrained_cfg(name) or PretrainedCfg()
    try:
        size = pair(cfg.get("input_size", known.input_size)[1:])
        mean, std = (
            tuple(float(v) for v in cfg[part]) if cfg.get(part) else None
            for part in ("mean", "std")
        )
    except (TypeError, ValueError, IndexError) as error:
        raise InputError(f"{where}: its config.json is damaged ({one_line(error)})") from error
    source = "config.json"
    if (
        mean is None or std is None
    ) and "." in name:  # its tag says which weights of timm these are
        mean, std, source = tuple(known.mean), tuple(known.std), f"timm's {name} (config.json)"
    given = config.get("model_args")
    kwargs = plain_kwargs(given, where) if isinstance(given, dict) else {}
    kwargs["img_size"] = pair(kwargs["img_size"]) if kwargs.get("img_size") else size
    head = [state.get("head.weight"), state.get("head.bias")]
    bare, dropped = drop(state, r"^(head|head_dist|pre_logits)\.|relative_position_index$")
    return UnbuiltBackbone(
        bare, f"{where} (timm {name})", name.split(".")[0], kwargs, mean, std,
        {"network": "config.json", "normalisation": source, "grid": "config.json"},
        licence=cfg.get("license") or if_published(known.license if "." in name else None),
        head=head[0] if head[0] is not None and not _any(head[1]) else None, dropped=dropped,
    )  # fmt: skip


def _known(name: str) -> str:
    """The name without its tag where timm does not know the tag."""
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError:
        return name.split(".")[0]
    return name
