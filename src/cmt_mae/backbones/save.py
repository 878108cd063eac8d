"""Our own file of a backbone: safetensors in timm's names, with a header that rebuilds it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from cmt_mae.backbones.backbone import backbone_digest
from cmt_mae.backbones.build import MAX_PIXELS, Weights, one_line, pair
from cmt_mae.backbones.container import Container
from cmt_mae.errors import InputError

HEADER = "cmt_mae"
"""Name of our entry in the safetensors header; its value is JSON."""

# What a header may ask timm for. Everything else (checkpoint_path, pretrained_cfg, ...) could make
# timm read or fetch other files, so a hostile header is refused.
ALLOWED_KWARGS = frozenset(
    "img_size patch_size in_chans embed_dim depth num_heads mlp_ratio qkv_bias qk_norm init_values "
    "class_token global_pool fc_norm use_fc_norm no_embed_class reg_tokens pos_embed pre_norm "
    "final_norm dynamic_img_size dynamic_img_pad use_abs_pos_emb use_rel_pos_bias "
    "use_shared_rel_pos_bias scale_mlp swiglu_mlp drop_path_rate num_reg_tokens".split()
)


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside, fsync, rename: the file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written: {one_line(error)}") from error


def save_backbone(
    path: str | Path,
    model: nn.Module,
    *,
    architecture: str,
    kwargs: dict[str, Any],
    mean: Sequence[float],
    std: Sequence[float],
    img_size: int | Sequence[int],
    licence: str | None,
    source: str,
    extra: dict[str, Any] | None = None,
    proj: Tensor | None = None,
) -> str:
    """Write a headless timm model as safetensors in timm's names; returns its digest.

    The file loads in `timm.create_model(architecture, num_classes=0, checkpoint_path=..., **kwargs)`
    and in `load_backbone`. With `proj` (E, D) it also holds CLIP's projection as timm does: a head
    of E classes without bias (num_classes=E then). `extra` (JSON) is kept in the header for the
    reader's information. The write is atomic; InputError when the disk refuses it.
    """
    state = {k: v.detach().cpu().float().contiguous().clone() for k, v in model.state_dict().items()}
    digest = backbone_digest(model, proj)
    if proj is not None:
        state["head.weight"] = proj.detach().cpu().float().contiguous().clone()
        state["head.bias"] = torch.zeros(proj.shape[0])
    header = {
        "architecture": architecture,
        "kwargs": kwargs,
        "mean": list(mean),
        "std": list(std),
        "img_size": list(pair(img_size)),
        "licence": licence,
        "source": source,
        "proj": proj is not None,
        "digest": digest,
        **(extra or {}),
    }
    metadata = {"format": "pt", HEADER: json.dumps(header)}
    write_atomically(Path(path), to_safetensors(state, metadata))
    return digest


def read_ours(container: Container) -> Weights:
    """Weights from a file of `save_backbone`. InputError when header and tensors disagree."""
    where = str(container.path)
    try:
        header = json.loads(container.metadata[HEADER])
        architecture, kwargs = str(header["architecture"]), dict(header["kwargs"])
        mean = tuple(float(v) for v in header["mean"])
        std = tuple(float(v) for v in header["std"])
        kwargs["img_size"] = pair(header["img_size"])
        licence, source = header.get("licence"), " ".join(str(header.get("source") or where).split())
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise InputError(f"{where}: damaged {HEADER} header ({one_line(error)})") from error
    state = dict(container.tree)
    kwargs = {k: tuple(v) if isinstance(v, list) else v for k, v in kwargs.items()}
    _check_kwargs(kwargs, state, where)
    proj = None
    if header.get("proj"):
        proj = state.pop("head.weight", None)
        state.pop("head.bias", None)
    return Weights(
        state, architecture, kwargs, mean, std, source, None if licence is None else str(licence), proj
    )


def _check_kwargs(kwargs: dict[str, Any], state: dict[str, Tensor], where: str) -> None:
    """Refuse a header that asks timm for more than sizes, or for sizes that its tensors deny."""
    foreign = kwargs.keys() - ALLOWED_KWARGS
    if foreign:
        raise InputError(f"{where}: header asks for {sorted(foreign)}; only sizes are taken from files")
    weights = sum(v.numel() for v in state.values())
    conv = state.get("patch_embed.proj.weight")
    width = kwargs.get("embed_dim", conv.shape[0] if conv is not None else None)
    try:
        numbers = [n for v in kwargs.values() for n in (v if isinstance(v, tuple) else (v,))]
        sane = all(isinstance(n, bool | str | None) or 0 <= float(n) <= MAX_PIXELS for n in numbers)
        depth, ratio = int(kwargs.get("depth", 1)), float(kwargs.get("mlp_ratio", 4.0))
        sane = sane and conv is not None and width == conv.shape[0]
        sane = sane and depth * width * width * (4 + ratio) <= 2 * weights + 4 * width * width
    except (TypeError, ValueError):
        sane = False
    if not sane:
        raise InputError(f"{where}: sizes in its header do not fit its tensors; the file is damaged")
