"""Three processes that torchrun starts: a step just after wrapping rounds as the same step of a longer run."""

import copy
import sys
from pathlib import Path

import torch
from torch import nn

from cmt_mae.engine.processes import leave_processes, make_accelerator


class Backwards(nn.Module):
    """Layers that are used in another order than they are registered in."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(97, 97) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number in (3, 0, 5, 1, 4, 2):
            x = torch.tanh(self.layers[number](x))
        return x


def compare() -> bool:
    """Whether the second step of a wrapped model is that of a model wrapped just before it."""
    accelerator = make_accelerator("cpu", "fp32")
    torch.manual_seed(0)
    plain = Backwards()

    def step(wrapped: nn.Module, number: int) -> dict[str, torch.Tensor]:
        """Gradients, added up over the processes, of images of this process and step."""
        seed = torch.Generator().manual_seed(10 * number + accelerator.process_index)
        wrapped.zero_grad()
        wrapped(torch.randn(8, 97, generator=seed)).square().sum().backward()
        return {n: p.grad.clone() for n, p in wrapped.named_parameters() if p.grad is not None}

    longer = accelerator.prepare_model(copy.deepcopy(plain))
    step(longer, 0)
    second = step(longer, 1)
    resumed = step(accelerator.prepare_model(copy.deepcopy(plain)), 1)
    return all(torch.equal(second[name], resumed[name]) for name in second)


equal = compare()
leave_processes()
names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
left = sum("gloo" in name for name in names)
sys.stdout.write(f"equal {equal}, threads of connections left {left}\n")  # in one piece
