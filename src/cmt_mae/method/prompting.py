"""The block of MILAN's prompting decoder."""

from timm.layers import LayerNorm
from torch import Tensor, nn
from torch.nn import functional as F


class PromptingBlock(nn.Module):
    """A block that updates hidden tokens only: queries are hidden tokens, keys and values all tokens.

    norm1 is applied to the hidden tokens; the fixed visible ones enter keys and values as they are.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, hidden: Tensor, fixed: Tensor, places: Tensor) -> Tensor:
        """hidden (B, M, W), fixed (B, 1 + L, W) raster order, places (B, M, W) int64 -> (B, M, W)."""
        normed = self.norm1(hidden)
        keys, values = self.key_value(fixed.scatter(1, places, normed.to(fixed.dtype))).chunk(
            2, dim=-1
        )
        query, keys, values = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(normed), keys, values)
        )
        mixed = F.scaled_dot_product_attention(query, keys, values)
        hidden = hidden + self.proj(mixed.transpose(1, 2).flatten(2))
        return hidden + self.mlp(self.norm2(hidden))
