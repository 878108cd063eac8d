"""Optimizer groups."""

from typing import Any

import torch
from torch import nn


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """timm's rule as MAE uses it: no decay for 1-D parameters and biases; class and mask token decay."""
    groups: dict[float, list[nn.Parameter]] = {weight_decay: [], 0.0: []}
    for name, parameter in module.named_parameters():
        if name.endswith("pos_embed") and not parameter.requires_grad:
            continue  # fixed sincos positions
        flat = parameter.ndim <= 1 or name.endswith(".bias")
        groups[0.0 if flat else weight_decay].append(parameter)
    return [
        {"params": parameters, "weight_decay": decay}
        for decay, parameters in groups.items()
        if parameters
    ]


def adamw(
    module: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """Fused AdamW over ``decay_groups``. Parameters without a gradient are left alone."""
    return torch.optim.AdamW(decay_groups(module, weight_decay), lr=lr, betas=betas, fused=True)
