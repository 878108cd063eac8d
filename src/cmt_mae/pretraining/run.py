"""The pre-training loop, readable from top to bottom. Settings are in settings.py, one step in stepping.py."""

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any

from accelerate import Accelerator

from cmt_mae.core.checkpoint import (
    checkpoint_path,
    forget_after,
    list_checkpoints,
    load_last,
    mark_best,
    rotate,
    save_checkpoint,
)
from cmt_mae.core.errors import InputError, Stopped
from cmt_mae.core.runs import RunDir, plain
from cmt_mae.data.loader import pretrain_batches
from cmt_mae.data.source import Source
from cmt_mae.engine import compiling
from cmt_mae.engine.collapse import signs
from cmt_mae.engine.energy import GpuEnergy
from cmt_mae.engine.processes import (
    agree,
    any_process,
    make_accelerator,
    peak_memory,
    stopping_with_the_others,
)
from cmt_mae.engine.progress import training_bar
from cmt_mae.engine.sharding import whole
from cmt_mae.engine.signals import StopRequest
from cmt_mae.engine.trackers import Trackers
from cmt_mae.evaluate.online import OnlineProbe
from cmt_mae.method.masking import noise_length
from cmt_mae.pretraining import assemble
from cmt_mae.pretraining.costing import cost_of, joules_of_all
from cmt_mae.pretraining.picturing import draw_attention
from cmt_mae.pretraining.settings import RESUME_SAFE_SETTINGS, PretrainConfig
from cmt_mae.pretraining.stepping import Plan, Stepper, make_plan
from cmt_mae.pretraining.watching import Watch, say
from cmt_mae.pretraining.writing import as_backbone, save_student

ENOUGH_SEEN = (
    1000  # images after which the share of broken ones is judged (an epoch where it is shorter)
)


def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Run, or continue, pre-training; returns the last metrics.

    Writes the run directory ``config.out`` (design section 5). Raises InputError for what the user can mend
    and Stopped when a signal asked for the end; both leave a checkpoint to continue from.
    """
    config.check()
    runtime = config.runtime
    accelerator = make_accelerator(runtime.device, config.precision, runtime.deterministic)
    source = config.data.open_train()
    plan = make_plan(config, len(source), accelerator.num_processes)
    run = RunDir(
        config.out,
        plain(config),
        RESUME_SAFE_SETTINGS,
        writes=accelerator.is_main_process,
        defaults=plain(PretrainConfig()),
    )
    keep_range(source, run)
    try:
        with stopping_with_the_others(accelerator, run.path):
            accelerator.wait_for_everyone()  # nobody writes before everybody has looked at the folder
            return Training(config, accelerator, source, plan, run).run_to_the_end()
    finally:
        run.close()


def keep_range(source: Source, run: RunDir) -> None:
    """A run that is continued reads images of more than 8 bits as it did; older ones by all of 16 bits."""
    if list_checkpoints(run.checkpoints) and (known := run.known_facts().get("data")):
        before = known.get("range")
        source.limits = (float(before[0]), float(before[1])) if before else None


class Training:
    """One process of a run."""

    def __init__(
        self,
        config: PretrainConfig,
        accelerator: Accelerator,
        source: Source,
        plan: Plan,
        run: RunDir,
    ) -> None:
        self.config, self.accelerator, self.source, self.plan, self.run = (
            config,
            accelerator,
            source,
            plan,
            run,
        )
        self.stats = assemble.statistics(config, source)
        teacher, self.teacher_backbone = assemble.build_teacher(config, self.stats)
        self.crops = assemble.crop_settings(config, teacher)
        self.stepper = Stepper(
            config, accelerator, plan,
            assemble.build_learner(config, teacher), assemble.build_guides(config, teacher, self.stats),
        )  # fmt: skip
        self.step, self.best, self.best_step = 0, -1.0, -1
        self.watch = Watch(config, accelerator, self.stepper, len(source), run)
        self.last_row: dict[str, Any] = {}
        self.placed_before: dict[str, Any] = {}  # placement at the start before this one
        self.since = time.perf_counter()
        self.energy = GpuEnergy(accelerator.device)

    def run_to_the_end(self) -> dict[str, Any]:
        """Resume or start, then step to the end."""
        self.run.claim()
        config, plan, runtime = self.config, self.plan, self.config.runtime
        probe = OnlineProbe.open(runtime.probe_data, config.data.range, config.data.val_share)
        self.resume(probe)
        self.open_store()
        self.announce()
        if self.stepper.no_compiler:
            self.watch.warn(
                self.step,
                f"runtime.compile cannot work here, going on without ({self.stepper.no_compiler})",
            )
        self.stepper.enter_stage(self.step)
        main = self.accelerator.is_main_process
        tracking = Trackers(self.run, runtime.tracker, plain(config), self.step)
        bar = training_bar(runtime.progress and main)
        # closing ends the loader's processes here; left to the interpreter's exit, they would be waited for
        others = stopping_with_the_others(self.accelerator, self.run.path)
        end = self.noting_the_end()
        with (
            closing(self.open_batches()) as batches,
            StopRequest() as stop,
            tracking,
            bar,
            others,
            end,
        ):
            task = bar.add_task(
                "", total=plan.total_steps, completed=self.step, images_per_step=config.batch_size
            )
            if probe and self.step == 0:
                self.measure(
                    probe, tracking
                )  # what training adds is known against the untrained student
            self.since, self.stepper.waited = time.perf_counter(), 0.0
            while self.step < plan.total_steps:
                if self.step == plan.switch_step:
                    self.stepper.enter_stage(self.step)
                for index, name, reason in self.stepper.step(batches, self.step):
                    self.watch.bad.setdefault(index, (name, reason))
                self.step += 1
                if self.step % runtime.log_every == 0 or self.step == plan.total_steps:
                    bar.update(task, description=describe(self.log(tracking), plan))
                bar.update(task, completed=self.step)
                if probe and self.falls_due(runtime.probe_every):
                    self.measure(probe, tracking)
                if self.falls_due(runtime.picture_every) or self.step in (
                    plan.switch_step,
                    plan.total_steps,
                ):
                    self.picture()
                asked = any_process(self.accelerator, stop.asked)
                if (
                    asked
                    or self.falls_due(runtime.checkpoint_every)
                    or self.step in (plan.total_steps, self.best_step)
                    or (runtime.keep_switch and self.step == plan.switch_step)
                ):
                    self.checkpoint()
                if asked and self.step < plan.total_steps:
                    raise Stopped(
                        f"stopped at step {self.step} of {plan.total_steps}, checkpoint written in "
                        f"{self.run.path}: run the same command to continue"
                    )
        return self.last_row

    @contextmanager
    def noting_the_end(self) -> Iterator[None]:
        """What the user must mend before the run can go on is kept in its warnings too."""
        try:
            yield
        except InputError as error:
            with suppress(InputError):  # a full disk takes no note
                self.run.append_warning(self.step, f"the run ended: {error}")
            raise

    def open_batches(self) -> Any:
        """Batches from the current step on, for this process."""
        processes = self.accelerator.num_processes
        return pretrain_batches(
            self.source,
            self.crops,
            noise_length=noise_length(self.config.mask.rule, self.plan.n_patches),
            seed=self.config.seed,
            batch_size=self.config.batch_size,
            micro_batch=self.plan.micro_batch,
            rank=self.accelerator.process_index,
            world=processes,
            workers=assemble.worker_count(self.config.data.workers, processes),
            start_step=self.step,
            pin_memory=self.accelerator.device.type == "cuda",
            timeout_s=self.config.data.timeout_s,
            photo_wanted=None if self.stepper.store is None else self.stepper.store.wanted(),
        )

    def falls_due(self, every: float) -> bool:
        """Whether a thing done every so many epochs falls on this step; never for 0."""
        steps = max(1, round(every * self.plan.steps_per_epoch))
        return every > 0 and (self.step % steps == 0 or self.step == self.plan.total_steps)

    def log(self, tracking: Trackers) -> dict[str, Any]:
        """One line of metrics. Reading the meters is the only time the host waits for the device."""
        means, nonfinite = self.stepper.meters.read()
        every = self.config.runtime.log_every
        steps = self.step % every or every
        elapsed = time.perf_counter() - self.since
        row = {
            "step": self.step,
            "epoch": round(self.step / self.plan.steps_per_epoch, 4),
            "stage": 1 if self.step <= self.plan.switch_step else 2,
            "lr": self.stepper.optimizer.param_groups[0]["lr"],
            **{name: means[name] for name in sorted(means)},
            "skipped_steps": round(means["skipped_steps"] * steps),
            "collapse_signs": len(signs(means)),
            "images_per_second": round(steps * self.config.batch_size / elapsed, 1),
            "data_wait_share": round(min(1.0, self.stepper.waited / elapsed), 4),
            "peak_memory_gb": round(peak_memory(self.accelerator.device), 3),
        }
        joules = joules_of_all(self.accelerator, self.energy.read())
        if joules is not None:
            row["gpu_joules"] = round(joules, 1)
        self.since, self.stepper.waited = time.perf_counter(), 0.0
        tracking.write(row)
        self.last_row = row
        self.watch.collapse(row, self.step)
        self.watch.numbers(nonfinite, row["skipped_steps"], self.step)
        self.watch.images(self.step)
        return row

    def measure(self, probe: OnlineProbe, tracking: Trackers) -> None:
        """k-NN accuracy of the student so far; where it is the best, this step's checkpoint will be marked."""
        learner = self.stepper.learner
        learner.eval()
        with compiling.uncompiled():
            student = self.stepper.whole_student()
            accuracy = probe.measure(
                as_backbone(self.config, student, self.stats), self.accelerator
            )
        learner.train()
        tracking.write({"step": self.step, "knn_top1": accuracy})
        self.last_row["knn_top1"] = accuracy
        if accuracy > self.best and self.step > 0:  # the untrained student has no checkpoint
            self.best, self.best_step = accuracy, self.step

    def picture(self) -> None:
        """Image, maps and mask of the first few images, centre crops."""
        with whole(self.stepper.guides.running()):
            if self.run.writes:
                draw_attention(
                    self.stepper, self.source, self.crops, self.step, self.run.path / "pictures"
                )

    def checkpoint(self) -> None:
        """Write everything that continuing needs, and the student alone; forget old checkpoints.

        Raises InputError, and writes nothing, where a weight is not finite: it would stay so for ever.
        """
        spoilt = [name for name in self.watch.bad_weights() if not name.startswith("teacher.")]
        if spoilt:
            raise InputError(
                f"{len(spoilt)} weight(s) were not finite at step {self.step} (first: {spoilt[0]}): no checkpoint "
                f"was written, the last one in {self.run.path} is good: run the same command to continue from it"
            )
        student, average = self.stepper.whole_student(), self.stepper.whole_momentum()
        bad = {index: list(entry) for index, entry in self.watch.all_bad().items()}
        state = self.stepper.state_dict()
        if self.run.writes:
            self.run.settle()
            # before the checkpoint: a kill between would leave a finished run with an older student
            save_student(
                self.run.path,
                self.config,
                student,
                self.stats,
                self.facts(),
                "",
            )
            if average is not None:
                save_student(
                    self.run.path, self.config, average, self.stats, self.facts(), "_momentum"
                )
            place = {"step": self.step, "best": self.best, "best_step": self.best_step, "bad": bad}
            save_checkpoint(self.run.checkpoints, self.step, {**place, **state})
            self.tidy()
        self.accelerator.wait_for_everyone()

    def open_store(self) -> None:
        """The teacher's outputs so far, where they are kept."""
        store = assemble.teacher_store(
            self.config,
            self.stepper.guides.teacher,
            self.source,
            self.accelerator,
            self.teacher_backbone,
        )
        if store is None:
            return
        if self.run.writes:
            store.create()
        self.accelerator.wait_for_everyone()
        store.open()
        self.stepper.store = store
        say(
            self.accelerator,
            f"the teacher's outputs of {store.pictures} pictures take {store.bytes / 1e9:.2f} GB in "
            f"{store.folder}; {store.count()} are there",
        )

    def tidy(self) -> None:
        """What follows from a checkpoint, again at a start, as a kill may have come between: mark and rotate."""
        folder, runtime = self.run.checkpoints, self.config.runtime
        if self.best_step == self.step:
            mark_best(checkpoint_path(folder, self.step))
        every = round(runtime.keep_every * self.plan.steps_per_epoch)
        kept = set(range(0, self.step + 1, every)) if every else set()
        if runtime.keep_switch:
            kept.add(self.plan.switch_step)
        rotate(folder, runtime.keep_last, kept)

    def resume(self, probe: OnlineProbe | None) -> None:
        """Take up the newest whole checkpoint, if there is one, and write run.json."""
        state = load_last(self.run.checkpoints)
        agree(self.accelerator, state["step"] if state else -1)  # all have read before one writes
        facts = self.facts()
        known = self.run.known_facts()
        self.placed_before = known.get("placement", {})
        if state is not None and not self.source.is_data_of(
            known.get("data", {}).get("fingerprint")
        ):
            raise InputError(
                f"{self.config.data.path} no longer holds the images that {self.run.path} was started with: give "
                "those, or another --out"
            )
        if self.run.writes:
            more: dict[str, Any] = {"plan": vars(self.plan), "placement": self.placement()}
            more["cost"] = cost_of(self.stepper)
            if probe is not None:
                more["probe"] = {"train": len(probe.train), "val": len(probe.val)}
            self.run.write_facts({**facts, **more})
            self.run.cut_metrics(state["step"] if state else -1)
        if state is not None:
            self.step, self.best = state["step"], state["best"]
            self.best_step = state["best_step"]
            if self.run.writes:
                forget_after(self.run.checkpoints, self.step)
                self.tidy()
            self.watch.bad = {
                int(index): (entry[0], entry[1]) for index, entry in state["bad"].items()
            }
            self.stepper.load_state_dict(state)
            rows = self.run.read_metrics()
            self.last_row = rows[-1] if rows else {}

    def facts(self) -> dict[str, Any]:
        """What run.json and the header of the backbone say."""
        teacher, source = self.teacher_backbone, self.source
        return {
            "step": self.step,
            "epochs": self.config.epochs,
            "seed": self.config.seed,
            "data": {
                "path": self.config.data.path,
                "images": len(source),
                "fingerprint": source.fingerprint(),
                "range": source.limits and list(source.limits),
                "held_out": self.config.data.val_share,
                "left_out": dict(source.left_out),
            },
            "teacher": None
            if teacher is None
            else {
                "name": self.config.teacher.name,
                "source": teacher.source,
                "licence": teacher.licence,
                "digest": teacher.digest,
            },
        }

    def placement(self) -> dict[str, Any]:
        """How the work lies on the machines; it may change when a run is continued."""
        return {
            "processes": self.accelerator.num_processes,
            "parallel": self.config.runtime.parallel,
            "device": self.accelerator.device.type,
            "micro_batch": self.plan.micro_batch,
            "accumulation": self.plan.accumulation,
        }

    def announce(self) -> None:
        """What is about to run, once."""
        config, plan = self.config, self.plan
        if self.step:
            before = self.placed_before
            changes = [
                f"{name} {before[name]} -> {now}"
                for name, now in self.placement().items()
                if before.get(name, now) != now
            ]
            changed = f"; changed since the last start: {', '.join(changes)}" if changes else ""
            say(
                self.accelerator,
                f"continuing {self.run.path} at step {self.step} of {plan.total_steps}{changed}",
            )
        say(
            self.accelerator,
            f"{len(self.source)} images, {plan.total_steps} steps of {config.batch_size} "
            f"(stage one: {plan.switch_step}), lr {config.optim.blr:g} x {config.batch_size}/256 = {plan.lr:g}, "
            f"{plan.n_mask} of {plan.n_patches} patches hidden, "
            f"{assemble.trainable(self.stepper.learner) / 1e6:.1f} M trainable parameters, "
            f"{self.accelerator.device}, {self.stepper.precision}, "
            f"{self.accelerator.num_processes} process(es), seed {config.seed}",
        )
        if self.teacher_backbone is not None:
            teacher = self.teacher_backbone
            say(
                self.accelerator,
                f"teacher: {teacher.source}; licence of its weights: {teacher.licence or 'not stated'}",
            )


def describe(row: dict[str, Any], plan: Plan) -> str:
    """Text of the progress bar."""
    parts = [(n.removeprefix("loss_"), v) for n, v in row.items() if n.startswith("loss_")]
    losses = " ".join(f"{name} {value:.3f}" for name, value in parts)
    epochs = plan.total_steps / plan.steps_per_epoch
    return f"stage {row['stage']} epoch {row['epoch']:.1f}/{epochs:.3g} {losses}"
