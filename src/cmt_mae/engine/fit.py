"""THE loop of every training, from top to bottom: pre-training, fine-tuning, segmentation, detection.

It knows no method: a ``Task`` (task.py) holds the model, its optimizer, its batches and how it is evaluated; a
``Trainer`` (trainer.py) takes its steps. Here: exact resume, signals, metrics, warnings, checkpoints.
"""

import math
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from cmt_mae.core.errors import InputError, Stopped
from cmt_mae.core.runs import RunDir
from cmt_mae.engine.meters import Bad
from cmt_mae.engine.processes import (
    agree,
    any_process,
    peak_memory,
    say,
    stopping_with_the_others,
    warn,
)
from cmt_mae.engine.progress import Forecast, training_bar
from cmt_mae.engine.signals import StopRequest
from cmt_mae.engine.task import Evaluation, LoopSettings, Task, falls_due
from cmt_mae.engine.trackers import Trackers
from cmt_mae.engine.trainer import Trainer


@dataclass
class Outcome:
    """What a training ended with."""

    row: dict[str, Any]
    """The last numbers of metrics.jsonl."""
    evaluation: Evaluation
    """The last one; kept in the last checkpoint, so a finished training is not evaluated again."""


def fit(
    settings: LoopSettings, task: Task, accelerator: Accelerator, run: RunDir, facts: dict[str, Any]
) -> Outcome:
    """Train, or continue, to the end.

    run: made but not claimed. facts: for run.json; the digests of ``backbone`` and ``teacher`` and the
    fingerprint of ``data`` in it may not change when a run is continued.
    Raises InputError (also for another backbone or other data) and Stopped after a signal.
    """
    with stopping_with_the_others(accelerator, run.path):
        accelerator.wait_for_everyone()  # no process writes before all have looked at the folder
        return _Fit(settings, task, accelerator, run, facts).run_to_the_end()


class _Fit:
    """One process of a training."""

    def __init__(
        self,
        settings: LoopSettings,
        task: Task,
        accelerator: Accelerator,
        run: RunDir,
        facts: dict[str, Any],
    ) -> None:
        self.settings, self.task, self.accelerator, self.run = settings, task, accelerator, run
        self.facts = facts
        self.trainer = Trainer(
            task, accelerator, parallel=settings.parallel, compiled=settings.compile
        )
        self.step, self.best, self.best_step = 0, -math.inf, -1
        self.has_checkpoint = False
        self.last, self.evaluated_at = Evaluation({}), -1
        self.row: dict[str, Any] = {}
        self.since = time.perf_counter()
        self.energy: Any = None  # of GPUs
        if accelerator.device.type == "cuda":
            from cmt_mae.engine.energy import GpuEnergy

            self.energy = GpuEnergy(accelerator.device)

    def run_to_the_end(self) -> Outcome:
        """Resume or start, then step to the end."""
        task, settings = self.task, self.settings
        self.run.claim()
        self.resume()
        task.begin(self.run)
        if self.trainer.no_compiler:
            text = f"compile cannot work here, going on without ({self.trainer.no_compiler})"
            warn(self.accelerator, self.run, self.step, text)
        self.trainer.enter(self.step)
        tracking = Trackers(self.run, settings.tracker, self.run.settings, self.step)
        bar = training_bar(settings.progress and self.accelerator.is_main_process)
        # closing ends the loader's processes here; left to the interpreter's exit, they would be waited for
        with (
            closing(task.batches(self.step)) as batches,
            StopRequest() as stop,
            tracking,
            bar,
            self.noting_the_end(),
        ):
            shown = bar.add_task(
                "", total=task.total_steps, completed=self.step, images_per_step=task.batch_size
            )
            if task.evaluates(self.step) and self.evaluated_at != self.step:
                self.evaluate(tracking)  # the untrained model, or what a kill has cut off
                if self.step:
                    self.checkpoint()
            self.since, self.trainer.waited = time.perf_counter(), 0.0
            forecast = Forecast(self.step, task.total_steps)
            while self.step < task.total_steps:
                self.take_step(batches)
                if text := forecast.text(self.step):
                    say(self.accelerator, text)
                if self.step % settings.log_every == 0 or self.step == task.total_steps:
                    bar.update(shown, description=self.log(tracking))
                bar.update(shown, completed=self.step)
                if self.evaluate_and_save(tracking, stop):
                    raise Stopped(
                        f"stopped at step {self.step} of {task.total_steps}, checkpoint written in "
                        f"{self.run.path}: run the same command to continue"
                    )
        return Outcome(self.row, self.last)

    def take_step(self, batches: Generator[Any, None, None]) -> None:
        """One optimizer step, in the stage that it belongs to."""
        if self.step == self.task.switch_step:
            self.trainer.enter(self.step)
        self.trainer.step(batches, self.step)
        self.step += 1

    def evaluate_and_save(self, tracking: Trackers, stop: StopRequest) -> bool:
        """Evaluation and checkpoint where they are due; whether to stop here."""
        task, step, settings = self.task, self.step, self.settings
        asked = any_process(self.accelerator, stop.asked)
        due, over = task.evaluates(step), step == task.total_steps
        if due and not (asked and task.long_evaluation):
            if task.long_evaluation:
                self.checkpoint()  # an evaluation that is cut off costs no training
            self.evaluate(tracking)
            asked = any_process(self.accelerator, stop.asked)
        if (
            asked
            or over
            or (due and task.long_evaluation)
            or falls_due(settings.checkpoint_every, step, task.steps_per_epoch)
            or task.keeps(step)
            or step == self.best_step
        ):
            self.checkpoint()
        return asked and not (over and (self.evaluated_at == step or not due))

    @contextmanager
    def noting_the_end(self) -> Iterator[None]:
        """What the user must fix before the run can go on is kept in its warnings too."""
        try:
            yield
        except InputError as error:
            with suppress(InputError):  # a full disk takes no note
                self.run.append_warning(self.step, f"the run ended: {error}")
            raise

    def log(self, tracking: Trackers) -> str:
        """One line of metrics; returns the text of the bar. The only time the host waits for the device."""
        task, trainer, every = self.task, self.trainer, self.settings.log_every
        means, nonfinite = trainer.meters.read()
        steps = self.step % every or every
        elapsed = time.perf_counter() - self.since
        self.row = {
            "step": self.step,
            "epoch": round(self.step / task.steps_per_epoch, 4),
            "lr": max(group["lr"] for group in task.optimizer.param_groups),
            **{name: means[name] for name in sorted(means)},
            "skipped_steps": round(means["skipped_steps"] * steps),
            **task.entries(means, self.step),
            "images_per_second": round(steps * task.batch_size / elapsed, 2),
            "data_wait_share": round(min(1.0, trainer.waited / elapsed), 4),
            "peak_memory_gb": round(peak_memory(self.accelerator.device), 3),
        }
        if self.energy is not None:
            joules = self.energy.read_all(self.accelerator)
            self.row |= {} if joules is None else {"gpu_joules": round(joules, 1)}
        self.since, trainer.waited = time.perf_counter(), 0.0
        tracking.write(self.row)
        self.check_numbers(nonfinite)
        task.check(self.row, self.run)
        epochs = task.total_steps / task.steps_per_epoch
        losses = [(n, v) for n, v in self.row.items() if n == "loss" or n.startswith("loss_")]
        stage = f"stage {self.row['stage']} " if "stage" in self.row else ""
        text = " ".join(f"{name.removeprefix('loss_')} {value:.3f}" for name, value in losses)
        return f"{stage}epoch {self.row['epoch']:.1f}/{epochs:.3g} {text}"

    def check_numbers(self, nonfinite: dict[str, Bad]) -> None:
        """Name what was not finite and where it began; raise InputError where it does not end."""
        in_a_row = int(self.trainer.nonfinite_row.item())
        culprit = "gradient"
        if nonfinite:
            from cmt_mae.engine.finiteness import name_culprit

            culprit = name_culprit(self.trainer, nonfinite)
            numbers = ", ".join(f"{name} ({bad.count})" for name, bad in nonfinite.items())
            text = (
                f"{self.row['skipped_steps']} step(s) up to step {self.step} skipped, not finite: first "
                f"{culprit}; all: {numbers}"
            )
            warn(self.accelerator, self.run, self.step, text)
        if in_a_row >= self.settings.max_nonfinite:
            raise InputError(
                f"{in_a_row} steps in a row up to step {self.step} had a loss or gradient that is not finite "
                f"(first: {culprit}); the last checkpoint in {self.run.path} is good: lower the learning rate or "
                "clip the gradient"
            )

    def evaluate(self, tracking: Trackers) -> None:
        """Measure the model; where it is the best so far, this step's checkpoint will be marked."""
        from cmt_mae.engine.compiling import uncompiled

        begin = time.perf_counter()
        self.task.model.eval()
        with torch.no_grad(), uncompiled():
            self.last = self.task.evaluate(self.step, self.run)
        self.task.model.train()
        self.evaluated_at = self.step
        metrics = self.last.metrics
        if metrics:
            shown = ", ".join(f"{k} {v:.2f}" for k, v in list(metrics.items())[:4])
            say(self.accelerator, f"step {self.step}: {shown}")
            named = {f"{self.task.prefix}{name}": value for name, value in metrics.items()}
            tracking.write({"step": self.step, **named})
            self.row |= named
        value = metrics.get(self.task.headline, -math.inf)
        if value > self.best and self.step > 0:  # the untrained model has no checkpoint
            self.best, self.best_step = value, self.step
        self.since += time.perf_counter() - begin

    def checkpoint(self) -> None:
        """Write everything that continuing needs; forget old checkpoints.

        Raises InputError, and writes nothing, where a weight is not finite: it would stay so for ever.
        """
        from cmt_mae.core.checkpoint import save_checkpoint
        from cmt_mae.engine.finiteness import bad_weights_of_all

        spoilt = bad_weights_of_all(self.task.networks(), self.accelerator)
        if spoilt:
            raise InputError(
                f"{len(spoilt)} weight(s) were not finite at step {self.step} (first: {spoilt[0]}): no checkpoint "
                f"was written, the last one in {self.run.path} is good: run the same command to continue from it"
            )
        state = self.trainer.state_dict()
        if self.run.writes:
            self.run.settle()
        # before the checkpoint: a kill between would leave a finished run with older files
        self.task.publish(self.step, self.run)
        if self.run.writes:
            place = {
                "step": self.step,
                "best": self.best,
                "best_step": self.best_step,
                "evaluated_at": self.evaluated_at,
                "last": {"metrics": self.last.metrics, "details": self.last.details},
                "run": self.run.path.resolve().name,
                "settings": self.run.settings,
            }
            save_checkpoint(self.run.checkpoints, self.step, {**place, **state})
            if not self.has_checkpoint:
                self.run.note(has_checkpoint=True)
                self.has_checkpoint = True
            self.tidy()
        self.accelerator.wait_for_everyone()

    def tidy(self) -> None:
        """What follows from a checkpoint, again at a start, as a kill may have come between: mark and rotate."""
        from cmt_mae.core.checkpoint import checkpoint_path, mark_best, rotate

        if self.best_step == self.step:
            mark_best(checkpoint_path(self.run.checkpoints, self.step))
        rotate(self.run.checkpoints, self.settings.keep_last, self.task.keeps)

    def resume(self) -> None:
        """Load the newest whole checkpoint, if there is one, and write run.json."""
        state = None
        if self.run.checkpoints.exists():
            from cmt_mae.core.checkpoint import load_last

            state = load_last(self.run.checkpoints)
        agree(self.accelerator, state["step"] if state else -1)
        known = self.run.known_facts()
        if state is not None:
            from cmt_mae.core.continuing import refuse_other_facts, refuse_other_settings

            if not known:
                text = f"{self.run.path}/run.json is missing: data and teacher are not compared"
                say(self.accelerator, f"warning: {text}")
            refuse_other_settings(self.run, state)
            refuse_other_facts(self.run.path, known, self.facts)
        self.accelerator.wait_for_everyone()  # every process has read before one writes
        # of a checkpoint of version 0.1's pre-training, which evaluated before it was written
        seen = state.get("evaluated_at", state["step"]) if state else -1
        placement = self.placement()
        if self.run.writes:
            facts = {**self.facts, "placement": placement, "has_checkpoint": state is not None}
            self.run.write_facts(facts)
            # an evaluation that its checkpoint does not know of is made, and written, again
            step = state["step"] if state else -1
            self.run.cut_metrics(step, lambda row: "lr" in row or row["step"] <= seen)
        if state is not None:
            self.go_on_from(state, seen, known.get("placement", {}), placement)

    def go_on_from(
        self, state: dict[str, Any], seen: int, before: dict[str, Any], placement: dict[str, Any]
    ) -> None:
        """Go on from a checkpoint, and say so. seen: step of its last evaluation; before: placement back then."""
        from cmt_mae.core.checkpoint import forget_after

        self.has_checkpoint = True
        self.step, self.evaluated_at = state["step"], seen
        self.best, self.best_step = state["best"], state["best_step"]
        self.last = Evaluation(**(state.get("last") or {"metrics": {}}))
        if self.run.writes:
            forget_after(self.run.checkpoints, self.step)
            self.tidy()
        self.trainer.load_state_dict(state)
        rows = self.run.read_metrics()
        self.row = rows[-1] if rows else {}
        changes = [
            f"{name} {before[name]} -> {now}"
            for name, now in placement.items()
            if before.get(name, now) != now
        ]
        changed = f"; changed since the last start: {', '.join(changes)}" if changes else ""
        place = f"step {self.step} of {self.task.total_steps}"
        name = self.run.path.resolve().name
        of = state.get("run", name)
        taken = "" if of == name else f", by a checkpoint of run {of}"
        say(self.accelerator, f"continuing {self.run.path} at {place}{taken}{changed}")

    def placement(self) -> dict[str, Any]:
        """How the work lies on the machines; it may change when a run is continued."""
        return {
            "processes": self.accelerator.num_processes,
            "parallel": self.settings.parallel,
            "device": self.accelerator.device.type,
            "micro_batch": self.task.micro_batch,
            "accumulation": self.task.accumulation,
        }
