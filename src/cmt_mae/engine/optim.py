"""AdamW, and its schedules as pure functions of the position in training (spec section 5)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn


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


def skip_unless(
    optimizer: torch.optim.Optimizer, finite: Tensor, accelerator: Accelerator
) -> Tensor:
    """Let the next step of a fused optimizer do nothing unless ``finite`` on every rank; 1.0 where skipped.

    Fused AdamW takes no step where ``found_inf`` is 1: decided on the device, on all ranks alike.
    """
    skipped = 1.0 - finite.float()
    if accelerator.num_processes > 1:
        skipped = accelerator.reduce(skipped).clamp_max(1.0)
    optimizer.found_inf = skipped  # type: ignore[attr-defined]
    return skipped


def learning_rate(
    epoch: float, peak: float, warmup: float, total: float, lowest: float = 0.0
) -> float:
    """MAE's schedule, per iteration: linear from 0 over ``warmup`` epochs, then half a cosine to ``lowest``.

    epoch: fractional epochs done, 0..total. Golden values in spec 12.5.
    """
    if epoch < warmup:
        return peak * epoch / warmup
    share = min(1.0, (epoch - warmup) / max(1e-12, total - warmup))
    return lowest + (peak - lowest) * 0.5 * (1.0 + math.cos(math.pi * share))


def momentum(share: float, start: float, end: float, shape: str = "cosine") -> float:
    """m of the moving average at ``share`` 0..1 of stage two: start at 0, end at 1 (spec 5.2).

    shape: cosine | linear | constant (always ``start``).
    """
    share = min(1.0, max(0.0, share))
    if shape == "constant":
        return start
    if shape == "linear":
        return start + (end - start) * share
    return end - (end - start) * 0.5 * (1.0 + math.cos(math.pi * share))


def half_lives(ms: Sequence[float]) -> float:
    """How often the moving average has lost half of what it was, over steps with these m."""
    return -sum(math.log2(max(m, 1e-6)) for m in ms)
