"""Linear layers of frozen networks in fp8 (e4m3, one scale a tensor): a trial, not exact.

A weight is rounded once (the momentum student's after every step); an input is scaled by its own largest
value, found on the device. torch._scaled_mm multiplies; it wants sizes that are multiples of 16.
"""

from typing import Any

import torch
from torch import Tensor, nn

from cmt_mae.method.cmtmae import FrozenNetworks

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max  # 448


def to_fp8(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """(tensor / scale in fp8, scale fp32): the largest value becomes 448."""
    scale = tensor.abs().amax().float().clamp_min(1e-12) / LARGEST
    return (tensor.float() / scale).clamp(-LARGEST, LARGEST).to(FP8), scale


class Fp8Linear(nn.Linear):
    """A frozen Linear whose product runs in fp8; output in bf16."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias  # what the attention map reads
        self.low: Tensor
        self.scale: Tensor
        self.register_buffer("low", torch.empty(linear.weight.shape, dtype=FP8), persistent=False)
        self.register_buffer("scale", torch.ones(()), persistent=False)
        self.round()

    @torch.no_grad()
    def round(self) -> None:
        """Take up the weight as it is now."""
        low, scale = to_fp8(self.weight)
        if self.low.device != low.device:
            self.low, self.scale = low, scale
        else:
            self.low.copy_(low)
            self.scale.copy_(scale)

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., in) -> (..., out) bf16."""
        flat = tokens.flatten(0, -2)
        rows = flat.shape[0]
        if rows % 16:
            flat = nn.functional.pad(flat, (0, 0, 0, -rows % 16))
        flat, scale = to_fp8(flat)
        bias = None if self.bias is None else self.bias.bfloat16()
        out = torch._scaled_mm(
            flat, self.low.t(), scale_a=scale, scale_b=self.scale, bias=bias, out_dtype=torch.bfloat16
        )  # fmt: skip
        return out[:rows].unflatten(0, tokens.shape[:-1])


def use_fp8(guides: FrozenNetworks) -> None:
    """Exchange the linear layers of all blocks but the last of both frozen networks (its inside is read)."""
    running: list[Any] = [] if guides.teacher is None else [guides.teacher.model]
    if guides.momentum is not None:
        running.append(guides.momentum_runs())
    for network in running:
        for block in network.blocks[:-1]:
            for owner, names in ((block.attn, ("qkv", "proj")), (block.mlp, ("fc1", "fc2"))):
                for name in names:
                    setattr(owner, name, Fp8Linear(getattr(owner, name)))
    if guides.momentum is not None:
        follow_momentum(guides)


def follow_momentum(guides: FrozenNetworks) -> None:
    """Round the momentum student's fp8 weights again whenever its bf16 ones change."""
    layers = [m for m in guides.momentum_runs().modules() if isinstance(m, Fp8Linear)]
    before = guides.round_momentum

    def round_momentum() -> None:
        before()
        for layer in layers:
            layer.round()

    guides.round_momentum = round_momentum  # type: ignore[method-assign]
