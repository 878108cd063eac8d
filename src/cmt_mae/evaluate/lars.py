"""The optimizer of MAE's linear probe: LARS (specification 6.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor


def loss_of(closure: Callable[[], float] | None) -> float | None:
    """What ``closure`` computes, with gradient; None without one."""
    with torch.enable_grad():
        return None if closure is None else closure()


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
        loss = loss_of(closure)
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
