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
    """attn.{q,k,v}.{weight,bias} -> attn.qkv.{weight,bias} in every block, rows in that order.

    Biases of q and v alone (BEiT, DINOv3) become attn.q_bias and attn.v_bias.
    """
    out = {k: v for k, v in state.items() if not re.search(r"\.attn\.[qkv]\.(weight|bias)$", k)}
    parts = state.keys() - out.keys()
    fused = {re.sub(r"\.attn\.[qkv]\.", ".attn.qkv.", k) for k in parts}
    for name in fused:
        three = [name.replace(".attn.qkv.", f".attn.{letter}.") for letter in "qkv"]
        missing = [k for k in three if k not in state]
        if missing == [three[1]] and name.endswith("bias"):
            for part in (three[0], three[2]):
                out[part.removesuffix(".bias") + "_bias"] = state[part]
        elif missing:
            raise InputError(f"{where}: weights do not fit the model; missing: {some(missing)}")
        else:
            out[name] = torch.cat([state[k] for k in three], dim=0)
    return out


def with_registers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """DINOv2 with registers: timm adds the class token's position to the token itself."""
    if not {"register_tokens", "cls_token", "pos_embed"} <= state.keys():
        return state
    out = {k: v for k, v in state.items() if k != "register_tokens"}
    out["reg_token"] = state["register_tokens"]
    out["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
    out["pos_embed"] = state["pos_embed"][:, 1:]
    return out


WRAPPERS = re.compile(
    r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(\.(?:_orig_mod|_fsdp_wrapped_module"
    r"|_checkpoint_wrapped_module))*(?=\.)"
)
"""What torch.compile, FSDP and activation checkpointing put into names, in front or inside."""
# The first weights of the kinds of networks that are read, by which a part of a file is found.
MARKS = ("patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight")


def without_wrappers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without what DDP, torch.compile, FSDP, checkpointing and DINOv2's chunks of blocks put into them."""
    state = rename(state, ((WRAPPERS.pattern, ""), (r"^\.", "")))
    for _ in range(2):
        if all(k.startswith("module.") for k in state):
            state = {k.removeprefix("module."): v for k, v in state.items()}
    chunked = re.compile(r"(^|\.)blocks\.\d+\.(\d+)\.")
    blocks = [k for k in state if re.search(r"(^|\.)blocks\.\d+\.", k)]
    if blocks and all(chunked.search(k) for k in blocks):
        state = rename(state, ((chunked.pattern, r"\1blocks.\2."),))
    return state


def refuse_unknown_prefix(state: dict[str, Tensor], where: str) -> None:
    """InputError that lists the prefixes in front of whole networks, where there is none without a prefix."""
    found = {
        k.removesuffix(mark).rstrip(".") for k in state for mark in MARKS if k.endswith(f".{mark}")
    } - {""}
    if "patch_embed.proj.weight" not in state and found:
        names = sorted(found)
        raise InputError(
            f"{where}: its networks stand under prefixes: {some(names)}; say which one, as in --key {names[0]}"
        )
