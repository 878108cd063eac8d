"""Optimizers of linear probes: LARS (MAE, specification 6.1), and SGD for many heads side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step is scaled, tensor by tensor, to the size of the weights.

    For a parameter p of two or more dimensions with gradient g (You et al. 2017, as used by
    MoCo v3 and MAE)::

        d = g + weight_decay * p
        d = d * trust * |p| / |d|          (factor 1 where |p| or |d| is zero)
        m = momentum * m + d
        p = p - lr * m

    Parameters of one dimension (biases, norm scales) get neither weight decay nor the ratio.
    ``lr`` is read at every step, so momentum holds no learning rate.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust: float = 0.001,
    ) -> None:
        """Take parameters or groups of them, each with its own ``lr`` if wanted.

        Raises:
            ValueError: a setting is negative.
        """
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust}
        for name, value in defaults.items():
            if value < 0:
                raise ValueError(f"LARS: {name} is {value}, it cannot be negative")
        super().__init__(params, defaults)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient; ``closure`` recomputes the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                d = p.grad
                if p.ndim > 1:
                    d = d + group["weight_decay"] * p
                    size, change = torch.linalg.norm(p), torch.linalg.norm(d)
                    # where(), not if: reading the norms would stop a GPU at every parameter
                    ratio = group["trust"] * size / change
                    d = d * torch.where((size > 0) & (change > 0), ratio, torch.ones_like(ratio))
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                p.sub_(group["lr"] * state["momentum"].mul_(group["momentum"]).add_(d))
        return loss


class SideBySideSGD(torch.optim.Optimizer):
    """SGD with momentum for many small groups at once: torch's SGD takes them one after another.

    Per tensor p with gradient g and the settings of its own group::

        m = momentum * m + (g + weight_decay * p)
        p = p - lr * m
    """

    def __init__(
        self, params: Iterable[Tensor] | Iterable[dict[str, Any]], lr: float, momentum: float = 0.9
    ) -> None:
        """Take groups, each with its own ``lr`` and ``weight_decay``; every tensor must get a gradient."""
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})
        self.momentum = momentum
        self.tensors = [p for group in self.param_groups for p in group["params"]]
        self.buffers = [torch.zeros_like(p) for p in self.tensors]

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every tensor; ``closure`` recomputes the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        each = [(g["lr"], g["weight_decay"]) for g in self.param_groups for _ in g["params"]]
        changes = [p.grad for p in self.tensors]
        if any(decay for _, decay in each):
            decays = torch._foreach_mul(self.tensors, [decay for _, decay in each])
            changes = list(torch._foreach_add(changes, decays))
        torch._foreach_mul_(self.buffers, self.momentum)
        torch._foreach_add_(self.buffers, changes)
        torch._foreach_add_(self.tensors, torch._foreach_mul(self.buffers, [-lr for lr, _ in each]))
        return loss
