"""Small reference networks and files for the tests of backbones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from cmt_mae.backbones import Backbone, load_backbone
from cmt_mae.core.backbone_facts import BackboneFacts

WIDTH, DEPTH, PATCH, SIZE = 64, 2, 8, 32
TINY: dict[str, Any] = {
    "img_size": SIZE,
    "patch_size": PATCH,
    "embed_dim": WIDTH,
    "depth": DEPTH,
    "num_heads": 1,
    "mlp_ratio": 2.0,
}
ONE_HEAD = BackboneFacts(heads=1)
"""What a file of a known kind does not say of these sizes, which nobody published."""


def told(arch: str = "vit_base_patch16_224", **facts: Any) -> BackboneFacts:
    """All that a bare file of a tiny network does not say."""
    known = {"heads": 1, "grid": [SIZE // PATCH] * 2, "mean": [0.5] * 3, "std": [0.5] * 3}
    return BackboneFacts(arch=arch, **(known | facts))


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that make every part count: activations of order one, nothing zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim >= 2 and name.endswith("weight") and "position" not in name:
                p.copy_(noise / p[0].numel() ** 0.5)
            elif p.ndim == 1 and name.endswith("weight"):  # norms
                p.copy_(1 + 0.2 * noise)
            else:
                p.copy_(0.3 * noise)
    return model.eval()


def tiny(architecture: str = "vit_base_patch16_224", seed: int = 0, **kwargs: Any) -> nn.Module:
    """A tiny randomised timm network (with a head of 10 classes unless told otherwise)."""
    options = {"num_classes": 10, **TINY, **kwargs}
    return randomise(timm.create_model(architecture, pretrained=False, **options), seed)


def headless(model: nn.Module) -> dict[str, Tensor]:
    """State dict without the head, as files of a backbone alone have it."""
    return {k: v for k, v in model.state_dict().items() if not k.startswith("head.")}


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + k: v for k, v in state.items()}


def image(size: int | tuple[int, int] = SIZE, seed: int = 5, channels: int = 3) -> Tensor:
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, channels, height, width, generator=generator)


@torch.no_grad()
def tokens(model: nn.Module, x: Tensor) -> Tensor:
    return model.forward_features(x)  # type: ignore[operator,no-any-return]


def same(backbone: Backbone, reference: nn.Module | Tensor, atol: float = 1e-5) -> None:
    """The backbone's tokens of one image are the reference's (a timm network, or tokens)."""
    x = image(backbone.img_size, channels=len(backbone.mean))
    wanted = reference if isinstance(reference, Tensor) else tokens(reference, x)
    torch.testing.assert_close(tokens(backbone.model, x), wanted, atol=atol, rtol=1e-5)


def saved(path: Path, tree: Any) -> str:
    torch.save(tree, path)
    return str(path)


def load(path: Path | str, facts: BackboneFacts | None = None, key: str | None = None) -> Backbone:
    return load_backbone(str(path), facts=facts, key=key)
