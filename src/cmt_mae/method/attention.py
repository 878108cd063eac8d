"""Attention of the class token in the last block: one row per image, never an N x N matrix (spec section 1)."""

from typing import Any, Literal

import torch
from timm.layers import apply_rot_embed_cat
from torch import Tensor
from torch.nn import functional as F

from cmt_mae.core.errors import InputError
from cmt_mae.method.last_block import asks_alone, finish, first_norm, last_keys, project
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
ROWS_AT_ONCE = (
    64  # column means of networks without class token go through so many queries at a time
)


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
    rows = attention_rows(model, state) if read == "class" else column_means(model, state)
    prefix = num_prefix(model)
    mass = rows[:, :, :prefix].sum(-1).mean(1)
    return reduce_heads(rows[:, :, prefix:], heads), mass


def attention_rows(model: Vit, state: LastBlockInput) -> Tensor:
    """Attention of every head to each token, prefix tokens first: (B, heads, P + L) fp32, rows sum to 1.

    With a class token: its softmaxed row of the last block. Without: the row of the attention-pooling probe
    where there is one (SigLIP), else the column mean of the map (spec 1.4).
    """
    probe = getattr(model, "attn_pool", None)
    if has_class_token(model):
        return class_rows(model, state)
    if probe is not None:
        return _probe_rows(probe, _finished(model, state))
    return column_means(model, state)


def class_rows(model: Vit, state: LastBlockInput) -> Tensor:
    """softmax(q_cls K^T / sqrt d) of the last block, every head: (B, heads, P + L) fp32."""
    query, key, scale, bias = _query_key(model, state, only_class=True)
    with _no_autocast(query):
        logits = (query * scale) @ key.transpose(-2, -1)
        if bias is not None:
            logits = logits + bias[..., :1, :]
        return logits.softmax(-1).squeeze(2)


def column_means(model: Vit, state: LastBlockInput) -> Tensor:
    """mean_i attention[i, j], every head: (B, heads, P + L) fp32, a few rows of the map at a time."""
    query, key, scale, bias = _query_key(model, state, only_class=False)
    total = torch.zeros_like(key[..., 0])
    with _no_autocast(query):
        for start in range(0, query.shape[2], ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            logits = (query[:, :, rows] * scale) @ key.transpose(-2, -1)
            if bias is not None:
                logits = logits + bias[..., rows, :]
            total += logits.softmax(-1).sum(2)
    return total / query.shape[2]


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


def _query_key(
    model: Vit, state: LastBlockInput, only_class: bool
) -> tuple[Tensor, Tensor, float, Tensor | None]:
    """Queries (class token or all) and keys of the last block, its scale and additive bias; all in fp32.

    A plain ViT projects as the network runs (under autocast in bf16) and shares its keys with ``finish``;
    the products of queries and keys and their softmax are taken in fp32 all the same (spec 1).
    """
    block = model.blocks[-1]
    scale = float(getattr(block.attn, "scale", 0.0))
    if asks_alone(block.attn):
        tokens = first_norm(block, state)
        query = project(block.attn, tokens[:, :1] if only_class else tokens, 0)
        return query.float(), last_keys(model, state).float(), scale, None
    with _no_autocast(state.tokens):
        query, key, bias = _other_query_key(model, state, only_class)
    return query, key, scale or query.shape[-1] ** -0.5, bias


def _other_query_key(
    model: Vit, state: LastBlockInput, only_class: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same with rotary embedding (Eva) or relative position bias (Beit), computed in fp32."""
    block = model.blocks[-1]
    attn, tokens = block.attn, block.norm1(state.tokens).float()
    asking = tokens[:, :1] if only_class else tokens
    query, key = _project(attn, asking, 0), _project(attn, tokens, 1)
    if hasattr(attn, "q_norm"):
        query, key = attn.q_norm(query), attn.k_norm(key)
    rope, bias = state.context.get("rope"), None
    if rope is not None:
        prefix, half = attn.num_prefix_tokens, getattr(attn, "rotate_half", False)
        rope = rope.float()
        key = _rotate(key, rope, prefix, half)
        if not only_class:  # prefix tokens are not rotated
            query = _rotate(query, rope, prefix, half)
    if getattr(attn, "relative_position_bias_table", None) is not None:
        bias = attn._get_rel_pos_bias().float()
    shared = state.context.get("shared_rel_pos_bias")
    if shared is not None:
        bias = shared.float() if bias is None else bias + shared.float()
    return query, key, bias


def _finished(model: Vit, state: LastBlockInput) -> Tensor:
    """The whole last block, for the pooling probe; the features are then taken out of it."""
    if state.finished is None:
        state.finished = finish(model, state)
    return state.finished.float()


def _no_autocast(tensor: Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, enabled=False)


def _rotate(vectors: Tensor, rope: Tensor, prefix: int, half: bool) -> Tensor:
    rotated = apply_rot_embed_cat(vectors[:, :, prefix:], rope, half=half)
    return torch.cat([vectors[:, :, :prefix], rotated], dim=2)


def _project(attn: Any, tokens: Tensor, part: int) -> Tensor:
    """part 0: queries, 1: keys; (B, N, D) -> (B, heads, N, d) without computing the other parts."""
    if getattr(attn, "qkv", None) is not None:
        weight = attn.qkv.weight.float().chunk(3)[part]
        bias = attn.qkv.bias
        if bias is None and getattr(attn, "q_bias", None) is not None:
            bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        vectors = F.linear(tokens, weight, None if bias is None else bias.float().chunk(3)[part])
    elif hasattr(attn, "q_proj"):
        layer = (attn.q_proj, attn.k_proj)[part]
        vectors = F.linear(
            tokens, layer.weight.float(), None if layer.bias is None else layer.bias.float()
        )
    else:
        raise InputError(
            f"the attention of kind {type(attn).__name__} is not known: cannot read its map"
        )
    return vectors.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)


def _probe_rows(pool: Any, tokens: Tensor) -> Tensor:
    """Attention of the pooling probe (SigLIP): tokens (B, L, D) after the final norm -> (B, heads, L)."""
    with _no_autocast(tokens):
        return _probe_attention(pool, tokens)


def _probe_attention(pool: Any, tokens: Tensor) -> Tensor:
    if pool.pos_embed is not None:
        tokens = tokens + pool.pos_embed[None]
    batch = tokens.shape[0]
    query = (
        pool.q(pool.latent.expand(batch, -1, -1))
        .unflatten(-1, (pool.num_heads, -1))
        .transpose(1, 2)
    )
    key = pool.kv(tokens).chunk(2, dim=-1)[0].unflatten(-1, (pool.num_heads, -1)).transpose(1, 2)
    query, key = pool.q_norm(query), pool.k_norm(key)
    return ((query * pool.scale) @ key.transpose(-2, -1)).softmax(-1).mean(2)
