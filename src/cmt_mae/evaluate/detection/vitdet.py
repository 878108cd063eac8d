"""ViTDet's backbone: windowed and global attention with decomposed relative positions, and a pyramid
from the last map alone (spec 7, alternative; Li et al. 2022, "Exploring plain ViT backbones").
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, LayerNorm2d
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cmt_mae.backbones import Backbone
from cmt_mae.backbones.build import resize_positions
from cmt_mae.core.errors import InputError
from cmt_mae.evaluate.pyramid import STRIDES, Grid, trainable_copy


def default_global_blocks(depth: int) -> tuple[int, ...]:
    """0-based blocks with global attention, the last of each quarter: 2, 5, 8, 11 of 12 (spec 7)."""
    return tuple(sorted({max(0, round(depth * part / 4) - 1) for part in (1, 2, 3, 4)}))


class WindowedViT(nn.Module):
    """A plain ViT on its patch tokens alone: most blocks attend within windows, a few to everything.

    Class token and registers are left out, as ViTDet leaves them. Parameters are below ``vit.``; each
    block's ``attn`` gets ``rel_pos_h`` and ``rel_pos_w``, (2 * side - 1, head width), zeros at the start.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        window: int,
        global_blocks: Sequence[int],
        grid: Grid,
        relative_positions: bool = True,
        drop_path: float = 0.0,
        save_memory: bool = False,
    ) -> None:
        """window: side in tokens. grid: of tokens in training; for other grids tables are interpolated.

        Raises InputError for a backbone that is no plain timm VisionTransformer, or blocks out of range.
        """
        super().__init__()
        vit: Any = trainable_copy(backbone, drop_path)
        plain = all(
            isinstance(b, Block) and isinstance(b.attn, Attention) and b.attn.gate is None
            for b in vit.blocks
        )
        if type(vit).__name__ != "VisionTransformer" or not plain:
            raise InputError(
                f"windowed attention needs a plain VisionTransformer, and {backbone.architecture} is a "
                f"{type(vit).__name__} with blocks of its own: use --preset 1x"
            )
        if not all(0 <= block < len(vit.blocks) for block in global_blocks):
            raise InputError(
                f"global_blocks {list(global_blocks)} are out of range: there are {len(vit.blocks)} blocks"
            )
        self.table_grid: Grid = tuple(vit.patch_embed.grid_size)
        self.table_prefix = 0
        if vit.pos_embed is not None:
            self.table_prefix = vit.pos_embed.shape[1] - math.prod(self.table_grid)
        vit.patch_embed.strict_img_size, vit.patch_embed.img_size = False, None
        for name in ("cls_token", "reg_token", "dist_token"):
            if getattr(vit, name, None) is not None:
                setattr(vit, name, None)  # a parameter without gradient would stop DDP
        for name in ("head", "head_dist", "fc_norm", "norm", "attn_pool"):
            if isinstance(getattr(vit, name, None), nn.Module):
                setattr(vit, name, nn.Identity())
        self.vit, self.window, self.global_blocks = vit, window, tuple(global_blocks)
        self.save_memory = save_memory
        self.width, self.patch = int(vit.embed_dim), tuple(vit.patch_embed.patch_size)
        for number, block in enumerate(vit.blocks):
            rows, columns = grid if number in self.global_blocks else (window, window)
            for name, side in (("rel_pos_h", rows), ("rel_pos_w", columns)):
                table = torch.zeros((2 * side - 1, block.attn.head_dim))
                setattr(block.attn, name, nn.Parameter(table) if relative_positions else None)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, C, H, W), normalised, H and W multiples of the patch -> the last map (B, D, h, w)."""
        grid = (images.shape[2] // self.patch[0], images.shape[3] // self.patch[1])
        tokens = self.vit.patch_embed(images)
        if tokens.ndim == 3:
            tokens = tokens.unflatten(1, grid)
        table = self.vit.pos_embed
        if table is not None:
            table = table[:, self.table_prefix :]
            if grid != self.table_grid:
                table = resize_positions(table, self.table_grid, grid)
            tokens = tokens + table.unflatten(1, grid).to(tokens.dtype)
        tokens = self.vit.norm_pre(tokens)
        for number, block in enumerate(self.vit.blocks):
            window = 0 if number in self.global_blocks else self.window
            if self.save_memory and self.training:
                tokens = checkpoint(run_block, block, tokens, window, use_reentrant=False)
            else:
                tokens = run_block(block, tokens, window)
        last: Tensor = tokens.permute(0, 3, 1, 2)
        return last


def run_block(block: Any, tokens: Tensor, window: int) -> Tensor:
    """One block on tokens (B, h, w, D), its attention within windows of this side; 0: over the whole grid.

    Grids that are no multiple of the window are padded with zeros after the norm, and the padding is
    attended to, as in ViTDet's code.
    """
    h, w = tokens.shape[1:3]
    inner = block.norm1(tokens)
    if window and (h > window or w > window):
        inner = F.pad(inner, (0, 0, 0, -w % window, 0, -h % window))
        attended = join_windows(attend(block.attn, split_windows(inner, window)), inner.shape[1:3])
        attended = attended[:, :h, :w]
    else:
        attended = attend(block.attn, inner)
    tokens = tokens + block.drop_path1(block.ls1(attended))
    result: Tensor = tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))
    return result


def split_windows(tokens: Tensor, side: int) -> Tensor:
    """(B, h, w, D), h and w multiples of the side -> (B * windows, side, side, D)."""
    _, h, w, _ = tokens.shape
    parts = tokens.unflatten(2, (w // side, side)).unflatten(1, (h // side, side))
    return parts.transpose(2, 3).flatten(0, 2)


def join_windows(windows: Tensor, grid: Sequence[int]) -> Tensor:
    """The inverse of ``split_windows`` for this grid."""
    side = windows.shape[1]
    rows, columns = grid[0] // side, grid[1] // side
    parts = windows.unflatten(0, (len(windows) // (rows * columns), rows, columns))
    return parts.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def attend(attn: Any, tokens: Tensor) -> Tensor:
    """timm's attention over tokens (B, h, w, D) with decomposed relative positions.

    Logits are q.k / sqrt(d) + q.R_h[row_q - row_k] + q.R_w[column_q - column_k]. The two further terms
    are made part of the inner product: q is followed by its products with all rows' and columns' tables,
    k by marks of its own row and column. So no matrix of all pairs of tokens is ever stored.
    """
    batch, h, w, _ = tokens.shape
    qkv = attn.qkv(tokens.flatten(1, 2))
    qkv = qkv.unflatten(2, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)  # (B, heads, N, d)
    q, k = attn.q_norm(q), attn.k_norm(k)
    scale = attn.scale
    if attn.rel_pos_h is not None:
        to_rows, to_columns = (
            relative_table(table, side).to(q.dtype)
            for table, side in ((attn.rel_pos_h, h), (attn.rel_pos_w, w))
        )
        place = q.unflatten(2, (h, w))
        by_row = torch.einsum("bnhwd,hkd->bnhwk", place, to_rows).flatten(2, 3)
        by_column = torch.einsum("bnhwd,wkd->bnhwk", place, to_columns).flatten(2, 3)
        row = torch.eye(h, device=q.device, dtype=q.dtype).repeat_interleave(w, 0)
        column = torch.eye(w, device=q.device, dtype=q.dtype).repeat(h, 1)
        marks = torch.cat([row, column], dim=1).expand(batch, attn.num_heads, -1, -1)
        spare = -(attn.head_dim + h + w) % 8  # fast kernels want widths of multiples of 8
        q = F.pad(torch.cat([q * scale, by_row, by_column], dim=-1), (0, spare))
        k = F.pad(torch.cat([k, marks], dim=-1), (0, spare))
        scale = 1.0
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    out = attn.norm(out.transpose(1, 2).flatten(2))
    result: Tensor = attn.proj_drop(attn.proj(out)).unflatten(1, (h, w))
    return result


def relative_table(table: Tensor, side: int) -> Tensor:
    """(2 * S - 1, d) -> (side, side, d): entry [i, j] is that of offset i - j; interpolated linearly."""
    if len(table) != 2 * side - 1:
        table = F.interpolate(table.T[None], size=2 * side - 1, mode="linear")[0].T
    place = torch.arange(side, device=table.device)
    return table[place[:, None] - place[None, :] + side - 1]


class SimplePyramid(nn.Module):
    """The last map of stride P -> four maps of ``channels`` at strides 4, 8, 16 and 32 (for P = 16).

    Scales 4, 2, 1, .5 by transposed convolutions and max pooling, then 1x1 and 3x3 convolutions, with
    LayerNorm after each but the identity and the pooling (spec 7: simple pyramid).
    """

    def __init__(self, width: int, patch: int, channels: int) -> None:
        super().__init__()
        doublings = [round(math.log2(patch / stride)) for stride in STRIDES]
        self.levels = nn.ModuleList(_level(width, count, channels) for count in doublings)

    def forward(self, last: Tensor) -> list[Tensor]:
        """(B, D, h, w) -> four maps (B, channels, ., .), finest first."""
        return [level(last) for level in self.levels]


def _level(width: int, doublings: int, channels: int) -> nn.Module:
    """Scale the map by 2^doublings, halving its width each time, and bring it to ``channels``."""
    layers: list[nn.Module] = []
    for number in range(doublings):
        if number:
            layers += [LayerNorm2d(width), nn.GELU()]
        layers.append(nn.ConvTranspose2d(width, width // 2, 2, stride=2))
        width //= 2
    if doublings < 0:
        layers.append(nn.MaxPool2d(2**-doublings))
    layers += [nn.Conv2d(width, channels, 1, bias=False), LayerNorm2d(channels)]
    layers += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), LayerNorm2d(channels)]
    return nn.Sequential(*layers)
