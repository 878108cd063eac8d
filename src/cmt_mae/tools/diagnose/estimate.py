"""Time, memory and disk of a run on this machine, from a few of its real steps, not from a table.

Each stage's step is timed with the run's own images, loader and networks. Where a whole step
would take too long, two smaller ones are timed and the line through them is followed: a step costs a fixed part
(optimizer, moving average) and a part for each image. Checkpoints and k-NN measurements are timed too. Not
counted: imports, and pictures.
"""

import dataclasses
import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from cmt_mae.core.checkpoint import save_checkpoint
from cmt_mae.data.loader import Batch
from cmt_mae.data.source import Source
from cmt_mae.engine.trainer import Trainer
from cmt_mae.evaluate.features import extract, open_labelled
from cmt_mae.evaluate.knn import PROBE_POOL
from cmt_mae.pretraining import assembly
from cmt_mae.pretraining.plan import Plan, make_plan
from cmt_mae.pretraining.settings import PretrainConfig
from cmt_mae.pretraining.student_files import as_backbone, save_student
from cmt_mae.pretraining.task import Pretraining
from cmt_mae.tools.bench import measure
from cmt_mae.tools.bench.build import frozen_backbone, make_trainer
from cmt_mae.tools.bench.command import open_batches
from cmt_mae.tools.diagnose.machine import nearest

ROUNDS, WARM = 3, 2
"""Timings of which the median counts, after the steps that `measure.rates` does not time."""
FIRST = 4  # images in the step that tells how large a step can be measured
PREFETCHED = 4  # batches that each loader process keeps ready (data.workers)
DRAIN_S = 6.0
PROBED = 96  # images through the k-NN measurement


@dataclasses.dataclass
class Size:
    """One measured step size of one stage."""

    images: int
    seconds: float
    low: float
    high: float
    waits: float
    """Share of the time spent waiting for images."""
    memory_gb: float
    """At the peak."""
    kept_gb: float
    """What the forward pass keeps for the backward pass; it grows with the images."""


def estimate(
    config: PretrainConfig, source: Source | None, images: int, seconds: float
) -> dict[str, Any]:
    """Measure this run's steps and say what all of it takes, in one process.

    source: its images; None: synthetic ones, ``images`` of them in an epoch. seconds: how long each stage is
    measured, about. Returns plain numbers; "out_of_memory" instead of most of them where a step does not fit.
    Raises InputError for settings that cannot work.
    """
    begin = time.perf_counter()
    plan = make_plan(config, images, 1)
    backbone = frozen_backbone(config) if config.needs_teacher() else None
    small = resized(config, min(FIRST, config.batch_size))
    trainer, task = make_trainer(small, backbone, len(source) if source else None)
    facts: dict[str, Any] = {
        "images": images,
        "synthetic": source is None,
        "total_steps": plan.total_steps,
        "stage_one_steps": plan.switch_step,
        "steps_per_epoch": plan.steps_per_epoch,
        "batch_size": config.batch_size,
        "start_seconds": round(time.perf_counter() - begin, 2),
        "threads": torch.get_num_threads(),
        "stages": {},
    }
    try:
        for name, count in stages_of(plan):
            trainer.enter(0 if name == "one" else task.switch_step)
            facts["stages"][name] = {
                "steps": count,
                **measure_stage(config, trainer, task, source, plan, name, seconds),
            }
    except (MemoryError, torch.OutOfMemoryError) as error:
        return {**facts, "out_of_memory": " ".join(str(error).split())[:200]}
    facts["checkpoint"] = time_checkpoint(config, trainer, task, plan)
    facts["probe"] = time_probe(config, task, plan)
    return {**facts, **total(facts)}


def stages_of(plan: Plan) -> Iterator[tuple[str, int]]:
    """(name, steps) of the stages that this run has."""
    if plan.switch_step:
        yield "one", plan.switch_step
    if plan.switch_step < plan.total_steps:
        yield "two", plan.total_steps - plan.switch_step


def resized(config: PretrainConfig, images: int) -> PretrainConfig:
    """The same run with steps of so many images, taken at once."""
    runtime = dataclasses.replace(config.runtime, micro_batch=images)
    return dataclasses.replace(config, batch_size=images, runtime=runtime)


def measure_stage(
    config: PretrainConfig,
    trainer: Trainer,
    task: Pretraining,
    source: Source | None,
    plan: Plan,
    name: str,
    seconds: float,
) -> dict[str, Any]:
    """Seconds and memory of a whole step of one stage."""
    step = 0 if name == "one" else task.switch_step

    def size(images: int, expected: float, budget: float) -> Size:
        part = resized(config, images)
        return measure_size(part, trainer, task, source, step, expected, budget)

    first = min(FIRST, plan.micro_batch)
    tried = size(first, math.inf, 0.0)
    fits = (
        first * seconds / (tried.seconds * (ROUNDS + WARM))
    )  # images of a step that fits into the time
    if (
        plan.micro_batch == config.batch_size <= 2 * fits
    ):  # the step itself, even if it takes a little longer
        sizes = [size(plan.micro_batch, tried.seconds * plan.micro_batch / first, seconds)]
    else:
        largest = min(plan.micro_batch, max(2, int(fits)))
        counts = sorted({max(1, largest // 4), largest})  # far apart, as the times are noisy
        sizes = [size(one, tried.seconds * one / first, seconds / 2) for one in counts]
    whole = at(sizes, config.batch_size, lambda one: one.seconds)
    top = sizes[-1]
    return {
        "measured_images": [one.images for one in sizes],
        "measured_seconds": [round(one.seconds, 5) for one in sizes],
        "extrapolated": top.images < config.batch_size,
        "step_seconds": whole,
        "step_seconds_range": [whole * top.low / top.seconds, whole * top.high / top.seconds],
        "images_per_second": round(config.batch_size / whole, 2),
        "data_wait_share": round(top.waits, 4),
        "memory_gb": round(
            top.memory_gb + top.kept_gb / top.images * (plan.micro_batch - top.images), 3
        ),
    }


def at(sizes: list[Size], images: int, number: Any) -> float:
    """A number of a step with so many images: measured, or on the line through two measured ones.

    The line never falls: noise must not make more images cheaper. One size alone: in proportion.
    """
    top = sizes[-1]
    if images <= top.images:
        return float(number(top))
    if len(sizes) == 1:
        return float(number(top)) * images / top.images
    slope = (number(top) - number(sizes[0])) / (top.images - sizes[0].images)
    return float(number(top) + max(0.0, slope) * (images - top.images))


def measure_size(
    config: PretrainConfig,
    trainer: Trainer,
    task: Pretraining,
    source: Source | None,
    step: int,
    expected: float,
    seconds: float,
) -> Size:
    """Time steps of ``config.batch_size`` images for about so many seconds; 0: one step.

    expected: seconds that a step is likely to take.
    """
    images = config.batch_size
    task.plan.micro_batch = images
    steps = max(1, int(seconds / (ROUNDS + WARM) / expected))
    with closing(open_batches(config, task, source)) as batches:
        if source is not None:
            drain(batches, assembly.worker_count(config.data.workers, 1))
        measure.forget_peak(task.device)
        kept = kept_gb(trainer, task, next(batches), step)
        timed = measure.rates(trainer, batches, step, images, ROUNDS if seconds else 1, steps)
    spread = timed["step_seconds"]
    return Size(
        images, spread["median"], spread["low"], spread["high"], timed["data_wait_share"],
        measure.peak_gb(task.device), kept,
    )  # fmt: skip


def drain(batches: Iterator[Batch], workers: int) -> None:
    """Take what the loader has made ahead, so that timed steps meet it at the pace it can keep."""
    begin = time.perf_counter()
    for _ in range(PREFETCHED * workers):
        next(batches)
        if time.perf_counter() - begin > DRAIN_S:
            return


def kept_gb(trainer: Trainer, task: Pretraining, batch: Batch, step: int) -> float:
    """GB that the forward pass of these images keeps for the backward pass, weights left out.

    Counted, since the memory of a process is almost the same for small steps: what was freed is used again.
    """
    weights = {p.untyped_storage().data_ptr() for p in task.learner.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        trainer.accelerator.autocast(),
    ):
        task.loss(trainer.model, batch, step)
    return sum(kept.values()) / 1e9


def time_checkpoint(
    config: PretrainConfig, trainer: Trainer, task: Pretraining, plan: Plan
) -> dict[str, Any]:
    """Write one checkpoint beside the run-to-be and take it away: seconds, size, number, and disk needed."""
    with tempfile.TemporaryDirectory(dir=nearest(config.out), prefix=".cmt-mae-doctor-") as folder:
        begin = time.perf_counter()
        path = save_checkpoint(Path(folder), 0, trainer.state_dict())
        save_student(Path(folder), config, task.learner.student, assembly.IMAGENET, {}, "")
        seconds = time.perf_counter() - begin
        size = path.stat().st_size
        backbone = (Path(folder) / "backbone.safetensors").stat().st_size
    every = max(1, round(config.runtime.checkpoint_every * plan.steps_per_epoch))
    written = math.ceil(plan.total_steps / every)
    for_good = 0
    if config.runtime.keep_every:
        for_good = int(config.epochs / config.runtime.keep_every)
    kept = min(written, config.runtime.keep_last + for_good + 1)  # one more while it is written
    return {
        "seconds": round(seconds, 3),
        "gb": round(size / 1e9, 6),
        "written": written,
        "disk_gb": round((kept * size + 2 * backbone) / 1e9, 3),
    }


def time_probe(config: PretrainConfig, task: Pretraining, plan: Plan) -> dict[str, Any]:
    """Seconds of one k-NN measurement, from the features of a few images, and how many there will be."""
    runtime = config.runtime
    if not runtime.probe_data or runtime.probe_every <= 0:
        return {"seconds": 0.0, "measured": 0}
    train, val = open_labelled(runtime.probe_data, config.data.range, config.data.val_share)
    images = len(train) + len(val)
    some = train.subset(range(min(PROBED, len(train))))
    backbone = as_backbone(config, task.learner.student, assembly.IMAGENET)
    begin = time.perf_counter()
    extract(backbone, some, device=task.device, pools=(PROBE_POOL,))
    each = (time.perf_counter() - begin) / len(some)
    task.learner.train()
    every = max(1, round(runtime.probe_every * plan.steps_per_epoch))
    measured = 1 + math.ceil(plan.total_steps / every)  # once before the first step
    return {"seconds": round(each * images, 2), "measured": measured}


def total(facts: dict[str, Any]) -> dict[str, Any]:
    """Seconds of all of it with the range of the measured rounds, and the most memory."""
    stages = facts["stages"].values()
    beside = facts["start_seconds"]
    beside += facts["checkpoint"]["seconds"] * facts["checkpoint"]["written"]
    beside += facts["probe"]["seconds"] * facts["probe"]["measured"]
    return {
        "seconds": beside + sum(one["steps"] * one["step_seconds"] for one in stages),
        "seconds_range": [
            beside + sum(one["steps"] * one["step_seconds_range"][end] for one in stages)
            for end in (0, 1)
        ],
        "seconds_beside_steps": round(beside, 1),
        "memory_gb": max(one["memory_gb"] for one in stages),
    }
