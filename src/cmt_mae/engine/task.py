# ruff: noqa: ARG002 - what a method does not use, another task does
"""What one training is, as the loop (fit.py) takes it.

Pre-training is a task (pretraining/task.py), and so are the three evaluations that train (supervised.py).
"""

from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cmt_mae.core.errors import InputError
from cmt_mae.core.runs import RunDir
from cmt_mae.core.settings import (
    Amount,
    Count,
    CountOrNone,
    Device,
    Parallel,
    Tracker,
    resume_safe,
)


@dataclass(kw_only=True)
class LoopSettings:
    """What every training can set of the loop; nothing of it affects the result."""

    device: Device = resume_safe("auto")
    """auto | cpu | cuda | mps."""
    parallel: Parallel = resume_safe("ddp")
    """How several processes share the work: ddp (each holds the networks) | fsdp (weights, gradients and optimizer
    of what is trained, and of its moving average, are cut into pieces, one a process)."""
    deterministic: bool = resume_safe(False)
    """On a GPU too, the same seed gives the same bits (slower; on CPU it always does)."""
    compile: bool = resume_safe(False)
    """torch.compile the blocks of all networks (minutes at the start; off where this machine cannot)."""
    micro_batch: CountOrNone = resume_safe(0)
    """Images a process takes at a time; 0: its whole share of the batch. Gradients are accumulated."""
    log_every: Count = resume_safe(20)
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every: Amount = resume_safe(1.0)
    """Epochs between checkpoints."""
    keep_last: Count = resume_safe(1)
    """How many of the newest checkpoints are kept."""
    max_nonfinite: Count = resume_safe(20)
    """So many steps in a row without a finite loss and gradient stop the run."""
    tracker: Tracker = resume_safe("none")
    """none | wandb: a further place for metrics (metrics.jsonl and tensorboard are always written)."""
    progress: bool = resume_safe(True)
    """Show the progress bar, or a line every few seconds where there is no terminal."""


@dataclass
class Evaluation:
    """What one evaluation of a model in training found."""

    metrics: dict[str, float]
    """Name -> value, with the task's headline among them; may be empty."""
    details: dict[str, Any] = field(default_factory=dict)
    """Plain values behind them (every class ...), for ``Result.details``."""


class Task(Protocol):
    """One training. Everything in it is this process's own; every process calls its methods alike.

    Methods with a body are what most tasks need: nothing.
    """

    model: nn.Module
    """What learns, on the right device already. The loop wraps it for several processes."""
    optimizer: torch.optim.Optimizer
    """Fused AdamW (it can skip a step) over the model's parameters; groups may hold ``lr_scale``."""
    seed: int
    batch_size: int
    """Images a step, over all processes and accumulations."""
    micro_batch: int
    """Images a process takes at a time."""
    accumulation: int
    """Micro-batches of a step."""
    steps_per_epoch: int
    total_steps: int
    clip: float
    """Largest norm of the gradient; 0: no limit."""
    headline: str
    """The metric that marks the best checkpoint: larger is better."""
    prefix: str = "val_"
    """Of its metrics' names in metrics.jsonl."""
    long_evaluation: bool = True
    """Whether a checkpoint is written before an evaluation too, and one after it whatever it found."""
    switch_step: int = -1
    """The step before which ``enter`` is called again; -1: none."""

    def lr_at(self, step: int) -> float:
        """Learning rate of an optimizer step, before ``lr_scale``."""
        ...

    def batches(self, start: int) -> Generator[Any, None, None]:
        """Endless micro-batches of this process, from optimizer step ``start`` on."""
        ...

    def loss(self, model: nn.Module, batch: Any, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to minimise and the numbers to log, of one micro-batch. model: ``self.model``, wrapped."""
        ...

    def evaluates(self, step: int) -> bool:
        """Whether ``evaluate`` is due after so many steps."""
        ...

    def evaluate(self, step: int, run: RunDir) -> Evaluation:
        """The numbers after so many steps, the same in every process; the model is in eval mode.

        The first process may write pictures into the run.
        """
        ...

    def networks(self) -> dict[str, nn.Module | None]:
        """Name -> what goes into a checkpoint under this name: the model and what follows its weights."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Load networks and ``extra_state`` of a checkpoint; before the first ``enter``."""
        for name, network in self.networks().items():
            if network is not None:
                network.load_state_dict(state[name])

    def extra_state(self) -> dict[str, Any]:
        """Plain values that continuing needs besides networks, optimizer and meters."""
        return {}

    def frozen(self) -> dict[str, nn.Module]:
        """Name -> network that runs in a step, is not trained and not in checkpoints."""
        return {}

    def blocks(self) -> Iterable[nn.Module]:
        """Parts of the model that FSDP gathers one at a time."""
        return ()

    def followers(self) -> list[nn.Module]:
        """Networks of the model's shape that FSDP cuts as well (running averages)."""
        return []

    def begin(self, run: RunDir) -> None:
        """Once, after a checkpoint has been loaded, before the first step."""
        return

    def enter(self, step: int) -> None:
        """At the start, also of a continued run, and before ``switch_step``: what is trained from here on."""
        return

    def after_step(self, step: int, skipped: Tensor) -> None:
        """After an optimizer step. skipped: 1.0 where it was not taken, on the device."""
        return

    def entries(self, means: dict[str, float], step: int) -> dict[str, Any]:
        """Further entries of a line of metrics, from its means, after so many steps."""
        return {}

    def check(self, row: dict[str, Any], run: RunDir) -> None:
        """After a line of metrics: warn, or raise InputError where going on makes no sense."""
        return

    def keeps(self, step: int) -> bool:
        """Whether a checkpoint of this step is written and kept for good."""
        return False

    def publish(self, step: int, run: RunDir) -> None:
        """Write what goes with a checkpoint, just before it."""
        return


def micro_batches(batch_size: int, micro_batch: int, processes: int) -> tuple[int, int]:
    """(images of a micro-batch, micro-batches of a step) of one process; micro_batch 0: the whole share.

    Raises InputError where the batch cannot be split.
    """
    share, rest = divmod(batch_size, processes)
    micro = min(micro_batch or share, share)
    if rest or not micro or share % micro:
        raise InputError(
            f"a batch of {batch_size} cannot be split into {processes} process(es) with micro-batches of "
            f"{micro_batch or share}: make batch_size a multiple of {processes * (micro_batch or 1)}, or change "
            "micro_batch"
        )
    return micro, share // micro


def falls_due(every: float, step: int, steps_per_epoch: int) -> bool:
    """Whether a thing done every so many epochs falls on this step; never for 0."""
    return every > 0 and step % max(1, round(every * steps_per_epoch)) == 0
