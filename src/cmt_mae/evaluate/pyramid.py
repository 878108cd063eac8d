"""A plain ViT as the backbone of detectors and segmenters: maps after some blocks, at any input size.

Spec 7 and 8: taps after four blocks without norm, brought to strides 4, 8, 16 and 32 by transposed
convolutions and pooling.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cmt_mae.backbones import Backbone
from cmt_mae.backbones.build import resize_positions
from cmt_mae.core.errors import InputError

Grid = tuple[int, int]

STRIDES = (4, 8, 16, 32)


def depth_of(backbone: Backbone) -> int:
    """Number of blocks."""
    blocks: Any = backbone.model.blocks
    return len(blocks)


def patch_of(backbone: Backbone) -> Grid:
    """Height and width of a patch in pixels."""
    embed: Any = backbone.model.patch_embed
    rows, columns = embed.patch_size
    return int(rows), int(columns)


def default_taps(depth: int) -> tuple[int, int, int, int]:
    """0-based blocks after which a map is taken: a quarter, half, three quarters of the depth, the end.

    3, 5, 7, 11 for 12 blocks and 7, 11, 15, 23 for 24, as the protocols have them (spec 7, 8).
    Raises InputError for fewer than 4 blocks.
    """
    if depth < 4:
        raise InputError(f"a backbone of {depth} blocks has no four maps to take: use 4 or more")
    known = {12: (3, 5, 7, 11), 24: (7, 11, 15, 23)}
    quarter = depth / 4
    return known.get(
        depth,
        (round(quarter) - 1, round(2 * quarter) - 1, round(3 * quarter) - 1, depth - 1),
    )


def trainable_copy(backbone: Backbone, drop_path: float = 0.0) -> Any:
    """The backbone's network once more, all of it trainable, with stochastic depth.

    drop_path: rate of the last block; block i of L drops its branches at ``drop_path * i / (L - 1)``.
    """
    vit: Any = copy.deepcopy(backbone.model)
    # its rotary positions follow the input only when built to do so
    if type(vit).__name__ == "Eva":
        kwargs = {**backbone.kwargs, "dynamic_img_size": True}
        vit = timm.create_model(backbone.architecture, num_classes=0, **kwargs)
        vit.load_state_dict(backbone.model.state_dict())
    vit.requires_grad_(True)
    blocks = list(vit.blocks)
    for number, block in enumerate(blocks):
        rate = drop_path * number / max(1, len(blocks) - 1)
        for name in ("drop_path1", "drop_path2"):
            if hasattr(block, name):
                setattr(block, name, DropPath(rate) if rate else nn.Identity())
    return vit


class Taps(nn.Module):
    """Maps of a timm VisionTransformer, Eva or Beit after chosen blocks, for inputs of any size.

    Parameters of the network are below ``vit.``, so that ``layer_decay_groups`` finds them.
    """

    def __init__(
        self,
        backbone: Backbone,
        taps: Sequence[int],
        drop_path: float = 0.0,
        relative_bias: Grid | None = None,
        save_memory: bool = False,
    ) -> None:
        """relative_bias: the token grid for which every block gets a table of relative position biases,
        zeros at the start, on top of the network's own positions (spec 8: MAE's segmentation recipe).
        save_memory: recompute the blocks in the backward pass.
        """
        super().__init__()
        self.vit = trainable_copy(backbone, drop_path)
        self.taps, self.save_memory = tuple(taps), save_memory
        if not all(0 <= tap < len(self.vit.blocks) for tap in taps):
            raise InputError(
                f"taps {list(taps)} are out of range: the backbone has {len(self.vit.blocks)} blocks"
            )
        self.kind = type(self.vit).__name__
        self.width = int(self.vit.embed_dim)
        rows, columns = self.vit.patch_embed.patch_size
        self.patch: Grid = (int(rows), int(columns))
        self.prefix = backbone.prefix_tokens
        self.grid: Grid = tuple(self.vit.patch_embed.grid_size)
        self.vit.patch_embed.strict_img_size = False
        if hasattr(self.vit.patch_embed, "img_size"):
            self.vit.patch_embed.img_size = None  # any size, as long as patches fit
        for name in ("head", "fc_norm", "norm", "attn_pool"):
            if isinstance(getattr(self.vit, name, None), nn.Module):
                setattr(self.vit, name, nn.Identity())  # taps are taken before the final norm
        self.biases: nn.ModuleList | None = None
        if relative_bias is not None:
            if self.kind != "VisionTransformer":
                raise InputError(
                    f"a {self.kind} has relative positions of its own: leave relative_bias off"
                )
            heads = [block.attn.num_heads for block in self.vit.blocks]
            self.biases = nn.ModuleList(RelativeBias(relative_bias, h, self.prefix) for h in heads)

    def forward(self, images: Tensor) -> list[Tensor]:
        """images (B, C, H, W), normalised, H and W multiples of the patch -> maps (B, D, h, w), one a tap."""
        height, width = images.shape[-2:]
        if height % self.patch[0] or width % self.patch[1]:
            raise ValueError(
                f"images of {height}x{width} do not split into patches of {self.patch}"
            )
        grid = (height // self.patch[0], width // self.patch[1])
        tokens, context = self.embed(images, grid)
        maps = []
        for number, block in enumerate(self.vit.blocks[: max(self.taps) + 1]):
            if self.biases is not None:
                context = {"attn_mask": self.biases[number](grid).to(tokens.dtype)}
            if self.save_memory and self.training:
                tokens = checkpoint(block, tokens, use_reentrant=False, **context)
            else:
                tokens = block(tokens, **context)
            if number in self.taps:
                patches = tokens[:, self.prefix :]
                maps.append(patches.transpose(1, 2).unflatten(2, grid))
        return maps

    def embed(self, images: Tensor, grid: Grid) -> tuple[Tensor, dict[str, Any]]:
        """Tokens (B, prefix + h * w, D) before the first block, and the blocks' keywords.

        Positions are resized bicubically to the grid (spec 7: at every input).
        """
        vit = self.vit
        patches = vit.patch_embed(images)
        if patches.ndim == 4:  # a network built for any size keeps its rows and columns
            patches = patches.flatten(1, 2)
        if self.kind == "Beit":
            if grid != self.grid:
                raise InputError(
                    f"a BEiT's relative positions are for {self.grid[0]}x{self.grid[1]} tokens and cannot "
                    "follow changing sizes: use a preset with a fixed input size"
                )
            tokens = torch.cat([vit.cls_token.expand(len(patches), -1, -1), patches], dim=1)
            tokens = tokens if vit.pos_embed is None else tokens + vit.pos_embed
            bias = vit.rel_pos_bias() if vit.rel_pos_bias is not None else None
            return tokens, {"shared_rel_pos_bias": bias}
        tokens = self.add_positions(patches, grid)
        if self.kind == "Eva":
            rope = None if vit.rope is None else vit.rope.get_embed(shape=list(grid))
            return vit.norm_pre(tokens), {"rope": rope}
        return vit.norm_pre(tokens), {}

    def add_positions(self, patches: Tensor, grid: Grid) -> Tensor:
        """Prefix tokens and positions, in the order in which timm adds them."""
        vit = self.vit
        names = ("cls_token", "dist_token", "reg_token")
        prefix = [
            getattr(vit, n).expand(len(patches), -1, -1)
            for n in names
            if getattr(vit, n, None) is not None
        ]
        table = vit.pos_embed
        if table is None:
            return torch.cat([*prefix, patches], dim=1)
        extra = table.shape[1] - self.grid[0] * self.grid[1]
        if grid != self.grid:
            table = resize_positions(table, self.grid, grid)
        table = table.to(patches.dtype)
        if extra == 0:  # positions for patches alone
            return torch.cat([*prefix, patches + table], dim=1)
        with_place = torch.cat([*prefix, patches], dim=1)
        if extra == self.prefix:
            return with_place + table
        # registers stand behind the class token and have no place (timm without no_embed_class)
        first = prefix[0] + table[:, :1]
        rest = prefix[1:]
        return torch.cat([first, *rest, patches + table[:, extra:]], dim=1)


class RelativeBias(nn.Module):
    """BEiT's table of relative position biases for one block, zeros at the start (spec 8)."""

    def __init__(self, grid: Grid, heads: int, prefix: int) -> None:
        super().__init__()
        self.grid, self.prefix = grid, prefix
        self.table = nn.Parameter(torch.zeros((2 * grid[0] - 1) * (2 * grid[1] - 1) + 3, heads))
        self.register_buffer("index", self.positions(grid), persistent=False)

    def positions(self, grid: Grid) -> Tensor:
        """(P + N, P + N) rows of the table: one for each offset, three for prefix tokens."""
        rows, columns = grid
        place = torch.stack(
            torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        ).flatten(1)
        offset = place[:, :, None] - place[:, None, :]
        inner = (
            (offset[0] + self.grid[0] - 1) * (2 * self.grid[1] - 1) + offset[1] + self.grid[1] - 1
        )
        n, special = rows * columns, (2 * self.grid[0] - 1) * (2 * self.grid[1] - 1)
        index = torch.full((n + self.prefix, n + self.prefix), special + 2)
        index[: self.prefix, self.prefix :] = special
        index[self.prefix :, : self.prefix] = special + 1
        index[self.prefix :, self.prefix :] = inner
        return index

    def forward(self, grid: Grid) -> Tensor:
        """(1, heads, P + N, P + N) to be added to the attention's logits.

        Raises InputError for a grid larger than the table's.
        """
        if grid[0] > self.grid[0] or grid[1] > self.grid[1]:
            raise InputError(f"relative positions are for {self.grid} tokens at most, not {grid}")
        index: Tensor = self.index if grid == self.grid else self.positions(grid)  # type: ignore[assignment]
        index = index.to(self.table.device)
        return self.table[index].permute(2, 0, 1)[None]


class DeconvPyramid(nn.Module):
    """Four tapped maps of stride P -> strides 4, 8, 16 and 32 (spec 7; for P = 16).

    Up by transposed convolutions of 2 (norm and GELU between two of them), down by max pooling. Patches
    that are no power of two (14) come out at the nearest strides (3.5, 7, 14, 28).
    """

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        doublings = [round(math.log2(patch / stride)) for stride in STRIDES]
        self.levels = nn.ModuleList(_level(width, count) for count in doublings)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """[(B, D, h, w)] * 4 -> the same maps at four scales, finest first."""
        return [level(one) for level, one in zip(self.levels, maps, strict=True)]


def _level(width: int, doublings: int) -> nn.Module:
    """Scale a map by 2^doublings."""
    if doublings <= 0:
        return nn.MaxPool2d(2**-doublings) if doublings else nn.Identity()
    layers: list[nn.Module] = []
    for number in range(doublings):
        if number:
            layers += [nn.BatchNorm2d(width), nn.GELU()]
        layers.append(nn.ConvTranspose2d(width, width, 2, stride=2))
    return nn.Sequential(*layers)


def sync_norms(model: nn.Module, device: torch.device, processes: int) -> nn.Module:
    """BatchNorm with statistics over all processes, where torch has it (GPUs)."""
    if processes > 1 and device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model
