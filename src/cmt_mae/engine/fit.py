"""THE loop of the training evaluations (fine-tuning, detection, segmentation), from top to bottom.

It knows no task: a ``Job`` holds the model, its optimizer, its batches and how it is evaluated. What is
promised of pre-training holds here too: exact resume, signals, skipped steps, atomic checkpoints.
"""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

from cmt_mae.core.checkpoint import (
    checkpoint_path,
    forget_after,
    load_last,
    mark_best,
    rotate,
    save_checkpoint,
)
from cmt_mae.core.errors import InputError, Stopped
from cmt_mae.core.files import same_fingerprint
from cmt_mae.core.runs import RunDir
from cmt_mae.core.text import printable
from cmt_mae.engine.meters import Bad, Meters
from cmt_mae.engine.optim import skip_unless
from cmt_mae.engine.processes import (
    agree,
    any_process,
    peak_memory,
    stopping_with_the_others,
)
from cmt_mae.engine.progress import training_bar
from cmt_mae.engine.signals import StopRequest
from cmt_mae.engine.task_settings import TaskSettings
from cmt_mae.engine.trackers import Trackers


@dataclass
class Evaluation:
    """What one evaluation of a model in training found."""

    metrics: dict[str, float]
    """Name -> value, with the job's headline among them."""
    details: dict[str, Any] = field(default_factory=dict)
    """Plain values behind them (every class ...), for ``Result.details``."""


@dataclass
class Job:
    """One training. Everything in it is this process's own."""

    model: nn.Module
    """``model(batch)`` -> {name: scalar loss}; their sum is what is minimised. On the right device already."""
    optimizer: torch.optim.Optimizer
    """Fused AdamW (it can skip a step); its groups may hold ``lr_scale``."""
    lr_at: Callable[[int], float]
    """Optimizer step -> learning rate, before ``lr_scale``."""
    batches: Callable[[int], Generator[Any, None, None]]
    """Step to start at -> endless micro-batches."""
    to_device: Callable[[Any], Any]
    """A micro-batch as ``model`` takes it."""
    evaluate: Callable[[int], Evaluation]
    """Step -> the numbers on the validation images. Called by every process, each gets the same answer;
    the model is in eval mode. The first process may write pictures."""
    headline: str
    """The metric that marks the best checkpoint: larger is better."""
    batch_size: int
    """Images a step, over all processes and accumulations."""
    accumulation: int
    steps_per_epoch: int
    total_steps: int
    clip: float = 0.0
    """Largest norm of the gradient; 0: no limit."""
    average: nn.Module | None = None
    """A copy of ``model`` that becomes the running average of its weights, or None. Evaluated in its place
    by the job's own ``evaluate``."""
    average_decay: float = 0.9999


def micro_batches(batch_size: int, micro_batch: int, processes: int) -> tuple[int, int]:
    """(images of a micro-batch, micro-batches of a step) of one process.

    Raises InputError where the batch cannot be split.
    """
    share, rest = divmod(batch_size, processes)
    micro = min(micro_batch or share, share)
    if rest or not micro or share % micro:
        raise InputError(
            f"a batch of {batch_size} cannot be split into {processes} process(es) with micro-batches of "
            f"{micro_batch or share}: change batch_size or micro_batch"
        )
    return micro, share // micro


def fit(
    settings: TaskSettings, job: Job, accelerator: Accelerator, run: RunDir, facts: dict[str, Any]
) -> Evaluation:
    """Train, or continue, to the end; returns the last evaluation (kept in the last checkpoint).

    run: made but not claimed. facts: for run.json; ``facts["backbone"]["digest"]`` and
    ``facts["data"]["fingerprint"]`` may not change when a run is continued.
    Raises InputError (also for another backbone or other data) and Stopped when a signal asked for the end.
    """
    return _Fit(settings, job, accelerator, run, facts).run_to_the_end()


class _Fit:
    """One process of a training."""

    def __init__(
        self,
        settings: TaskSettings,
        job: Job,
        accelerator: Accelerator,
        run: RunDir,
        facts: dict[str, Any],
    ) -> None:
        self.settings, self.job, self.accelerator, self.run = settings, job, accelerator, run
        self.facts = facts
        self.device = accelerator.device
        self.meters = Meters(self.device, accelerator)
        self.nonfinite_row = torch.zeros((), device=self.device)
        self.step, self.best, self.best_step = 0, -math.inf, -1
        self.last: Evaluation | None = None
        self.evaluated_at = -1
        self.waited, self.since = 0.0, time.perf_counter()
        self.model: nn.Module = job.model

    def run_to_the_end(self) -> Evaluation:
        job, settings = self.job, self.settings
        self.accelerator.wait_for_everyone()  # nobody writes before everybody has looked at the folder
        self.run.claim()
        self.resume()
        main = self.accelerator.is_main_process
        tracking = Trackers(self.run, settings.tracker, vars(settings), self.step)
        bar = training_bar(settings.progress and main)
        # step by step the same numbers on one process or many: only the wrapped model talks to the others
        self.model = self.accelerator.prepare_model(job.model)
        others = stopping_with_the_others(self.accelerator, self.run.path)
        with (
            closing(job.batches(self.step)) as batches,
            StopRequest() as stop,
            tracking,
            bar,
            others,
        ):
            task = bar.add_task(
                "", total=job.total_steps, completed=self.step, images_per_step=job.batch_size
            )
            self.since = time.perf_counter()
            asked = False
            while True:
                over = self.step == job.total_steps
                due = over or (self.step > 0 and self.falls_due(settings.eval_every))
                if due and self.evaluated_at != self.step and not asked:
                    self.measure(tracking)
                    asked = any_process(self.accelerator, stop.asked)
                if over and self.evaluated_at == self.step:
                    break
                if asked:
                    raise Stopped(
                        f"stopped at step {self.step} of {job.total_steps}, checkpoint written in "
                        f"{self.run.path}: run the same command to continue"
                    )
                self.take_step(batches)
                self.step += 1
                over = self.step == job.total_steps
                if self.step % settings.log_every == 0 or over:
                    bar.update(task, description=self.log(tracking))
                bar.update(task, completed=self.step)
                asked = any_process(self.accelerator, stop.asked)
                # before an evaluation too: one that is cut off costs no training
                if (
                    asked
                    or over
                    or any(map(self.falls_due, (settings.checkpoint_every, settings.eval_every)))
                ):
                    self.checkpoint()
        assert self.last is not None
        return self.last

    def take_step(self, batches: Generator[Any, None, None]) -> None:
        """All micro-batches, one optimizer step, the running average."""
        job = self.job
        job.model.train()
        # dropout, drop path and mixing draw from torch's generator: tied to the step, it needs no place
        # in checkpoints
        torch.manual_seed(
            self.settings.seed + 1_000_003 * self.step + self.accelerator.process_index
        )
        lr = job.lr_at(self.step)
        for group in job.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        # a batch that is not finite spoils batch statistics in the forward pass already
        statistics = [b for b in job.model.buffers() if b.is_floating_point()]
        before = [b.clone() for b in statistics]
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        for number in range(job.accumulation):
            begin = time.perf_counter()
            batch = next(batches)
            self.waited += time.perf_counter() - begin
            last = number == job.accumulation - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                with self.accelerator.autocast():
                    losses: dict[str, Tensor] = self.model(job.to_device(batch))
                loss = torch.stack([v.float() for v in losses.values()]).sum()
                self.accelerator.backward(loss / job.accumulation)
            finite = finite & torch.isfinite(loss.detach())
            parts = {k: v.detach() for k, v in losses.items()}
            numbers = {**parts, "loss": loss.detach()}
            self.meters.add(numbers, self.step + 1, 1 / job.accumulation)
        norm = nn.utils.clip_grad_norm_(job.model.parameters(), job.clip or math.inf)
        skipped = skip_unless(job.optimizer, finite & torch.isfinite(norm), self.accelerator)
        self.nonfinite_row = (self.nonfinite_row + 1) * skipped
        self.meters.add({"gradient_norm": norm, "skipped_steps": skipped}, self.step + 1)
        job.optimizer.step()
        job.optimizer.zero_grad(set_to_none=True)
        for buffer, old in zip(statistics, before, strict=True):
            buffer.copy_(torch.where(skipped > 0, old, buffer))
        if job.average is not None:
            follow(job.average, job.model, job.average_decay)

    def falls_due(self, every: float) -> bool:
        """Whether a thing done every so many epochs falls on this step; never for 0."""
        return every > 0 and self.step % max(1, round(every * self.job.steps_per_epoch)) == 0

    def log(self, tracking: Trackers) -> str:
        """One line of metrics; returns the text of the bar."""
        means, nonfinite = self.meters.read()
        steps = self.step % self.settings.log_every or self.settings.log_every
        elapsed = time.perf_counter() - self.since
        epoch = self.step / self.job.steps_per_epoch
        row = {
            "step": self.step,
            "epoch": round(epoch, 4),
            "lr": max(group["lr"] for group in self.job.optimizer.param_groups),
            **{name: means[name] for name in sorted(means)},
            "skipped_steps": round(means["skipped_steps"] * steps),
            "images_per_second": round(steps * self.job.batch_size / elapsed, 2),
            "data_wait_share": round(min(1.0, self.waited / elapsed), 4),
            "peak_memory_gb": round(peak_memory(self.device), 3),
        }
        self.since, self.waited = time.perf_counter(), 0.0
        tracking.write(row)
        self.check_numbers(nonfinite)
        return f"epoch {epoch:.1f} loss {row['loss']:.3f}"

    def check_numbers(self, nonfinite: dict[str, Bad]) -> None:
        """Warn of skipped steps; raise InputError where they do not end."""
        if nonfinite:
            first = min(bad.first for bad in nonfinite.values())
            parts = ", ".join(f"{name} ({bad.count})" for name, bad in nonfinite.items())
            self.say(
                f"warning: not finite up to step {self.step}, first at step {first}; steps skipped: {parts}"
            )
        row = int(self.nonfinite_row.item())
        if row >= self.settings.max_nonfinite:
            raise InputError(
                f"{row} steps in a row up to step {self.step} had a loss or gradient that is not finite; "
                f"the last checkpoint in {self.run.path} is good: lower the learning rate"
            )

    def measure(self, tracking: Trackers) -> None:
        """Evaluate, note the numbers, keep them in a checkpoint; the best one is marked."""
        self.job.model.eval()
        with torch.no_grad():
            self.share_statistics()
            self.last = self.job.evaluate(self.step)
        self.evaluated_at = self.step
        shown = ", ".join(f"{k} {v:.2f}" for k, v in list(self.last.metrics.items())[:4])
        self.say(f"step {self.step}: {shown}")
        tracking.write({"step": self.step, **{f"val_{k}": v for k, v in self.last.metrics.items()}})
        value = self.last.metrics[self.job.headline]
        if value > self.best:
            self.best, self.best_step = value, self.step
        self.checkpoint()
        self.since = time.perf_counter()

    def share_statistics(self) -> None:
        """The main process's batch statistics become every process's: all evaluate one and the same model.

        Each process counts its own micro-batches, and DDP evens that out only at the next forward pass.
        """
        for module in (self.job.model, self.job.average):
            if module is not None and self.accelerator.num_processes > 1:
                for buffer in module.buffers():
                    buffer.copy_(broadcast(buffer.clone(), from_process=0))

    def checkpoint(self) -> None:
        """Write everything that continuing needs; forget old checkpoints."""
        meters = self.meters.state_dict()  # of every process
        if self.run.writes:
            job, last = self.job, self.last
            state = {
                "step": self.step,
                "best": self.best,
                "best_step": self.best_step,
                "evaluated_at": self.evaluated_at,
                "last": None
                if last is None
                else {"metrics": last.metrics, "details": last.details},
                "model": job.model.state_dict(),
                "average": None if job.average is None else job.average.state_dict(),
                "optimizer": job.optimizer.state_dict(),
                "meters": meters,
                "nonfinite_row": float(self.nonfinite_row),
            }
            self.run.settle()
            save_checkpoint(self.run.checkpoints, self.step, state)
            self.tidy()
        self.accelerator.wait_for_everyone()

    def tidy(self) -> None:
        """What follows from a checkpoint, again at a start, as a kill may have come between: mark and rotate."""
        if self.best_step == self.step:
            mark_best(checkpoint_path(self.run.checkpoints, self.step))
        rotate(self.run.checkpoints, self.settings.keep_last, set())

    def resume(self) -> None:
        """Take up the newest whole checkpoint, if there is one, and write run.json."""
        state = load_last(self.run.checkpoints)
        agree(self.accelerator, state["step"] if state else -1)
        before = self.run.known_facts()
        for part, key in (("backbone", "digest"), ("data", "fingerprint")):
            old, new = before.get(part, {}).get(key), self.facts[part][key]
            if state is not None and old and not same_fingerprint(str(old), str(new)):
                raise InputError(
                    f"{self.run.path} was started with another {part} ({key} {str(old)[:10]}, now "
                    f"{str(new)[:10]}): give that one, or another --out"
                )
        self.accelerator.wait_for_everyone()  # every process has read before one writes
        if self.run.writes:
            self.run.write_facts(self.facts)
            step, seen = (state["step"], state["evaluated_at"]) if state else (-1, -1)
            # an evaluation that its checkpoint does not know of is made, and written, again
            self.run.cut_metrics(step, lambda row: "lr" in row or row["step"] <= seen)
        if state is None:
            return
        self.step, self.evaluated_at = state["step"], state["evaluated_at"]
        self.best, self.best_step = state["best"], state["best_step"]
        if self.run.writes:
            forget_after(self.run.checkpoints, self.step)
            self.tidy()
        self.last = None if state["last"] is None else Evaluation(**state["last"])
        self.job.model.load_state_dict(state["model"])
        if self.job.average is not None:
            self.job.average.load_state_dict(state["average"])
        self.job.optimizer.load_state_dict(state["optimizer"])
        self.meters.load_state_dict(state["meters"])
        self.nonfinite_row = torch.tensor(state["nonfinite_row"], device=self.device)
        self.say(f"continuing {self.run.path} at step {self.step} of {self.job.total_steps}")

    def say(self, text: str) -> None:
        """One line on stderr, from the main process."""
        if self.accelerator.is_main_process:
            print(printable(text), file=sys.stderr)


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * model; buffers (batch statistics) are copied."""
    own: list[Tensor] = [p for p in average.parameters() if p.is_floating_point()]
    new: list[Tensor] = [p for p in model.parameters() if p.is_floating_point()]
    torch._foreach_lerp_(own, new, 1.0 - decay)
    for mine, theirs in zip(average.buffers(), model.buffers(), strict=True):
        mine.copy_(theirs)
