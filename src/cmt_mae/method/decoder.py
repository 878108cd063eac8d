"""The light decoder: MAE's (default) and MILAN's prompting decoder (spec section 4)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from timm.layers import LayerNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from cmt_mae.core.errors import InputError
from cmt_mae.core.settings import Count
from cmt_mae.method.last_block import run_at
from cmt_mae.method.masking import Mask
from cmt_mae.method.vit import gather_tokens, initialise, sincos_table

Tokens = Literal["masked", "masked+cls", "all", "all+cls"]


@dataclass
class DecoderConfig:
    """The decoder that predicts targets at hidden patches."""

    kind: Literal["mae", "prompting"] = "mae"
    """mae (every token through every block) | prompting (MILAN: only hidden tokens are updated)."""
    width: Count = 512
    """Token width."""
    depth: Count = 8
    """Number of blocks."""
    heads: Count = 16
    """Attention heads."""


class Decoder(nn.Module):
    """MAE's decoder without its last linear layer: latents of visible patches -> tokens at every place."""

    def __init__(self, config: DecoderConfig, encoder_width: int, grid: tuple[int, int]) -> None:
        super().__init__()
        if config.width % config.heads or config.width % 4:
            raise InputError(
                f"decoder.width {config.width} must be a multiple of 4 and of decoder.heads {config.heads}"
            )
        self.embed = nn.Linear(encoder_width, config.width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(sincos_table(config.width, grid)[None], requires_grad=False)
        block: Callable[[int, int], nn.Module]
        block = partial(Block, mlp_ratio=4.0, qkv_bias=True, norm_layer=LayerNorm)
        if config.kind == "prompting":
            from cmt_mae.method.prompting import PromptingBlock

            block = PromptingBlock
        self.blocks = nn.ModuleList(
            [block(config.width, config.heads) for _ in range(config.depth)]
        )
        self.norm = LayerNorm(config.width)
        self.prompting = config.kind == "prompting"
        initialise(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, latents: Tensor, mask: Mask, which: Tokens = "all+cls") -> Tensor:
        """latents (B, 1 + K, D) with the class token first -> tokens (B, N, width) after the norm, in order.

        which: all+cls (N = 1 + L, class token first) | all (L) | masked (M: the hidden patches, for which alone
        the last block then runs) | masked+cls (1 + M).
        """
        tokens = self._in_raster_order(self.embed(latents), mask) + self.pos_embed
        if which in ("all", "all+cls"):
            tokens = self._prompt(tokens, mask)[0] if self.prompting else self._through(tokens)
            return self.norm(tokens)[:, 1 if which == "all" else 0 :]
        places = 1 + mask.ids_mask
        if which == "masked+cls":
            places = F.pad(places, (1, 0))
        if self.prompting:
            tokens, hidden = self._prompt(tokens, mask)
            return self.norm(torch.cat([tokens[:, :1], hidden], 1) if "+" in which else hidden)
        if not len(self.blocks):
            return self.norm(gather_tokens(tokens, places))
        tokens = self._through(tokens, but=1)
        return self.norm(run_at(self.blocks[-1], tokens, places))

    def _through(self, tokens: Tensor, but: int = 0) -> Tensor:
        """All tokens through the blocks ``but`` the last ones."""
        for block in self.blocks[: len(self.blocks) - but]:
            tokens = block(tokens)
        return tokens

    def _in_raster_order(self, visible: Tensor, mask: Mask) -> Tensor:
        """Put visible tokens at their places and the mask token at the others; class token first."""
        batch, n_patches = mask.mask.shape
        full = self.mask_token.to(visible.dtype).expand(batch, n_patches, -1)
        places = mask.ids_keep[:, :, None].expand(-1, -1, visible.shape[-1])
        return torch.cat([visible[:, :1], full.scatter(1, places, visible[:, 1:])], dim=1)

    def _prompt(self, tokens: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
        """All tokens, and the hidden ones. Visible ones stay and only serve as keys and values (MILAN)."""
        hidden = gather_tokens(tokens[:, 1:], mask.ids_mask)
        places = 1 + mask.ids_mask[:, :, None].expand(-1, -1, tokens.shape[-1])
        for block in self.blocks:
            hidden = block(hidden, tokens, places)
        return tokens.scatter(1, places, hidden.to(tokens.dtype)), hidden
