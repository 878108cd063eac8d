"""The student and the token interface, against timm and the numbers of the official MAE."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from method_nets import DEPTH, FAMILIES, GRID, SHAPE, network, pictures
from timm.models.eva import Eva
from timm.models.vision_transformer import (
    ParallelScalingBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import nn

from cmt_mae.core.errors import InputError
from cmt_mae.method.cmtmae import StudentWithDecoder, TargetConfig
from cmt_mae.method.decoder import DecoderConfig
from cmt_mae.method.last_block import finish, mean_of_last
from cmt_mae.method.vit import (
    StudentConfig,
    build_student,
    embed_patches,
    encode_visible,
    forward_to_last,
    gather_tokens,
    num_prefix,
    sincos_table,
)

SMALL: dict[str, Any] = {
    "img_size": [24, 32],
    "patch_size": 8,
    "width": 48,
    "depth": 2,
    "heads": 3,
}
ODD: dict[str, Callable[[], nn.Module]] = {
    "post-norm": lambda: VisionTransformer(**SHAPE, block_fn=ResPostBlock),
    "post-norm Eva": lambda: Eva(**SHAPE, use_post_norm=True),
    "parallel": lambda: VisionTransformer(**SHAPE, block_fn=ParallelScalingBlock),
}
if hasattr(timm.layers, "DiffAttention"):  # younger than the oldest timm that will do
    ODD["differential attention"] = lambda: VisionTransformer(**SHAPE, attn_layer="diff")
if "num_kv_heads" in inspect.signature(Eva).parameters:
    ODD["grouped queries"] = lambda: Eva(
        **SHAPE, num_kv_heads=2, attn_type="rope", qkv_fused=False, use_rot_pos_emb=True
    )


def student(**more: Any) -> Any:
    torch.manual_seed(0)
    return build_student(StudentConfig(**{**SMALL, **more}))


# --- sizes (spec 12.1) -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "encoder", "trained"),
    [("base", 85_798_656, 85_647_360), ("large", 303_301_632, 303_099_904)],
)
def test_encoders_have_maes_parameter_counts(preset: str, encoder: int, trained: int) -> None:
    with torch.device("meta"):
        model = build_student(StudentConfig(preset=preset))
    assert sum(p.numel() for p in model.parameters()) == encoder
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained


@pytest.mark.parametrize(
    ("preset", "heads", "total"),
    [
        ("base", {"pixel": 768}, 111_907_840),  # MAE
        ("large", {"pixel": 768}, 329_541_888),
        # CMT-MAE with CLIP's 512-d target
        ("base", {"teacher": 512, "momentum": 768}, 112_170_496),
        ("large", {"teacher": 512, "momentum": 1024}, 329_935_872),
        ("base", {"teacher": 512}, 111_776_512),  # MILAN / EVA-MAE as mmpretrain counts them
    ],
)
def test_whole_models_have_the_published_parameter_counts(
    preset: str, heads: dict[str, int], total: int
) -> None:
    with torch.device("meta"):
        model = StudentWithDecoder(
            build_student(StudentConfig(preset=preset)), DecoderConfig(), TargetConfig(), heads
        )
    assert sum(p.numel() for p in model.parameters()) == total


@pytest.mark.parametrize("preset", ["tiny", "small", "base", "large"])
def test_presets_are_timms_networks(preset: str) -> None:
    with torch.device("meta"):
        config = StudentConfig(preset=preset)
        name, kwargs = config.architecture()
        ours: Any = build_student(config)
        theirs: Any = timm.create_model(name, num_classes=0)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    assert ours.blocks[0].attn.num_heads == theirs.blocks[0].attn.num_heads == kwargs["num_heads"]


# --- positions (spec 12.2) ---------------------------------------------------------------------


def test_positions_equal_the_official_table_at_224() -> None:
    table = sincos_table(768, (14, 14)).double()
    assert table.shape == (197, 768)
    assert not table[0].any()  # the class token
    zeros, ones = [*range(192), *range(384, 576)], [*range(192, 384), *range(576, 768)]
    assert not table[1, zeros].any()
    assert (table[1, ones] == 1).all()
    first = torch.tensor([0.84147098, 0.81525065, 0.78859304], dtype=torch.float64)
    cosine = torch.tensor([0.54030231, 0.57910826, 0.61491545], dtype=torch.float64)
    torch.testing.assert_close(table[2, 0:3], first, atol=1e-7, rtol=0)  # row 0, column 1
    torch.testing.assert_close(table[2, 192:195], cosine, atol=1e-7, rtol=0)
    torch.testing.assert_close(table[15, 384:387], first, atol=1e-7, rtol=0)  # row 1, column 0
    last = torch.tensor([0.42016704, -0.1743702, -0.68575617, -0.96588375], dtype=torch.float64)
    torch.testing.assert_close(table[196, :4], last, atol=1e-7, rtol=0)
    torch.testing.assert_close(
        (table[1:] ** 2).sum(1), torch.full((196,), 384.0).double(), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(
    ("width", "total"), [(768, 69594.49385917), (512, 46340.333103), (1024, 92849.197918)]
)
def test_sums_of_the_official_tables(width: int, total: float) -> None:
    assert sincos_table(width, (14, 14)).double().sum().item() == pytest.approx(total, abs=2e-4)


def test_positions_of_a_rectangle_are_a_cut_of_the_squares() -> None:
    square = sincos_table(16, (5, 5), class_token=False).view(5, 5, 16)
    assert torch.equal(sincos_table(16, (3, 5), class_token=False).view(3, 5, 16), square[:3])
    assert torch.equal(sincos_table(16, (5, 2), class_token=False).view(5, 2, 16), square[:, :2])


# --- start ---------------------------------------------------------------------------------------


def test_weights_start_as_maes() -> None:
    model = student(width=192, heads=3)
    for name, part in model.named_modules():
        if isinstance(part, nn.Linear):
            bound = math.sqrt(6 / (part.in_features + part.out_features))  # Glorot's
            assert part.weight.abs().max() <= bound, name
            assert part.weight.abs().max() > 0.99 * bound, name
            assert part.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02), name
            assert not part.bias.any(), name
        if isinstance(part, nn.LayerNorm):
            assert (part.weight == 1).all(), name
            assert not part.bias.any(), name
            assert part.eps == 1e-6, name
    bound = math.sqrt(6 / (192 + 3 * 8 * 8))  # the convolution counts as a linear layer
    assert 0.99 * bound < model.patch_embed.proj.weight.abs().max() <= bound
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert torch.equal(model.pos_embed[0], sincos_table(192, GRID))
    assert not model.pos_embed.requires_grad


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"img_size": [30]}, "student.img_size 30x30 .* e.g. 32"),
        ({"img_size": [24, 30]}, "student.img_size 24x30"),
        ({"img_size": []}, "student.img_size"),
        ({"img_size": [8, 8, 8]}, "student.img_size"),
        ({"patch_size": 0}, "student.patch_size 0"),
        ({"heads": 5}, "student.heads 5"),
        ({"width": 51}, "multiple of 4"),
    ],
)
def test_impossible_students_are_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named) as caught:
        build_student(StudentConfig(**{**SMALL, **change}))
    assert "\n" not in str(caught.value)


# --- visible tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize("pos_embed", ["sincos", "learned"])  # learned: the class token's own too
def test_with_every_patch_visible_the_student_is_the_whole_vit(pos_embed: str) -> None:
    model = student(pos_embed=pos_embed).eval()
    x = pictures()
    every = torch.arange(12).expand(2, -1)
    torch.testing.assert_close(
        encode_visible(model, x, every), model.forward_features(x), atol=5e-6, rtol=1e-5
    )


def test_embedding_visible_patches_equals_embedding_all() -> None:
    """Values and gradients of the convolution, in fp64."""
    model, x = student(in_chans=2).double(), pictures(channels=2).double()
    ids = torch.tensor([[11, 0, 5], [2, 7, 3]])
    weight = torch.randn(2, 3, 48, dtype=torch.float64)
    found = []
    for tokens in (gather_tokens(model.patch_embed(x), ids), embed_patches(model, x, ids)):
        model.zero_grad()
        (tokens * weight).sum().backward()
        conv = model.patch_embed.proj
        found.append((tokens.detach(), conv.weight.grad.clone(), conv.bias.grad.clone()))
    for straight, fast in zip(*found, strict=True):
        torch.testing.assert_close(fast, straight, atol=1e-12, rtol=1e-12)


def test_visible_tokens_equal_attention_masked_out_of_the_full_network() -> None:
    """Dropping tokens = forbidding attention to them: the same latents from timm's attn_mask."""
    model = student().eval()
    x, ids = pictures(), torch.tensor([[1, 3, 8, 10]] * 2)
    seen = torch.zeros(13, dtype=torch.bool)
    seen[[0, *(1 + ids[0]).tolist()]] = True
    tokens = model._pos_embed(model.patch_embed(x))
    for block in model.blocks:
        tokens = block(tokens, attn_mask=seen[None, None, None].expand(2, 1, 13, 13))
    torch.testing.assert_close(
        encode_visible(model, x, ids), model.norm(tokens)[:, seen], atol=1e-5, rtol=1e-5
    )


# --- full images, stop before the last block ---------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_stop_and_finish_equal_timms_forward(family: str) -> None:
    model = network(family)
    x = pictures()
    wanted = model.forward_features(x)
    state = forward_to_last(model, x)
    torch.testing.assert_close(finish(model, state), wanted, atol=1e-5, rtol=1e-5)

    ids = torch.tensor([[11, 0, 5], [2, 7, 3]])  # any order
    prefix = num_prefix(model)
    some = finish(model, state, ids)
    torch.testing.assert_close(some[:, :prefix], wanted[:, :prefix], atol=1e-5, rtol=1e-5)
    for image in range(2):
        picked = wanted[image, prefix:][ids[image]]
        torch.testing.assert_close(some[image, prefix:], picked, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_mean_of_the_last_blocks_equals_timms_intermediates(family: str) -> None:
    model = network(family)
    x, ids = pictures(), torch.tensor([[11, 0, 5], [2, 7, 3]])
    prefix = num_prefix(model)
    for last in (1, 2, DEPTH):
        outputs = model.forward_intermediates(
            x,
            indices=last,
            return_prefix_tokens=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        pairs = [entry if isinstance(entry, tuple) else (entry, None) for entry in outputs]
        wanted = torch.stack([patches for patches, _ in pairs]).mean(0)
        state = forward_to_last(model, x, last - 1)
        assert len(state.earlier) == last - 1
        mean = mean_of_last(model, state)
        torch.testing.assert_close(mean[:, prefix:], wanted, atol=1e-5, rtol=1e-5)
        if pairs[0][1] is not None:
            heads = torch.stack([entry for _, entry in pairs]).mean(0)
            torch.testing.assert_close(mean[:, :prefix], heads, atol=1e-5, rtol=1e-5)
        some = mean_of_last(model, state, ids)
        torch.testing.assert_close(some[:, :prefix], mean[:, :prefix])
        torch.testing.assert_close(some[:, prefix:], gather_tokens(mean[:, prefix:], ids))


def test_networks_without_a_token_interface_are_refused() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch_embed = nn.Identity()

    with pytest.raises(InputError, match="kind Other"):
        forward_to_last(Other(), torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("make", ODD.values(), ids=ODD.keys())
def test_blocks_of_another_make_are_refused(make: Callable[[], nn.Module]) -> None:
    """Their equations differ from those that `finish` and the attention map follow."""
    with pytest.raises(InputError, match="last block"):
        forward_to_last(make().eval(), pictures())
