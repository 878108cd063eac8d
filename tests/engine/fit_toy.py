"""A toy training for the tests of ``fit``; as a program it is what gets killed: fit_toy.py OUT JSON."""

import json
import os
import signal
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cmt_mae.core.runs import RunDir, plain
from cmt_mae.core.settings import resume_safe_settings
from cmt_mae.data.tasks import train_batches
from cmt_mae.engine.fit import fit
from cmt_mae.engine.processes import leave_processes, make_accelerator
from cmt_mae.engine.supervised import SupervisedTask
from cmt_mae.engine.task import Evaluation, micro_batches
from cmt_mae.engine.task_settings import TaskSettings

N, BATCH, STEPS_PER_EPOCH = 40, 8, 5


class Net(nn.Module):
    """Dropout draws from torch's generator, BatchNorm keeps statistics: both must survive a restart."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(dropout), nn.Linear(6, 1)
        )

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        wanted = batch.sum(1, keepdim=True)
        return {"loss_toy": (self.body(batch) - wanted).square().mean()}


def sample(index: int, rng: np.random.Generator) -> Tensor:
    return torch.from_numpy(rng.normal(size=4).astype(np.float32) + index % 3)


def toy(
    out: Path,
    *,
    epochs: int = 4,
    micro: int = 0,
    dropout: float = 0.3,
    norm: bool = True,
    average: bool = False,
    nan_at: tuple[int, ...] = (),
    signal_at: tuple[int, int] | None = None,
    signal_in_evaluation: int | None = None,
    digest: str = "a",
    lr_scale: float = 1.0,
    statistics: str | None = None,
    **settings: Any,
) -> tuple[Evaluation, SupervisedTask, RunDir]:
    """Train the toy. signal_at: (signal, micro-batch number since step 0) sent to this very process.

    statistics: beginning of the files' names that every process writes its BatchNorm's means to at an evaluation.
    """
    options = {"log_every": 2, "checkpoint_every": 0.4, "eval_every": 1.0, **settings}
    config = TaskSettings(
        backbone="b", data="d", out=str(out), progress=False, device="cpu", workers=0, micro_batch=micro,
        **options,
    )  # fmt: skip
    accelerator = make_accelerator("cpu", "fp32")
    world, rank = accelerator.num_processes, accelerator.process_index
    run = RunDir(str(out), plain(config), resume_safe_settings(type(config)), writes=accelerator.is_main_process)
    torch.manual_seed(0)
    model = Net(dropout)
    if not norm:
        model.body[1] = nn.Identity()
    size, accumulation = micro_batches(BATCH, micro, world)
    groups = [{"params": list(model.parameters()), "lr_scale": lr_scale}]

    def batches(step: int) -> Generator[Any, None, None]:
        number = step * accumulation
        for batch in train_batches(
            sample, torch.stack, N, seed=1, batch_size=BATCH, micro_batch=size, rank=rank, world=world,
            start_step=step,
        ):  # fmt: skip
            if signal_at is not None and number == signal_at[1]:
                os.kill(os.getpid(), signal_at[0])
            yield batch * float("nan") if number // accumulation in nan_at else batch
            number += 1

    def evaluate(step: int) -> Evaluation:
        if signal_in_evaluation == step:
            os.kill(os.getpid(), signal.SIGKILL)
        if statistics is not None:
            assert isinstance(model.body[1], nn.BatchNorm1d)
            torch.save(model.body[1].running_mean, f"{statistics}{rank}.pt")
        weight = float(model.body[0].weight.detach().sum())
        return Evaluation({"score": weight}, {"step": step})

    task = SupervisedTask(
        model=model, optimizer=torch.optim.AdamW(groups, lr=1.0, fused=True),
        schedule=lambda step: 0.01 * (step + 1), loader=batches, to_device=lambda b: b, measure=evaluate,
        headline="score", seed=config.seed, batch_size=BATCH, micro_batch=size, accumulation=accumulation,
        steps_per_epoch=STEPS_PER_EPOCH, eval_every=config.eval_every,
        total_steps=epochs * STEPS_PER_EPOCH, clip=1.0, average=Net(dropout) if average else None,
        average_decay=0.5,
    )  # fmt: skip
    if task.average is not None:
        task.average.load_state_dict(model.state_dict())
    facts = {"backbone": {"digest": digest}, "data": {"fingerprint": "f"}}
    try:
        return fit(config, task, accelerator, run, facts).evaluation, task, run
    finally:
        run.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    toy(Path(sys.argv[1]), **json.loads(sys.argv[2]))
    leave_processes()
