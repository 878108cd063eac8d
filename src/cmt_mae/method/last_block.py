"""The last block, run only for the tokens that are needed (exact savings, spec section 11).

Its keys and values come from every token, its queries, output layer and MLP from those alone.
"""

from typing import Any

import torch
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from cmt_mae.method.vit import LastBlockInput, Vit, gather_tokens, num_prefix


def finish(
    model: Vit, state: LastBlockInput, ids: Tensor | None = None, with_prefix: bool = True
) -> Tensor:
    """The last block and the final norm.

    ids (B, K): patches to finish; None: all. with_prefix: prefix tokens (class, registers) are finished too
    and come first. Returns (B, P + K, D), (B, P + L, D) or, without them, (B, K, D) or (B, L, D).
    """
    block, prefix, start = (
        model.blocks[-1],
        num_prefix(model),
        0 if with_prefix else num_prefix(model),
    )
    if state.finished is not None:
        tokens = state.finished
    elif ids is None:
        attended = block.attn(first_norm(block, state), **_attn_context(state))
        tokens = model.norm(_second_half(block, state.tokens, attended))
    elif is_plain_attention(block.attn):
        places = _places(ids, prefix, with_prefix)
        return model.norm(run_at(block, state.tokens, places, first_norm(block, state), state.keys))
    else:  # rotary or relative positions: queries of every token, then the needed ones go on
        attended = block.attn(first_norm(block, state), **_attn_context(state))
        places = _places(ids, prefix, with_prefix)
        tokens, attended = gather_tokens(state.tokens, places), gather_tokens(attended, places)
        return model.norm(_second_half(block, tokens, attended))
    if ids is None:
        return tokens[:, start:]
    return gather_tokens(tokens, _places(ids, prefix, with_prefix))


def mean_of_last(
    model: Vit, state: LastBlockInput, ids: Tensor | None = None, with_prefix: bool = True
) -> Tensor:
    """Mean of the raw outputs of the kept blocks and the last one (data2vec). Shapes as ``finish``."""
    last = model.blocks[-1](state.tokens, **state.context)
    mean, prefix = torch.stack([*state.earlier, last]).mean(0), num_prefix(model)
    if ids is None:
        return mean[:, 0 if with_prefix else prefix :]
    return gather_tokens(mean, _places(ids, prefix, with_prefix))


def run_at(
    block: Any,
    tokens: Tensor,
    places: Tensor,
    normed: Tensor | None = None,
    keys: Tensor | None = None,
) -> Tensor:
    """A plain pre-norm block at ``places`` (B, K) of ``tokens`` (B, N, D): (B, K, D), gradients included.

    normed, keys: after the first norm, and (B, heads, N, d), where they are there already.
    """
    attn = block.attn
    normed = block.norm1(tokens) if normed is None else normed
    keys = project(attn, normed, 1) if keys is None else keys
    queries = project(attn, gather_tokens(normed, places), 0)
    mixed = F.scaled_dot_product_attention(queries, keys, project(attn, normed, 2))
    attended = attn.proj(attn.norm(mixed.transpose(1, 2).flatten(2)))
    return _second_half(block, gather_tokens(tokens, places), attended)


def is_plain_attention(attn: nn.Module) -> bool:
    """Whether queries of some tokens can be made without the others: timm's plain attention, no gate."""
    return type(attn) is Attention and getattr(attn, "gate", None) is None


def project(attn: Any, tokens: Tensor, part: int) -> Tensor:
    """Queries (0), keys (1) or values (2) of timm's plain attention: (B, N, D) -> (B, heads, N, d)."""
    weight, bias = attn.qkv.weight.chunk(3)[part], attn.qkv.bias
    vectors = F.linear(tokens, weight, None if bias is None else bias.chunk(3)[part])
    vectors = vectors.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
    return vectors if part == 2 else (attn.q_norm, attn.k_norm)[part](vectors)


def attention_scale(attn: Any, query: Tensor) -> float:
    """What products of queries (..., d) and keys are multiplied by: the network's own, or 1 / sqrt d."""
    return float(getattr(attn, "scale", 0.0)) or query.shape[-1] ** -0.5


def first_norm(block: Any, state: LastBlockInput) -> Tensor:
    """All tokens after the first norm of the last block, made once."""
    if state.normed is None:
        state.normed = block.norm1(state.tokens)
    return state.normed


def last_keys(model: Vit, state: LastBlockInput) -> Tensor:
    """Keys of the last block (plain attention), made once: the map and the features share them."""
    if state.keys is None:
        block = model.blocks[-1]
        state.keys = project(block.attn, first_norm(block, state), 1)
    return state.keys


def _places(ids: Tensor, prefix: int, with_prefix: bool) -> Tensor:
    """Places among all tokens of patches ids (B, K), the prefix tokens first if wanted."""
    if not with_prefix or not prefix:
        return ids + prefix
    first = torch.arange(prefix, device=ids.device).expand(ids.shape[0], -1)
    return torch.cat([first, ids + prefix], dim=1)


def _second_half(block: Any, tokens: Tensor, attended: Tensor) -> Tensor:
    """Residual of the attention, then the MLP's."""
    tokens = tokens + _scaled(block, 1, attended)
    return tokens + _scaled(block, 2, block.mlp(block.norm2(tokens)))


def _attn_context(state: LastBlockInput) -> dict[str, Any]:
    return {name: value for name, value in state.context.items() if value is not None}


def _scaled(block: Any, part: int, update: Tensor) -> Tensor:
    """Layer scale of the block, whichever of timm's two spellings it has; no path is dropped here."""
    scale = getattr(block, f"ls{part}", None)
    if scale is not None:
        return scale(update)
    gamma = getattr(block, f"gamma_{part}", None)
    return update if gamma is None else gamma * update
