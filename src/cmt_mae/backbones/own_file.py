"""Our own file of a backbone: safetensors in timm's names, with a header that rebuilds it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from cmt_mae.backbones.backbone import state_digest
from cmt_mae.backbones.build import UnbuiltBackbone, pair, plain_kwargs
from cmt_mae.core.errors import InputError
from cmt_mae.core.text import one_line

HEADER = "cmt_mae"
"""Name of our entry in the safetensors header; its value is JSON."""


def own_header(path: Path) -> str | None:
    """Our entry in the header of a .safetensors file; None for every other file."""
    try:
        with safe_open(path, framework="pt") as file:
            header: str | None = (file.metadata() or {}).get(HEADER)
            return header
    except (SafetensorError, OSError, ValueError, RuntimeError):
        return None


def read_ours(path: Path, own: str) -> UnbuiltBackbone:
    """Weights from a file of `save_backbone`. InputError when its header is damaged or hostile.

    own: see `own_header`.
    """
    where = str(path)
    try:
        header = json.loads(own)
        architecture = str(header["architecture"])
        kwargs = plain_kwargs(dict(header["kwargs"]), where)
        kwargs["img_size"] = pair(header["img_size"])
        mean = tuple(float(v) for v in header["mean"])
        std = tuple(float(v) for v in header["std"])
        licence = header.get("licence")
        self_check = [float(v) for v in header.get("self_check", [])]
        source = one_line(header.get("source") or where)
        taught = header.get("teacher") or {}
        taught = {"digest": taught} if isinstance(taught, str) else taught
        teacher = {one_line(k): one_line(v) for k, v in taught.items() if v}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{where}: its header is damaged ({one_line(error)})") from error
    state = tensors_of(read_safetensors(path)[0], path)
    proj = state.pop("head.weight", None) if header.get("proj") else None
    if proj is not None:
        state.pop("head.bias", None)
    written = header.get("digest")
    if written and written != state_digest(state if proj is None else {**state, "proj": proj}):
        raise InputError(f"{where}: its weights are not those written (checksum); copy it again")
    return UnbuiltBackbone(
        state, source, architecture, kwargs, mean, std,
        dict.fromkeys(("network", "normalisation", "grid"), "its header"),
        licence=None if licence is None else one_line(licence), proj=proj, self_check=self_check,
        teacher=teacher,
    )  # fmt: skip


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a .safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in list(file.keys())}, (
                file.metadata() or {}
            )
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{path}: damaged or no safetensors file ({one_line(error)}); copy or download it again"
        ) from error


def tensors_of(tree: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    """The entries that are tensors under a name; InputError when one claims more than it holds."""
    tensors = {k: v for k, v in tree.items() if isinstance(k, str) and isinstance(v, Tensor)}
    for name, tensor in tensors.items():
        if tensor.is_sparse or tensor.is_quantized or tensor.is_meta:
            raise InputError(f"{path}: '{name}' is no plain tensor; save the weights as plain ones")
        if math.prod(tensor.shape) * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise InputError(
                f"{path}: '{name}' claims shape {tuple(tensor.shape)}, more than it holds"
            )
    return tensors
