"""Attention of the class token in the last block: one row per image, never an N x N matrix (spec section 1)."""

from typing import Literal

import torch
from torch import Tensor

from cmt_mae.core.errors import InputError
from cmt_mae.method.last_block import (
    attention_scale,
    first_norm,
    is_plain_attention,
    last_keys,
    project,
)
from cmt_mae.method.vit import (
    LastBlockInput,
    Vit,
    block_number,
    has_class_token,
    num_prefix,
    up_to,
)

Heads = Literal["mean", "max", "minmax_mean"]
Normalise = Literal["sum", "none", "minmax", "rank", "zscore_softmax"]
Reading = Literal["class", "column_mean"]


def attention_map(
    model: Vit,
    state: LastBlockInput,
    heads: Heads = "mean",
    *,
    block: int = -1,
    read: Reading = "class",
) -> tuple[Tensor, Tensor]:
    """Raw attention to each patch (B, L) fp32 and the mass on prefix tokens (B,), averaged over heads.

    block: as it was given to ``forward_to_last``. read: class (``attention_rows``) | column_mean (how much all
    tokens together attend to each one).
    """
    if state.before is not None:
        model = up_to(model, block_number(model, block) + 1)
        state = LastBlockInput(state.before, state.context, [])
    if read == "class":
        rows = attention_rows(model, state)
    else:
        from cmt_mae.method.other_attention import column_means

        rows = column_means(model, state)
    prefix = num_prefix(model)
    mass = rows[:, :, :prefix].sum(-1).mean(1)
    return reduce_heads(rows[:, :, prefix:], heads), mass


def attention_rows(model: Vit, state: LastBlockInput) -> Tensor:
    """Attention of every head to each token, prefix tokens first: (B, heads, P + L) fp32, rows sum to 1.

    With a class token: its softmaxed row of the last block, softmax(q_cls K^T / sqrt d). Without: the row of the
    attention-pooling probe where there is one (SigLIP), else the column mean of the map (spec 1.4).
    A plain ViT projects as the network runs (under autocast in bf16) and shares its keys with ``finish``; the
    products of queries and keys and their softmax are taken in fp32 all the same (spec 1).
    """
    block = model.blocks[-1]
    if not has_class_token(model) or not is_plain_attention(block.attn):
        from cmt_mae.method.other_attention import other_rows

        return other_rows(model, state)
    query = project(block.attn, first_norm(block, state)[:, :1], 0).float()
    key, scale = last_keys(model, state).float(), attention_scale(block.attn, query)
    with torch.autocast(query.device.type, enabled=False):
        return ((query * scale) @ key.transpose(-2, -1)).softmax(-1).squeeze(2)


def reduce_heads(rows: Tensor, heads: Heads) -> Tensor:
    """(B, heads, L) -> (B, L): mean, maximum, or mean of maps stretched to 0..1 each (AMT).

    Raises InputError for another name.
    """
    if heads == "mean":
        return rows.mean(1)
    if heads == "max":
        return rows.amax(1)
    if heads != "minmax_mean":
        raise InputError(f"mask.heads '{heads}' is unknown: use mean, max or minmax_mean")
    low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
    return ((rows - low) / (high - low).clamp_min(1e-12)).mean(1)


def normalise_map(raw: Tensor, how: Normalise = "sum") -> Tensor:
    """Bring maps (B, L) of two networks to one scale before they are mixed (spec 0.4, O4).

    sum: A / sum A, so that the mass on the class token, which differs between networks, has no say.
    Raises InputError for another name.
    """
    if how == "none":
        return raw
    if how == "minmax":
        low, high = raw.amin(-1, keepdim=True), raw.amax(-1, keepdim=True)
        raw = (raw - low) / (high - low).clamp_min(1e-12)
    elif how == "rank":
        raw = raw.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True).to(raw.dtype) + 1
    elif how == "zscore_softmax":
        centred = raw - raw.mean(-1, keepdim=True)
        return (centred / centred.std(-1, keepdim=True).clamp_min(1e-12)).softmax(-1)
    elif how != "sum":
        raise InputError(
            f"mask.normalise '{how}' is unknown: use sum, none, minmax, rank or zscore_softmax"
        )
    return raw / raw.sum(-1, keepdim=True).clamp_min(1e-12)


def mix_attention(student: Tensor, teacher: Tensor, alpha: float) -> Tensor:
    """Eq. 3: A_c = alpha * A_s + (1 - alpha) * A_t, both (B, L) normalised alike; alpha in 0..1."""
    return alpha * student + (1 - alpha) * teacher
