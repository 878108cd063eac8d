"""Small tools to bring names of weights to timm's."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from cmt_mae.backbones.build import some
from cmt_mae.core.errors import InputError


def rename(state: dict[str, Tensor], rules: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """Apply every (pattern, replacement) in order to every name."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        if name in out:
            raise InputError(f"two weights of this file are both called '{name}' in timm's names")
        out[name] = tensor
    return out


def select(state: dict[str, Tensor], prefix: str, rest: str) -> tuple[dict[str, Tensor], list[str]]:
    """Names below a prefix, without it; the others must match `rest` and are listed as dropped.

    A name that is neither stays as it is, so that it is reported as unexpected later.
    """
    kept: dict[str, Tensor] = {}
    dropped = []
    for name, tensor in state.items():
        if name.startswith(prefix):
            kept[name.removeprefix(prefix)] = tensor
        elif re.search(rest, name):
            dropped.append(name)
        else:
            kept[name] = tensor
    return kept, dropped


def drop(state: dict[str, Tensor], pattern: str) -> tuple[dict[str, Tensor], list[str]]:
    """Take out the names that match; they are listed as dropped."""
    dropped = [k for k in state if re.search(pattern, k)]
    return {k: v for k, v in state.items() if k not in set(dropped)}, dropped


def fuse_qkv(state: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """attn.{q,k,v}.{weight,bias} -> attn.qkv.{weight,bias} in every block, rows in that order."""
    out = {k: v for k, v in state.items() if not re.search(r"\.attn\.[qkv]\.(weight|bias)$", k)}
    parts = state.keys() - out.keys()
    fused = {re.sub(r"\.attn\.[qkv]\.", ".attn.qkv.", k) for k in parts}
    for name in fused:
        three = [name.replace(".attn.qkv.", f".attn.{letter}.") for letter in "qkv"]
        missing = [k for k in three if k not in state]
        if missing:
            raise InputError(f"{where}: weights do not fit the model; missing: {some(missing)}")
        out[name] = torch.cat([state[k] for k in three], dim=0)
    return out
