"""Taps and pyramid of a plain ViT against timm's own intermediate outputs."""

import pytest
import torch

from cmt_mae.backbones import Backbone, load_backbone
from cmt_mae.core.errors import InputError
from cmt_mae.evaluate.pyramid import (
    DeconvPyramid,
    RelativeBias,
    Taps,
    default_taps,
    trainable_copy,
)

NAMES = {
    "vit_tiny_patch16_224": 64,
    "vit_small_patch14_reg4_dinov2": 56,  # registers
    "deit_tiny_distilled_patch16_224": 64,  # two prefix tokens
    "eva02_tiny_patch14_224": 56,  # rotary positions
    "vit_small_patch16_dinov3": 64,  # rotary, registers, no table
    "vit_base_patch16_siglip_224": 64,  # no class token
    "vit_base_patch16_clip_quickgelu_224": 64,  # norm before the blocks
    "beit_base_patch16_224": 64,  # relative positions
}


@pytest.fixture(scope="module", params=NAMES)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    torch.manual_seed(0)
    return load_backbone(f"timm:{request.param}", img_size=NAMES[request.param], pretrained=False)


@torch.no_grad()
def test_taps_are_the_outputs_of_the_blocks(backbone: Backbone) -> None:
    taps = Taps(backbone, default_taps(12)).eval()
    x = torch.randn(2, 3, *backbone.img_size)
    wanted = backbone.model.forward_intermediates(  # type: ignore[operator]
        x, indices=[3, 5, 7, 11], norm=False, intermediates_only=True
    )
    for mine, theirs in zip(taps(x), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_any_size_goes_in_where_positions_can_follow(backbone: Backbone) -> None:
    taps = Taps(backbone, (3, 5, 7, 11)).eval()
    patch = taps.patch[0]
    x = torch.randn(1, 3, 3 * patch, 5 * patch)
    if taps.kind == "Beit":
        with pytest.raises(InputError, match="fixed input size"):
            taps(x)
        return
    maps = taps(x)
    assert [m.shape for m in maps] == [(1, taps.width, 3, 5)] * 4
    if taps.vit.pos_embed is None:  # rotary positions alone: equal to a network built for that size
        name = f"timm:{backbone.architecture}"
        built = load_backbone(name, img_size=x.shape[-2:], pretrained=False).model
        built.load_state_dict(backbone.model.state_dict(), strict=False)
        wanted = built.forward_intermediates(  # type: ignore[operator]
            x, indices=[11], norm=False, intermediates_only=True
        )
        torch.testing.assert_close(maps[-1], wanted[0], atol=1e-5, rtol=1e-5)


def test_taps_of_the_protocols_and_of_other_depths() -> None:
    assert default_taps(12) == (3, 5, 7, 11)
    assert default_taps(24) == (7, 11, 15, 23)
    assert default_taps(4) == (0, 1, 2, 3)
    assert default_taps(6)[-1] == 5
    for depth in range(4, 41):
        taps = default_taps(depth)
        assert len(set(taps)) == 4
        assert sorted(taps) == list(taps)
        assert taps[-1] == depth - 1
    with pytest.raises(InputError, match="3 blocks"):
        default_taps(3)


def tiny() -> Backbone:
    torch.manual_seed(0)
    return load_backbone("timm:vit_tiny_patch16_224", img_size=64, pretrained=False)


@pytest.mark.parametrize(
    ("patch", "sizes"),
    [(16, (32, 16, 8, 4)), (8, (16, 8, 4, 2)), (32, (64, 32, 16, 8)), (14, (32, 16, 8, 4))],
)
def test_the_pyramid_has_strides_4_to_32(patch: int, sizes: tuple[int, ...]) -> None:
    pyramid = DeconvPyramid(12, patch).eval()
    maps = [torch.randn(1, 12, 8, 8) for _ in range(4)]
    assert tuple(m.shape[-1] for m in pyramid(maps)) == sizes


def test_bias_tables_of_zeros_change_nothing_and_others_follow_the_offset() -> None:
    backbone = tiny()
    x = torch.randn(1, 3, 64, 64)
    plain, biased = (
        Taps(backbone, (3, 5, 7, 11)).eval(),
        Taps(backbone, (3, 5, 7, 11), relative_bias=(4, 4)).eval(),
    )
    with torch.no_grad():
        for a, b in zip(plain(x), biased(x), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    biased(x)[-1].square().mean().backward()
    assert all(bias.table.grad.abs().sum() > 0 for bias in biased.biases)  # type: ignore[union-attr]
    bias = RelativeBias((2, 3), heads=1, prefix=1)
    with torch.no_grad():
        bias.table.copy_(torch.arange(len(bias.table), dtype=torch.float32)[:, None])
    table = bias((2, 3))[0, 0]
    # offset (dr, dc) -> row (dr + 1) * 5 + dc + 2; class -> patch 15, patch -> class 16, class -> class 17
    assert table[0].tolist() == [17, 15, 15, 15, 15, 15, 15]
    assert table[1:, 0].tolist() == [16] * 6
    assert table[1, 1:].tolist() == [7, 6, 5, 2, 1, 0]  # from the top left patch
    assert table[6, 1:].tolist() == [14, 13, 12, 9, 8, 7]  # from the bottom right patch
    # a smaller grid reads the same offsets
    assert bias((1, 2))[0, 0, 1:, 1:].tolist() == [[7, 6], [8, 7]]
    with pytest.raises(InputError, match="at most"):
        bias((3, 3))


def test_stochastic_depth_grows_and_everything_learns() -> None:
    backbone = tiny()
    backbone.model.requires_grad_(False)
    vit = trainable_copy(backbone, 0.2)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in vit.blocks]
    assert rates == pytest.approx([0.2 * i / 11 for i in range(12)])
    assert all(p.requires_grad for p in vit.parameters())
    # the original stays as it is
    assert not any(p.requires_grad for p in backbone.model.parameters())


def test_recomputing_blocks_changes_no_gradient() -> None:
    backbone = tiny()
    x = torch.randn(1, 3, 64, 64)
    gradients = []
    for save in (False, True):
        taps = Taps(backbone, (3, 5, 7, 11), save_memory=save).train()
        taps(x)[-1].square().mean().backward()
        gradients.append(taps.vit.patch_embed.proj.weight.grad)
    torch.testing.assert_close(*gradients)


