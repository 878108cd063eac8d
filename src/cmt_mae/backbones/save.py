"""Writing our own file of a backbone; own_file.py reads it."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from cmt_mae.backbones.backbone import backbone_digest, learned_state, state_digest
from cmt_mae.backbones.build import pair, plain_kwargs
from cmt_mae.backbones.own_file import HEADER
from cmt_mae.backbones.selfcheck import features_of_fixed_picture
from cmt_mae.core import files


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside, fsync, rename: the file is whole or not there. InputError if it fails."""
    files.write_atomically(path, lambda aside: aside.write_bytes(data))


def plain_state(
    model: nn.Module, proj: Tensor | None, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """State dict on the CPU in `dtype`; `proj` as timm keeps it: a head whose bias is zero."""
    state = {
        k: v.detach().to("cpu", dtype).clone(memory_format=torch.contiguous_format)
        for k, v in learned_state(model).items()
    }
    if proj is not None:
        state["head.weight"] = proj.detach().to("cpu", dtype).contiguous().clone()
        state["head.bias"] = torch.zeros(proj.shape[0], dtype=dtype)
    return state


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
    dtype: torch.dtype = torch.float32,
) -> str:
    """Write a headless timm model as safetensors in timm's names; returns its digest.

    The file loads in `timm.create_model(architecture, num_classes=0, checkpoint_path=path,
    **kwargs)` and in `load_backbone`. With `proj` (E, D) it also holds CLIP's projection as timm
    does: a head of E classes with a bias of zero (num_classes=E then). `extra` (JSON) is kept in
    the header for whoever reads it. `dtype` float16 halves the file. The write is atomic;
    InputError when the disk refuses it.
    """
    plain_kwargs(kwargs, str(path))  # what could not be read again is not written
    state = plain_state(model, proj, dtype)
    digest = backbone_digest(model, proj) if dtype == torch.float32 else stored_digest(state, proj)
    header = {
        **(extra or {}),
        "architecture": architecture,
        "kwargs": kwargs,
        "mean": list(mean),
        "std": list(std),
        "img_size": list(pair(img_size)),
        "licence": licence,
        "source": source,
        "proj": proj is not None,
        "digest": digest,
        "self_check": features_of_fixed_picture(as_stored(model, dtype), mean, std, pair(img_size)),
    }
    metadata = {"format": "pt", HEADER: json.dumps(header)}
    write_atomically(Path(path), same_bytes(to_safetensors(state, metadata)))
    return digest


def same_bytes(data: bytes) -> bytes:
    """A safetensors file with its metadata in order of their names, as the library leaves that to chance.

    So the same weights are the same file, with the same checksum.
    """
    (size,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def as_stored(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model as it will be read again: with weights rounded to `dtype`."""
    return model if dtype == torch.float32 else copy.deepcopy(model).to(dtype).float()


def stored_digest(state: dict[str, Tensor], proj: Tensor | None) -> str:
    """Digest of a state dict as it stands in a file: the head is the projection (see `plain_state`)."""
    if proj is None:
        return state_digest(state)
    kept = {k: v for k, v in state.items() if not k.startswith("head.")}
    return state_digest({**kept, "proj": state["head.weight"]})
