"""Layer-wise decay of the learning rate, of fine-tuning, segmentation and detection."""

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

EMBEDDING = (
    "patch_embed", "cls_token", "pos_embed", "reg_token", "dist_token", "norm_pre", "mask_token",
)  # fmt: skip


def layer_scales(depth: int, decay: float) -> list[float]:
    """Learning-rate scale of id 0 (embeddings), 1..depth (blocks) and depth + 1 (all behind them).

    decay^(depth + 1 - id), BEiT's and MAE's layer-wise decay (spec 6.3; golden values in 12.5).
    """
    return [decay ** (depth + 1 - number) for number in range(depth + 2)]


def layer_id(name: str, depth: int, prefix: str) -> int:
    """Id of a parameter for ``layer_scales``: names below ``prefix`` are the backbone's, others depth + 1."""
    if not name.startswith(prefix):
        return depth + 1
    inner = name[len(prefix) :]
    # a block's table of relative positions (pyramid.Taps.biases) is part of the block, as in BEiT
    block = re.search(r"(?:^|\.)(?:blocks|biases)\.(\d+)\.", inner)
    if block:
        return int(block[1]) + 1
    return 0 if any(part in EMBEDDING for part in inner.split(".")) else depth + 1


def layer_decay_groups(
    module: nn.Module,
    depth: int,
    decay: float,
    weight_decay: float,
    *,
    prefix: str = "backbone.",
    no_decay: Iterable[str] = ("pos_embed", "cls_token"),
) -> list[dict[str, Any]]:
    """Groups of equal scale and weight decay; each holds ``lr_scale``, which ``fit`` multiplies its rate by.

    depth: blocks of the backbone. prefix: of the backbone's parameter names in ``module``.
    no_decay: last parts of names without weight decay, besides 1-D parameters and biases.
    """
    scales, bare = layer_scales(depth, decay), tuple(no_decay)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        flat = parameter.ndim <= 1 or name.endswith(".bias") or name.split(".")[-1] in bare
        key = (scales[layer_id(name, depth, prefix)], 0.0 if flat else weight_decay)
        group = groups.setdefault(
            key, {"params": [], "names": [], "lr_scale": key[0], "weight_decay": key[1]}
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())
