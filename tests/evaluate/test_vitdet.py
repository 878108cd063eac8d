"""ViTDet's backbone against timm's own blocks and against attention written out in full."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cmt_mae.backbones import Backbone, load_backbone
from cmt_mae.core.errors import InputError
from cmt_mae.evaluate.detection.vitdet import (
    SimplePyramid,
    WindowedViT,
    attend,
    default_global_blocks,
    relative_table,
    run_block,
)
from tiny import tiny_vit

EVERY = (0, 1, 2, 3)


def small(tmp_path: Path, architecture: str = "vit_tiny_patch16_224", **more: Any) -> Backbone:
    path = tmp_path / "vit.safetensors"
    return load_backbone(tiny_vit(path, architecture, seed=1, noise=0.1, depth=4, **more))


def windowed(backbone: Backbone, window: int, blocks: tuple[int, ...]) -> WindowedViT:
    return WindowedViT(backbone, window=window, global_blocks=blocks, grid=(4, 4)).eval()


def on_patches(backbone: Backbone, images: Tensor) -> Tensor:
    """timm's own blocks, run on patch tokens with their positions and nothing else."""
    vit = backbone.model
    prefix = vit.pos_embed.shape[1] - 16
    tokens = vit.blocks(vit.patch_embed(images) + vit.pos_embed[:, prefix:])
    return tokens.transpose(1, 2).unflatten(2, (4, 4))


def test_global_blocks_of_the_protocols() -> None:
    """Spec 7: 2, 5, 8, 11 of 12 and 5, 11, 17, 23 of 24."""
    assert default_global_blocks(12) == (2, 5, 8, 11)
    assert default_global_blocks(24) == (5, 11, 17, 23)
    assert default_global_blocks(4) == (0, 1, 2, 3)
    assert max(default_global_blocks(6)) == 5


@torch.no_grad()
@pytest.mark.parametrize(("window", "blocks"), [(2, EVERY), (4, ()), (9, (1,))])
def test_without_windows_it_is_timms_vit_on_patch_tokens(
    tmp_path: Path, window: int, blocks: tuple[int, ...]
) -> None:
    """All blocks global, or windows as large as the grid; relative positions start at zero."""
    backbone = small(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    ours = windowed(backbone, window, blocks)(images)
    torch.testing.assert_close(ours, on_patches(backbone, images), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_backbone_without_class_token_is_whole(tmp_path: Path) -> None:
    backbone = small(tmp_path, class_token=False, global_pool="avg", fc_norm=False, reg_tokens=0)
    images = torch.randn(2, 3, 32, 32)
    vit = backbone.model
    ours = windowed(backbone, 2, EVERY)(images)
    theirs = vit.forward_features(images)  # after the final norm, which detectors leave out
    torch.testing.assert_close(
        vit.norm(ours.flatten(2).transpose(1, 2)), theirs, rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_windows_are_separate_pictures(tmp_path: Path) -> None:
    """Blocks with windows of 2 answer on a 4 x 4 grid as on its four quarters alone."""
    backbone = small(tmp_path)
    model = windowed(backbone, 2, ())
    tokens = torch.randn(2, 4, 4, 48)
    block = model.vit.blocks[1]
    whole = run_block(block, tokens, 2)
    for top in (0, 2):
        for left in (0, 2):
            part = tokens[:, top : top + 2, left : left + 2]
            alone = block_of_timm(backbone, 1, part)
            torch.testing.assert_close(whole[:, top : top + 2, left : left + 2], alone)


def block_of_timm(backbone: Backbone, number: int, part: Tensor) -> Tensor:
    return backbone.model.blocks[number](part.flatten(1, 2)).unflatten(1, part.shape[1:3])


@torch.no_grad()
def test_grids_that_do_not_divide_are_padded_after_the_norm(tmp_path: Path) -> None:
    backbone = small(tmp_path)
    model = windowed(backbone, 2, ())
    block = model.vit.blocks[0]
    tokens = torch.randn(1, 3, 5, 48)
    ours = run_block(block, tokens, 2)
    inner = F.pad(block.norm1(tokens), (0, 0, 0, 1, 0, 1))
    attended = torch.zeros_like(inner)
    for top in range(0, 4, 2):
        for left in range(0, 6, 2):
            place = (slice(None), slice(top, top + 2), slice(left, left + 2))
            part = inner[place].flatten(1, 2)
            attended[place] = backbone.model.blocks[0].attn(part).unflatten(1, (2, 2))
    after = tokens + attended[:, :3, :5]
    after = after + block.mlp(block.norm2(after))
    torch.testing.assert_close(ours, after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_relative_positions_equal_the_written_out_sum(
    tmp_path: Path, grid: tuple[int, int]
) -> None:
    """softmax(q.k / sqrt(d) + q.Rh[row difference] + q.Rw[column difference]) v, pair by pair."""
    attn = windowed(small(tmp_path), 2, EVERY).vit.blocks[0].attn
    h, w = grid
    with torch.no_grad():
        attn.rel_pos_h = torch.nn.Parameter(torch.randn(2 * h - 1, 16))
        attn.rel_pos_w = torch.nn.Parameter(torch.randn(2 * w - 1, 16))
    tokens = torch.randn(2, h, w, 48)
    with torch.no_grad():
        ours = attend(attn, tokens)
        qkv = attn.qkv(tokens.flatten(1, 2)).unflatten(2, (3, 3, 16)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv
        logits = torch.zeros(2, 3, h * w, h * w)
        for i in range(h * w):
            for j in range(h * w):
                rows, columns = i // w - j // w, i % w - j % w
                to = k[:, :, j] / math.sqrt(16)
                to = to + attn.rel_pos_h[rows + h - 1] + attn.rel_pos_w[columns + w - 1]
                logits[:, :, i, j] = (q[:, :, i] * to).sum(-1)
        out = attn.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2)).unflatten(1, grid)
    torch.testing.assert_close(ours, out, rtol=1e-4, atol=1e-5)
    attend(attn, tokens).square().sum().backward()
    assert attn.rel_pos_h.grad.abs().min() > 0


def test_tables_for_other_grids_are_interpolated() -> None:
    table = torch.arange(7.0)[:, None].repeat(1, 2)  # offsets -3..3
    same = relative_table(table, 4)
    assert same.shape == (4, 4, 2)
    assert same[3, 0, 0] == 6
    assert same[0, 3, 0] == 0
    assert (same.diagonal() == 3).all()
    larger = relative_table(table, 8)
    assert (larger.diagonal() == 3).all(), "offset 0 stays in the middle"
    assert torch.allclose(larger[:, :, 0] + larger[:, :, 0].T, torch.tensor(6.0))


def test_every_parameter_learns(tmp_path: Path) -> None:
    """None is left without gradient, which would stop training on several processes."""
    model = windowed(small(tmp_path), 2, (3,)).train()
    model(torch.randn(1, 3, 40, 24)).square().mean().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None]
    assert silent == []
    assert {tuple(p.shape) for n, p in model.named_parameters() if "blocks.0.attn.rel" in n} == {
        (3, 16)
    }
    assert {tuple(p.shape) for n, p in model.named_parameters() if "blocks.3.attn.rel" in n} == {
        (7, 16)
    }


def test_recomputing_changes_nothing(tmp_path: Path) -> None:
    backbone, images = small(tmp_path), torch.randn(1, 3, 32, 32)
    gradients = []
    for save_memory in (False, True):
        model = WindowedViT(
            backbone, window=2, global_blocks=(3,), grid=(4, 4), save_memory=save_memory
        ).train()
        model(images).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)


@torch.no_grad()
def test_pyramid_scales() -> None:
    maps = SimplePyramid(48, 16, 32)(torch.randn(1, 48, 6, 4))
    assert [tuple(m.shape) for m in maps] == [
        (1, 32, 24, 16), (1, 32, 12, 8), (1, 32, 6, 4), (1, 32, 3, 2),
    ]  # fmt: skip
    eight = SimplePyramid(48, 8, 32)(torch.randn(1, 48, 8, 8))
    assert [m.shape[-1] for m in eight] == [16, 8, 4, 2]


def test_other_transformers_are_refused(tmp_path: Path) -> None:
    backbone = small(tmp_path, "eva02_tiny_patch14_224", patch_size=8, use_abs_pos_emb=True)
    with pytest.raises(InputError, match=r"needs a plain VisionTransformer.*use --preset 1x"):
        windowed(backbone, 2, (3,))
    with pytest.raises(InputError, match="out of range"):
        windowed(small(tmp_path), 2, (9,))
