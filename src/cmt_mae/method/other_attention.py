"""Attention of other networks than a plain ViT with a class token: rotary or relative positions, pooling probe."""

from typing import Any

import torch
from timm.layers import apply_rot_embed_cat
from torch import Tensor
from torch.nn import functional as F

from cmt_mae.core.errors import InputError
from cmt_mae.method.last_block import (
    attention_scale,
    finish,
    first_norm,
    is_plain_attention,
    last_keys,
    project,
)
from cmt_mae.method.vit import LastBlockInput, Vit, has_class_token

ROWS_AT_ONCE = 64
"""Column means of networks without class token go through so many queries at a time."""


def other_rows(model: Vit, state: LastBlockInput) -> Tensor:
    """``attention_rows`` of these networks: (B, heads, P + L) fp32."""
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


def _query_key(
    model: Vit, state: LastBlockInput, only_class: bool
) -> tuple[Tensor, Tensor, float, Tensor | None]:
    """Queries (class token or all) and keys of the last block, its scale and additive bias; all in fp32.

    A plain ViT projects as the network runs, see ``attention_rows``.
    """
    block = model.blocks[-1]
    if is_plain_attention(block.attn):
        tokens = first_norm(block, state)
        query = project(block.attn, tokens[:, :1] if only_class else tokens, 0).float()
        key = last_keys(model, state).float()
        return query, key, attention_scale(block.attn, query), None
    with _no_autocast(state.tokens):
        query, key, bias = _other_query_key(model, state, only_class)
    return query, key, attention_scale(block.attn, query), bias


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
