"""A backbone as a file that other tools load: timm, transformers, plain torch."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save as to_safetensors
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from cmt_mae.backbones.backbone import Backbone
from cmt_mae.backbones.build import pretrained_cfg
from cmt_mae.backbones.licences import NOT_STATED, libraries_line
from cmt_mae.backbones.load import load_backbone
from cmt_mae.backbones.save import plain_state, save_backbone, write_atomically
from cmt_mae.core.backbone_facts import BackboneFacts
from cmt_mae.core.errors import InputError
from cmt_mae.core.lock import only_one
from cmt_mae.core.settings import check_fields
from cmt_mae.core.text import printable

EXPORT_LOCK = ".export.lock"
"""Two exports at once into a folder would leave the weights of one with the configuration of the other."""


@dataclass
class ExportConfig(BackboneFacts):
    """Settings of `export`."""

    backbone: str
    """What to export: a run directory, a file or a timm name."""
    out: str
    """Where to: a folder for timm and hf, FILE.pth (or .pt) for torch. timm also takes FILE.safetensors: one
    file, which timm loads without its normalisation."""
    format: Literal["timm", "hf", "torch"] = "timm"
    """timm: loads in timm.create_model; hf: in transformers.ViTModel; torch: a plain state dict."""
    key: str | None = None
    """Which weights of a run or file with several, e.g. momentum; none takes the usual ones."""


def export(config: ExportConfig) -> dict[str, Any]:
    """Write the backbone in another tool's format; features stay equal.

    Prints the licences on stderr (of the weights, of their teacher, of the libraries) and the line that loads it.
    Returns what was written: out, format, architecture, kwargs, digest, source, licence of the
    weights, teacher (name, licence), libraries (one line), and `load`, the line of Python that loads it.
    Raises InputError when the format cannot express the network or the file cannot be written.
    """
    check_fields(config)
    backbone = load_backbone(config.backbone, key=config.key, facts=config)
    out = Path(config.out)
    if config.format == "hf":
        _folder(out)
        _hf_config(backbone)  # refused before the folder is made
        with only_one(out, EXPORT_LOCK):
            load = _export_hf(backbone, out)
    elif config.format == "timm" and out.suffix != ".safetensors":
        _folder(out)
        with only_one(out, EXPORT_LOCK):
            load = _export_timm(backbone, out)
    elif config.format == "timm":
        load = _export_timm_file(backbone, _with_suffix(out, ".safetensors"))
    else:
        load = _export_torch(backbone, _with_suffix(out, ".pth", ".pt"))
    for line in [*licence_lines(backbone), f"load it with: {load}"]:
        print(printable(line), file=sys.stderr)
    return {
        "out": str(out),
        "format": config.format,
        "architecture": backbone.architecture,
        "kwargs": backbone.kwargs,
        "digest": backbone.digest,
        "source": backbone.source,
        "licence": backbone.licence,
        "teacher": backbone.teacher,
        "libraries": libraries_line(),
        "load": load,
    }


def licence_lines(backbone: Backbone) -> list[str]:
    """Whose terms hold for an exported backbone: one line each."""
    lines = [f"licence of the weights: {backbone.licence or NOT_STATED} ({backbone.source})"]
    if backbone.teacher:
        licence = backbone.teacher.get("licence", NOT_STATED)
        name = backbone.teacher.get("name") or f"weights {backbone.teacher.get('digest', '')[:12]}"
        lines.append(f"taught by {name}, licence of its weights: {licence}; it may bind these too")
    return [*lines, f"libraries: {libraries_line()}; all: docs/licences.md"]


def _with_suffix(out: Path, *suffixes: str) -> Path:
    if out.suffix not in suffixes or out.is_dir():
        raise InputError(
            f"{out}: this format is one file; give --out a name that ends in {' or '.join(suffixes)}"
        )
    return out


def _folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; this format is a folder")


def _arguments(backbone: Backbone) -> str:
    """kwargs as they stand in a call; CLIP's projection is a head of E classes."""
    classes = 0 if backbone.proj is None else backbone.proj.shape[0]
    return ", ".join(f"{k}={v!r}" for k, v in {"num_classes": classes, **backbone.kwargs}.items())


def _export_timm_file(backbone: Backbone, out: Path) -> str:
    """The weights alone."""
    _save(backbone, out)
    arguments = _arguments(backbone)
    return (
        f"timm.create_model({backbone.architecture!r}, checkpoint_path={str(out)!r}, {arguments})"
    )


def _save(backbone: Backbone, file: Path) -> None:
    save_backbone(
        file,
        backbone.model,
        architecture=backbone.architecture,
        kwargs=backbone.kwargs,
        mean=backbone.mean,
        std=backbone.std,
        img_size=backbone.img_size,
        licence=backbone.licence,
        source=backbone.source,
        extra={"teacher": backbone.teacher},
        proj=backbone.proj,
    )


def _export_timm(backbone: Backbone, out: Path) -> str:
    """A folder as timm reads it: weights, config.json."""
    _save(backbone, out / "model.safetensors")
    channels = len(backbone.mean)
    cfg = pretrained_cfg(backbone, channels)
    config = {
        "architecture": backbone.architecture,
        "num_classes": cfg["num_classes"],
        "num_features": int(backbone.model.num_features),  # type: ignore[arg-type]
        "model_args": backbone.kwargs,
        "pretrained_cfg": cfg,
    }
    # the configuration last: a folder without it is not taken for a model
    write_atomically(out / "config.json", json.dumps(config, indent=2).encode())
    return f"timm.create_model({f'local-dir:{out}'!r}, pretrained=True)"


def _export_torch(backbone: Backbone, out: Path) -> str:
    buffer = io.BytesIO()
    torch.save(plain_state(backbone.model, backbone.proj), buffer)
    write_atomically(out, buffer.getvalue())
    model = f"model = timm.create_model({backbone.architecture!r}, {_arguments(backbone)})"
    return f"{model}; model.load_state_dict(torch.load({str(out)!r}, weights_only=True))"


def _export_hf(backbone: Backbone, out: Path) -> str:
    config = _hf_config(backbone)
    state = _hf_state(plain_state(backbone.model, None))
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(backbone.mean),
        "image_std": list(backbone.std),
        "resample": 3,
        "size": {"height": backbone.img_size[0], "width": backbone.img_size[1]},
    }
    # the configuration last: a folder without it is not taken for a model
    write_atomically(out / "model.safetensors", to_safetensors(state, {"format": "pt"}))
    write_atomically(out / "preprocessor_config.json", json.dumps(processor, indent=2).encode())
    write_atomically(out / "config.json", json.dumps(config, indent=2).encode())
    return f"transformers.ViTModel.from_pretrained({str(out)!r}, add_pooling_layer=False)"


def _hf_config(backbone: Backbone) -> dict[str, Any]:
    """config.json of a transformers ViTModel; InputError for what ViTModel cannot compute."""
    model = backbone.model
    odd = _what_hf_lacks(model)
    if odd:
        raise InputError(
            f"transformers.ViTModel cannot express {', '.join(odd)} of '{backbone.architecture}'; "
            "take --format timm"
        )
    assert isinstance(model, VisionTransformer)
    block: Any = model.blocks[0]
    size, patch = backbone.img_size, model.patch_embed.patch_size
    return {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": model.embed_dim,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "hidden_act": "gelu",
        "layer_norm_eps": block.norm1.eps,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "qkv_bias": block.attn.qkv.bias is not None,
        "image_size": size[0] if size[0] == size[1] else list(size),
        "patch_size": patch[0] if patch[0] == patch[1] else list(patch),
        "num_channels": model.patch_embed.proj.in_channels,
        "torch_dtype": "float32",
        "licence_of_weights": backbone.licence,
        "source_of_weights": backbone.source,
        "teacher_of_weights": backbone.teacher or None,
    }


def _what_hf_lacks(model: nn.Module) -> list[str]:
    """Parts of the network that a transformers ViTModel does not have."""
    if type(model) is not VisionTransformer:
        return [f"a {type(model).__name__}"]
    block: Any = model.blocks[0]
    names = set(model.state_dict())
    odd = {
        "no class token": model.cls_token is None,
        "register tokens": model.num_reg_tokens > 0,
        "positions without a class row": model.pos_embed is None or model.no_embed_class,
        "a norm before the blocks": not isinstance(model.norm_pre, nn.Identity),
        "no norm after the blocks": isinstance(model.norm, nn.Identity),
        "layer scale": any(".ls1." in k for k in names),
        "norms of q and k": any(".q_norm." in k for k in names),
        "an attention pool": model.attn_pool is not None,
        "its activation": type(getattr(block.mlp, "act", None)) is not nn.GELU,
        "its MLP": any("mlp." in k and ".fc1." not in k and ".fc2." not in k for k in names),
    }
    return [name for name, there in odd.items() if there]


def _hf_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names to those on disk of transformers' ViTModel (of version 4 and 5)."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".attn.qkv." in name:
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                new = name.replace(".attn.qkv.", f".attention.attention.{part}.")
                out[_hf_name(new)] = rows.contiguous().clone()
        else:
            out[_hf_name(name)] = tensor
    return out


def _hf_name(name: str) -> str:
    for ours, theirs in (
        ("cls_token", "embeddings.cls_token"),
        ("pos_embed", "embeddings.position_embeddings"),
        ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
        ("blocks.", "encoder.layer."),
        (".attn.proj.", ".attention.output.dense."),
        (".mlp.fc1.", ".intermediate.dense."),
        (".mlp.fc2.", ".output.dense."),
        (".norm1.", ".layernorm_before."),
        (".norm2.", ".layernorm_after."),
    ):
        name = name.replace(ours, theirs)
    return name.replace("norm.", "layernorm.", 1) if name.startswith("norm.") else name
