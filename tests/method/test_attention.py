"""Attention maps against maps that timm and torch multiply out in full, and hand-worked mixtures."""

from dataclasses import replace

import pytest
import torch
from method_nets import (
    FAMILIES,
    HEADS,
    WIDTH,
    WITH_CLASS,
    WITHOUT_CLASS,
    full_map,
    network,
    pictures,
)
from torch import Tensor, nn

from cmt_mae.core.errors import InputError
from cmt_mae.method import other_attention as A
from cmt_mae.method.attention import attention_map, mix_attention, normalise_map, reduce_heads
from cmt_mae.method.last_block import finish, is_plain_attention
from cmt_mae.method.masking import from_priority
from cmt_mae.method.vit import forward_to_last, num_prefix

FIRST = torch.tensor([[0.04, 0.03, 0.02, 0.01]])  # teacher: [.9 | ...] of spec 12.4
SECOND = torch.tensor([[0.08, 0.16, 0.24, 0.32]])  # student: [.2 | ...]


def close(ours: Tensor, wanted: Tensor, atol: float = 1e-6) -> None:
    torch.testing.assert_close(ours, wanted, atol=atol, rtol=0)


# --- one row against the whole map ---------------------------------------------------------------


@pytest.mark.parametrize("family", WITH_CLASS)
@torch.no_grad()
def test_class_row_equals_the_row_of_timms_full_map(family: str) -> None:
    model, x = network(family), pictures()
    whole, prefix = full_map(model, x), num_prefix(model)
    raw, mass = attention_map(model, forward_to_last(model, x))
    assert raw.dtype == torch.float32
    close(raw, whole[:, :, 0, prefix:].mean(1))
    close(mass, whole[:, :, 0, :prefix].sum(-1).mean(1))
    close(raw.sum(1) + mass, torch.ones(2))
    assert whole[:, :, 0].std() > 0.01  # not a flat map, that any error would pass


@pytest.mark.parametrize("block", [0, -2, 2])
@pytest.mark.parametrize(
    "family", ["vit", "dinov3 (rotary, registers)", "beit (relative positions)"]
)
@torch.no_grad()
def test_the_map_of_any_block_and_reading(family: str, block: int) -> None:
    """Class row and column means against timm's full map; the features still come from the end."""
    model, x, prefix = network(family), pictures(), num_prefix(network(family))
    state = forward_to_last(model, x, attention_block=block)
    whole = full_map(model, x, block).mean(1)
    for read, wanted in (("class", whole[:, 0]), ("column_mean", whole.mean(1))):
        raw, mass = attention_map(model, state, block=block, read=read)  # type: ignore[arg-type]
        close(raw, wanted[:, prefix:])
        close(mass, wanted[:, :prefix].sum(1))
    close(finish(model, state), finish(model, forward_to_last(model, x)))


@pytest.mark.parametrize("block", [3, -4])
def test_a_block_that_is_not_there_is_refused(block: int) -> None:
    with pytest.raises(InputError, match=f"attention block {block} .* give -3 to 2"):
        forward_to_last(network("vit"), pictures(), attention_block=block)


@pytest.mark.parametrize("at_once", [1, 5, 64])
@pytest.mark.parametrize("family", WITHOUT_CLASS)
@torch.no_grad()
def test_without_class_token_the_map_is_the_column_mean(
    family: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(A, "ROWS_AT_ONCE", at_once)
    model, x = network(family), pictures()
    whole, prefix = full_map(model, x), num_prefix(model)
    columns = whole.mean(2).mean(1)
    raw, mass = attention_map(model, forward_to_last(model, x))
    close(raw, columns[:, prefix:])
    close(mass, columns[:, :prefix].sum(1))
    assert (raw - whole[:, :, 0, prefix:].mean(1)).abs().max() > 0.01  # not the row of token 0


@torch.no_grad()
def test_probe_equals_torchs_attention() -> None:
    """SigLIP: the attention of the pooling probe, as torch's own module weighs the same tokens."""
    model, x = network("siglip"), pictures()
    pool = model.attn_pool
    theirs = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    theirs.in_proj_weight.copy_(torch.cat([pool.q.weight, pool.kv.weight]))
    theirs.in_proj_bias.copy_(torch.cat([pool.q.bias, pool.kv.bias]))
    tokens = model.forward_features(x)
    _, wanted = theirs(pool.latent.expand(2, -1, -1), tokens, tokens, need_weights=True)
    raw, mass = attention_map(model, forward_to_last(model, x))
    close(raw, wanted[:, 0])
    assert not mass.any()


@torch.no_grad()
def test_class_row_equals_torchs_multihead_attention() -> None:
    """The form in which CLIP's code gives it: nn.MultiheadAttention(need_weights=True)."""
    model, x = network("clip (pre-norm, QuickGELU)"), pictures(4)
    block, state = model.blocks[-1], forward_to_last(model, x)
    theirs = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    theirs.in_proj_weight.copy_(block.attn.qkv.weight)
    theirs.in_proj_bias.copy_(block.attn.qkv.bias)
    tokens = block.norm1(state.tokens)
    _, wanted = theirs(tokens, tokens, tokens, need_weights=True)
    close(attention_map(model, state)[0], wanted[:, 0, 1:], atol=1.5e-7)
    _, each = theirs(tokens, tokens, tokens, need_weights=True, average_attn_weights=False)
    close(attention_map(model, state, "max")[0], each[:, :, 0, 1:].amax(1), atol=3e-7)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_map_is_computed_in_fp32_under_autocast(family: str) -> None:
    model, x = network(family), pictures()
    state = forward_to_last(model, x)
    straight, _ = attention_map(model, state)
    with torch.autocast("cpu", torch.bfloat16):
        inside, mass = attention_map(model, replace(state, normed=None, keys=None, finished=None))
        # a plain ViT projects to queries and keys in bf16, what follows is fp32; the others are fp32 wholly
        plain = is_plain_attention(model.blocks[-1].attn)
        torch.testing.assert_close(inside, straight, atol=0.01 if plain else 0, rtol=0)
        after_bf16, _ = attention_map(model, forward_to_last(model, x))
    assert inside.dtype == mass.dtype == torch.float32
    close(after_bf16, straight, atol=0.05)



# --- heads, scale and mixture ------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e2, 1e5, 1e15])
@torch.no_grad()
def test_maps_stay_finite_at_extreme_activations(scale: float) -> None:
    model = network(next(iter(WITH_CLASS)))
    state = forward_to_last(model, pictures())
    model.blocks[-1].attn.qkv.weight.mul_(scale)
    shares = normalise_map(attention_map(model, state)[0])
    assert torch.isfinite(shares).all()
    assert torch.allclose(shares.sum(-1), torch.ones(len(shares), dtype=shares.dtype), atol=1e-4)


def test_heads_by_hand() -> None:
    rows = torch.tensor([[[0.1, 0.2, 0.3], [0.6, 0.2, 0.1]]])
    close(reduce_heads(rows, "mean"), torch.tensor([[0.35, 0.2, 0.2]]))
    close(reduce_heads(rows, "max"), torch.tensor([[0.6, 0.2, 0.3]]))
    close(reduce_heads(rows, "minmax_mean"), torch.tensor([[0.5, 0.35, 0.5]]))
    flat = torch.full((1, 2, 3), 0.25)
    assert torch.isfinite(reduce_heads(flat, "minmax_mean")).all()


def test_scales_by_hand() -> None:
    close(normalise_map(FIRST), torch.tensor([[0.4, 0.3, 0.2, 0.1]]))
    close(normalise_map(SECOND), torch.tensor([[0.1, 0.2, 0.3, 0.4]]))
    close(normalise_map(FIRST, "none"), FIRST)
    # stretched to 0..1: 1, 2/3, 1/3, 0, which sums to 2
    close(normalise_map(FIRST, "minmax"), torch.tensor([[3.0, 2.0, 1.0, 0.0]]) / 6)
    uneven = torch.tensor([[0.2, 0.01, 0.7, 0.09]])
    close(normalise_map(uneven, "rank"), torch.tensor([[0.3, 0.1, 0.4, 0.2]]))
    # (x - mean) / std of 1, 2, 3, 4 is -/+ 1.1619, -/+ .3873
    z = torch.tensor([[1.1618950, 0.3872983, -0.3872983, -1.1618950]])
    close(normalise_map(FIRST, "zscore_softmax"), z.softmax(1))
    for how in ("sum", "minmax", "rank", "zscore_softmax"):
        assert torch.isfinite(normalise_map(torch.zeros(1, 4), how)).all()  # type: ignore[arg-type]
        same = normalise_map(torch.full((1, 4), 0.1), "sum")
        close(same, torch.full((1, 4), 0.25))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InputError, match=r"mask\.heads 'average' is unknown"):
        reduce_heads(torch.rand(1, 2, 3), "average")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"mask\.normalise 'softmax' is unknown"):
        normalise_map(torch.rand(1, 3), "softmax")  # type: ignore[arg-type]


def test_mixture_of_spec_12_4() -> None:
    teacher, student = normalise_map(FIRST), normalise_map(SECOND)
    mixed = mix_attention(student, teacher, 0.3)
    close(mixed, torch.tensor([[0.31, 0.27, 0.23, 0.19]]))
    assert from_priority(mixed, 3).ids_mask.tolist() == [[0, 1, 2]]
    assert from_priority(mixed, 3).ids_keep.tolist() == [[3]]
    # without normalising, the student's larger mass would win at alpha = .3
    raw = mix_attention(SECOND, FIRST, 0.3)
    close(raw, torch.tensor([[0.052, 0.069, 0.086, 0.103]]))
    assert from_priority(raw, 3).ids_keep.tolist() == [[0]]
    even = mix_attention(student, teacher, 0.5)
    close(even, torch.full((1, 4), 0.25))
    assert from_priority(torch.full((1, 4), 0.25), 3).ids_mask.tolist() == [[0, 1, 2]]  # ties
    assert from_priority(mix_attention(student, teacher, 1.0), 3).ids_mask.tolist() == [[1, 2, 3]]
    assert torch.equal(mix_attention(student, teacher, 1.0), student)
    assert torch.equal(mix_attention(student, teacher, 0.0), teacher)
