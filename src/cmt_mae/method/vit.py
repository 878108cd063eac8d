"""A timm vision transformer as tokens: build it, encode visible patches, stop before the last block.

The student is a plain timm ``VisionTransformer`` (so its weights load with ``timm.create_model``); the
teacher may also be timm's ``Eva`` (DINOv3, EVA-02) or ``Beit`` (BEiT, data2vec).
"""

import copy
import json
from dataclasses import dataclass, field
from typing import Any, Literal

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from cmt_mae.core.errors import InputError
from cmt_mae.core.settings import Count, PartOf

# A timm VisionTransformer, Eva or Beit: their attributes are not declared in a common class.
Vit = Any

# width, depth, heads of the usual sizes; the timm name that carries them.
PRESETS: dict[str, tuple[int, int, int, str]] = {
    "micro": (128, 6, 4, "vit_tiny_patch16_224"),
    "tiny": (192, 12, 3, "vit_tiny_patch16_224"),
    "small": (384, 12, 6, "vit_small_patch16_224"),
    "base": (768, 12, 12, "vit_base_patch16_224"),
    "large": (1024, 24, 16, "vit_large_patch16_224"),
}


@dataclass
class StudentConfig:
    """The vision transformer that is trained."""

    preset: Literal["micro", "tiny", "small", "base", "large", "init_from"] = "base"
    """micro (width 128, depth 6) | tiny | small | base | large | init_from (everything but the size of its input
    as in the network that `init_from` names)."""
    img_size: list[Count] = field(default_factory=lambda: [224])
    """Input size in pixels: one number (square) or height and width."""
    patch_size: Count = 16
    """Patch side in pixels; it must divide the input size."""
    in_chans: Count = 3
    """Number of image channels, 1 or more."""
    width: Count | None = None
    """Token width; overrides the preset."""
    depth: Count | None = None
    """Number of blocks; overrides the preset."""
    heads: Count | None = None
    """Attention heads; overrides the preset."""
    pos_embed: Literal["sincos", "learned"] = "sincos"
    """sincos (fixed, as MAE) | learned."""
    network: str = ""
    """Of preset init_from, filled by the program: timm's name of that network and its arguments, as JSON."""
    drop_path: PartOf = 0.0
    """Stochastic depth rate of the student in pre-training (MAE: 0)."""

    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        if len(self.img_size) not in (1, 2) or min(self.img_size) < 1:
            raise InputError(
                f"student.img_size {self.img_size}: give one number or height and width, e.g. [224]"
            )
        return (self.img_size[0], self.img_size[-1])

    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches. Raises InputError where the patch does not divide the size."""
        height, width = self.size()
        if self.patch_size < 1 or height % self.patch_size or width % self.patch_size:
            raise InputError(
                f"student.img_size {height}x{width} is not a multiple of student.patch_size "
                f"{self.patch_size}: choose a size that is, e.g. "
                f"{max(1, round(height / max(1, self.patch_size))) * max(1, self.patch_size)}"
            )
        return (height // self.patch_size, width // self.patch_size)

    def architecture(self) -> tuple[str, dict[str, Any]]:
        """Name and keywords with which ``timm.create_model`` builds this network."""
        if self.preset == "init_from":
            if not self.network:
                raise InputError(
                    "student.preset init_from: say which network, with --init_from NAME"
                )
            name, kwargs = json.loads(self.network)
            return name, kwargs | {"img_size": list(self.size())}
        width, depth, heads, name = PRESETS[self.preset]
        width, depth, heads = self.width or width, self.depth or depth, self.heads or heads
        if width % heads:
            raise InputError(
                f"student.width {width} is not a multiple of student.heads {heads}: change one of them"
            )
        if width % 4 and self.pos_embed == "sincos":
            raise InputError(
                f"student.width {width} is not a multiple of 4, as sincos positions need"
            )
        self.grid()
        return name, {
            "img_size": list(self.size()),
            "patch_size": self.patch_size,
            "in_chans": self.in_chans,
            "embed_dim": width,
            "depth": depth,
            "num_heads": heads,
        }


def build_student(config: StudentConfig) -> VisionTransformer:
    """A timm ViT with class token and no head, initialised as MAE does (spec section 4).

    Of preset init_from: as timm builds it; its weights come from that network.
    Raises InputError for sizes that do not divide.
    """
    name, kwargs = config.architecture()
    if config.preset == "init_from":
        given = timm.create_model(name, num_classes=0, drop_path_rate=config.drop_path, **kwargs)
        assert isinstance(given, VisionTransformer)
        return given
    vit: Vit = VisionTransformer(num_classes=0, drop_path_rate=config.drop_path, **kwargs)
    initialise(vit)
    nn.init.xavier_uniform_(vit.patch_embed.proj.weight.view(vit.embed_dim, -1))
    nn.init.normal_(vit.cls_token, std=0.02)
    if config.pos_embed == "sincos":
        table = sincos_table(vit.embed_dim, config.grid())
        vit.pos_embed = nn.Parameter(table[None], requires_grad=False)
    else:
        nn.init.normal_(vit.pos_embed, std=0.02)
    assert isinstance(vit, VisionTransformer)
    return vit


def initialise(module: nn.Module) -> None:
    """MAE's start: every Linear xavier-uniform with zero bias, every LayerNorm 1 and 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)


def sincos_table(width: int, grid: tuple[int, int], class_token: bool = True) -> Tensor:
    """Fixed positions of MAE: (1 + rows * columns, width) fp32, or without the zero row of the class token.

    The FIRST half of the channels encodes the column, each half is [sin | cos] (spec section 4; golden
    values in section 12.2). ``width`` must be a multiple of 4.
    """
    rows, columns = grid
    quarter = width // 4
    omega = 1.0 / 10000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    row, column = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64),
        torch.arange(columns, dtype=torch.float64),
        indexing="ij",
    )
    angles = [column.reshape(-1, 1) * omega, row.reshape(-1, 1) * omega]
    table = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    if class_token:
        table = torch.cat([torch.zeros(1, width, dtype=torch.float64), table])
    return table.float()


def gather_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    """tokens (B, N, D), ids (B, K) int64 -> (B, K, D)."""
    return tokens.gather(1, ids[:, :, None].expand(-1, -1, tokens.shape[-1]))


def encode_visible(vit: Vit, images: Tensor, ids_keep: Tensor) -> Tensor:
    """MAE's encoder: only visible patches enter the blocks.

    images (B, C, H, W) normalised, ids_keep (B, K) -> latents (B, 1 + K, D) after the final norm, class
    token first. Order: patch embedding and position of visible patches, class token, blocks, norm. Registers,
    where the network has some, stand after the class token in the blocks and are left out at the end.
    """
    prefix = (
        vit.cls_token if vit.reg_token is None else torch.cat([vit.cls_token, vit.reg_token], dim=1)
    )
    places, count = vit.pos_embed, prefix.shape[1]
    if not vit.no_embed_class:
        prefix, places = prefix + places[:, :count], places[:, count:]
    positions = places.expand(images.shape[0], -1, -1)
    tokens = embed_patches(vit, images, ids_keep) + gather_tokens(positions, ids_keep)
    tokens = torch.cat([prefix.expand(tokens.shape[0], -1, -1).to(tokens.dtype), tokens], dim=1)
    latents = vit.norm(vit.blocks(vit.norm_pre(tokens)))
    return without_registers(latents, count)


def embed_patches(vit: Vit, images: Tensor, ids: Tensor) -> Tensor:
    """The patch embedding at patches ids (B, K) alone: (B, K, D). images (B, C, H, W).

    The same as embedding all of them, since kernel and stride of the convolution are one patch.
    """
    conv = vit.patch_embed.proj
    height, width = conv.kernel_size
    batch, channels, rows, columns = images.shape
    rows, columns = rows // height, columns // width
    grid = images.view(batch, channels, rows, height, columns, width).permute(0, 2, 4, 1, 3, 5)
    image = torch.arange(batch, device=ids.device)[:, None]
    patches = grid[image, ids // columns, ids % columns].flatten(2)
    return F.linear(patches, conv.weight.flatten(1), conv.bias)


@dataclass
class LastBlockInput:
    """What enters the last block of a network, and what of that block has been computed already."""

    tokens: Tensor
    """(B, P + L, D): prefix tokens (class, registers), then patches."""
    context: dict[str, Any]
    """Keywords of the block: rotary embedding (Eva) or relative position bias (Beit)."""
    earlier: list[Tensor]
    """Outputs of the last blocks before the last one, oldest first; see ``keep_outputs``."""
    normed: Tensor | None = None
    """(B, P + L, D) after the last block's first norm, once it has been computed."""
    keys: Tensor | None = None
    """(B, heads, P + L, d) of the last block, once the attention map has made them."""
    finished: Tensor | None = None
    """(B, P + L, D) after last block and final norm, where the attention map needed all of it."""
    before: Tensor | None = None
    """(B, P + L, D): what enters the block whose attention is read, where that is not the last one."""


def forward_to_last(
    model: Vit, images: Tensor, keep_outputs: int = 0, attention_block: int = -1
) -> LastBlockInput:
    """Run all blocks but the last on full images (B, C, H, W).

    keep_outputs: how many outputs of the preceding blocks to keep (for the mean of the last K blocks).
    attention_block: the block whose attention will be read (0 the first, -1 the last).
    Raises InputError for networks that are not timm's VisionTransformer, Eva or Beit, or whose last block is
    not of the plain pre-norm kind.
    """
    tokens, context = _embed(model, images)
    _check_last_block(model)
    blocks = list(model.blocks)
    if keep_outputs >= len(blocks):
        raise InputError(
            f"the mean of the last {keep_outputs + 1} blocks: the network has {len(blocks)}, give at most so many"
        )
    read_at = block_number(model, attention_block)
    earlier: list[Tensor] = []
    before: Tensor | None = None
    for number, block in enumerate(blocks[:-1]):
        if number == read_at:
            before = tokens
        tokens = block(tokens, **context)
        if number >= len(blocks) - 1 - keep_outputs:
            earlier.append(tokens)
    return LastBlockInput(tokens, context, earlier, before=before)


def block_number(model: Vit, block: int) -> int:
    """Index of a block from 0; negative ones count from the end. Raises InputError for one that is not there."""
    depth = len(model.blocks)
    if not -depth <= block < depth:
        raise InputError(
            f"attention block {block} is not there: the network has {depth}, give {-depth} to {depth - 1}"
        )
    return block % depth


def up_to(model: Vit, layer: int) -> Vit:
    """The network as if block ``layer`` (from 1; 0: all) were its last; weights are shared.

    Raises InputError for a block that it does not have.
    """
    depth = len(model.blocks)
    if not 0 <= layer <= depth:
        raise InputError(f"layer {layer} is not there: give 1..{depth}, or 0 for the last")
    if layer in (0, depth):
        return model
    cut = copy.copy(model)
    cut._modules = dict(model._modules)
    cut.blocks = model.blocks[:layer]
    return cut


def _check_last_block(model: Vit) -> None:
    """``finish`` and the attention map follow the equations of these blocks; others would come out wrong."""
    block = model.blocks[-1]
    attn = getattr(block, "attn", None)
    known = type(block).__name__ in ("Block", "EvaBlock")
    known &= type(attn).__name__ in ("Attention", "EvaAttention", "AttentionRope")
    if not known or getattr(attn, "num_kv_groups", 1) != 1:
        raise InputError(
            f"the last block of this network is a {type(block).__name__} with {type(attn).__name__}, whose "
            "attention cannot be read here: choose a teacher with plain pre-norm blocks"
        )


def _embed(model: Vit, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Patch embedding, prefix tokens and positions of the three families of timm."""
    kind = type(model).__name__.removeprefix("FSDP")  # fully_shard makes a class of that name
    tokens = model.patch_embed(images)
    if kind == "VisionTransformer":
        return model.norm_pre(model._pos_embed(tokens)), {}
    if kind == "Eva":
        if getattr(model, "rope_mixed", False):
            raise InputError(
                "a teacher with rotary positions that change with depth is not supported"
            )
        tokens, rope = model._pos_embed(tokens)
        return model.norm_pre(tokens), {"rope": rope}
    if kind == "Beit":
        tokens = torch.cat([model.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        if model.pos_embed is not None:
            tokens = tokens + model.pos_embed
        bias = model.rel_pos_bias() if model.rel_pos_bias is not None else None
        return tokens, {"shared_rel_pos_bias": bias}
    raise InputError(
        f"a network of kind {kind} has no token interface here: use a ViT, EVA or BEiT"
    )


def num_prefix(model: Vit) -> int:
    """How many tokens stand before the patches (class token and registers)."""
    return int(getattr(model, "num_prefix_tokens", 1))


def without_registers(tokens: Tensor, prefix: int) -> Tensor:
    """tokens (B, prefix + N, D), class token first -> (B, 1 + N, D)."""
    return tokens if prefix == 1 else torch.cat([tokens[:, :1], tokens[:, prefix:]], dim=1)


def has_class_token(model: Vit) -> bool:
    """Whether token 0 is a class token. Never treat token 0 of another network as one (spec 1.4)."""
    return getattr(model, "cls_token", None) is not None


def grid_of(model: Vit) -> tuple[int, int]:
    """(rows, columns) of patches at the network's input size."""
    rows, columns = model.patch_embed.grid_size
    return int(rows), int(columns)
