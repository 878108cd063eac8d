"""Training with labels (fine-tuning, detection, segmentation) as a ``Task``: built of functions."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import broadcast
from torch import Tensor, nn

from cmt_mae.core.runs import RunDir
from cmt_mae.engine import sharding
from cmt_mae.engine.task import Evaluation, Task, falls_due


@dataclass(kw_only=True)
class SupervisedTask(Task):
    """One training on labelled images."""

    model: nn.Module
    """``model(batch)`` -> {name: scalar loss}; their sum is what is minimised."""
    optimizer: torch.optim.Optimizer
    schedule: Callable[[int], float]
    """Optimizer step -> learning rate, before ``lr_scale``."""
    loader: Callable[[int], Generator[Any, None, None]]
    """Step to start at -> endless micro-batches."""
    to_device: Callable[[Any], Any]
    """A micro-batch as ``model`` takes it."""
    measure: Callable[[int], Evaluation]
    """Step -> the numbers on the validation images, and pictures."""
    headline: str
    seed: int
    batch_size: int
    micro_batch: int
    accumulation: int
    steps_per_epoch: int
    total_steps: int
    eval_every: float = 0.0
    """Epochs between two evaluations; 0: only at the end."""
    clip: float = 0.0
    average: nn.Module | None = None
    """A copy of ``model`` that becomes the running average of its weights, or None; ``measure`` looks at it."""
    average_decay: float = 0.9999

    def lr_at(self, step: int) -> float:
        return self.schedule(step)

    def batches(self, start: int) -> Generator[Any, None, None]:
        return self.loader(start)

    def loss(self, model: nn.Module, batch: Any, step: int) -> tuple[Tensor, dict[str, Tensor]]:  # noqa: ARG002
        losses: dict[str, Tensor] = model(self.to_device(batch))
        loss = torch.stack([value.float() for value in losses.values()]).sum()
        return loss, {"loss": loss, **losses}

    def evaluates(self, step: int) -> bool:
        due = step > 0 and falls_due(self.eval_every, step, self.steps_per_epoch)
        return due or step == self.total_steps

    def evaluate(self, step: int, run: RunDir) -> Evaluation:  # noqa: ARG002
        networks = [self.model, *self.followers()]
        share_statistics(networks)
        with sharding.whole(*networks):
            return self.measure(step)

    def networks(self) -> dict[str, nn.Module | None]:
        return {"model": self.model, "average": self.average}

    def followers(self) -> list[nn.Module]:
        return [] if self.average is None else [self.average]

    def after_step(self, step: int, skipped: Tensor) -> None:  # noqa: ARG002
        if self.average is not None:
            follow(self.average, self.model, self.average_decay)


def share_statistics(networks: list[nn.Module]) -> None:
    """The main process's batch statistics become every process's: all evaluate one and the same model.

    Each process counts its own micro-batches, and DDP evens that out only at the next forward pass.
    """
    if PartialState().num_processes > 1:
        for network in networks:
            for buffer in network.buffers():
                buffer.copy_(broadcast(buffer.clone(), from_process=0))


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * model; buffers (batch statistics) are copied."""
    own = [sharding.local(p) for p in average.parameters() if p.is_floating_point()]
    new = [sharding.local(p) for p in model.parameters() if p.is_floating_point()]
    torch._foreach_lerp_(own, new, 1.0 - decay)
    for mine, theirs in zip(average.buffers(), model.buffers(), strict=True):
        mine.copy_(theirs)


def warmed_up(step: int, peak: float, steps: int, ratio: float) -> float:
    """Linear warm-up by steps, as the detection and segmentation protocols have it (spec 7, 8).

    From ``ratio * peak`` at step 0 to ``peak`` at step ``steps``; ``peak`` from there on.
    """
    if step >= steps:
        return peak
    return peak * (ratio + (1.0 - ratio) * step / steps)


def step_decay(step: int, peak: float, drops: Sequence[int], factor: float = 0.1) -> float:
    """``peak`` times ``factor`` for every one of ``drops`` (steps) that is reached (spec 7)."""
    return float(peak * factor ** sum(step >= drop for drop in drops))


def poly(step: int, peak: float, total: int, power: float = 1.0, lowest: float = 0.0) -> float:
    """``(peak - lowest) * (1 - step / total)^power + lowest`` (spec 8)."""
    share = max(0.0, 1.0 - step / total)
    return float((peak - lowest) * share**power + lowest)
