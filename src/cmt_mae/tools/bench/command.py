"""`cmt-mae bench`: speed of a recipe's step on this machine, stage by stage."""

import copy
import sys
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from cmt_mae.core.errors import InputError
from cmt_mae.core.files import write_json
from cmt_mae.core.runs import environment, plain
from cmt_mae.core.settings import Count, CountOrNone, check_fields
from cmt_mae.core.text import printable
from cmt_mae.data.loader import Batch, pretrain_batches
from cmt_mae.data.source import Source
from cmt_mae.engine.processes import make_accelerator
from cmt_mae.engine.trainer import Trainer
from cmt_mae.method.masking import noise_length
from cmt_mae.pretraining import assembly
from cmt_mae.pretraining.settings import PretrainConfig
from cmt_mae.pretraining.start import take_shape
from cmt_mae.pretraining.task import Pretraining
from cmt_mae.tools.bench import measure
from cmt_mae.tools.bench.build import frozen_backbone, make_task, synthetic_batches
from cmt_mae.tools.bench.flops import flop_per_image
from cmt_mae.tools.bench.peak import peak_flops


@dataclass
class BenchConfig(PretrainConfig):
    """Measure the step of a run: all settings of `pretrain`, and these.

    Nothing is trained. Without `data.path` the images are synthetic. A teacher that would be downloaded has
    random weights. `out` is a JSON file, or a folder that gets bench.json; empty: nothing is written.
    """

    images: CountOrNone = 0
    """Images in a measured step of one process; 0: runtime.micro_batch, else batch_size, but at most 256 on a
    GPU and 16 on a CPU."""
    rounds: Count = 7
    """Timings of which the median counts."""
    steps: CountOrNone = 0
    """Steps in a timing; 0: 10 on a GPU, 2 on a CPU."""
    stages: Literal["both", "one", "two"] = "both"
    """both | one | two."""
    peak: Literal["auto", "measured"] = "auto"
    """auto (the data sheet of known GPUs in bf16, else measured) | measured (by a large matrix product)."""

    def run_settings(self) -> PretrainConfig:
        """The run itself, with a batch of ``images``. Raises InputError for settings that cannot work."""
        given = {
            item.name: copy.deepcopy(getattr(self, item.name)) for item in fields(PretrainConfig)
        }
        run = PretrainConfig(**given)
        run.out = run.out or "bench"
        run.data.path = run.data.path or "synthetic images"
        take_shape(run)
        run.check()
        check_fields(self)
        on_gpu = run.runtime.device == "cuda" or (
            run.runtime.device == "auto" and torch.cuda.is_available()
        )
        most = min(run.batch_size, 256 if on_gpu else 16)
        run.runtime.micro_batch = self.images or run.runtime.micro_batch or most
        return run


def bench(config: BenchConfig) -> dict[str, Any]:
    """Measure, show a table on stderr, write ``config.out`` if given, and return its content.

    For each stage of the run: images per second (all processes), MFU (share of the peak in ``peak_flops`` that the
    step's matrix products reach), the share of time spent waiting for data, peak memory. Raises InputError for
    settings that cannot work.
    """
    run = config.run_settings()
    source = config.data.open_train() if config.data.path else None
    backbone = frozen_backbone(run) if run.needs_teacher() else None
    processes = make_accelerator(run.runtime.device, run.precision).num_processes
    run.batch_size = run.runtime.micro_batch * processes
    if source is not None and len(source) < run.batch_size:
        raise InputError(
            f"{config.data.path} has {len(source)} images, fewer than a step of {run.batch_size}: lower --images"
        )
    task = make_task(run, backbone, len(source) if source else None)
    stages = stages_of(config, task)
    flop = {
        name: flop_per_image(
            task.learner, task.frozen_networks, task.alphas_at(step), task.plan.n_mask
        )
        for name, step in stages.items()
    }  # before the networks may be cut into pieces
    trainer = Trainer(
        task, task.accelerator, parallel=run.runtime.parallel, compiled=run.runtime.compile
    )
    peak = peak_flops(trainer.device, trainer.precision, config.peak)
    content: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "data": "synthetic" if source is None else config.data.path,
        "teacher": None if backbone is None else backbone.source,
        "device": str(trainer.device),
        "precision": trainer.precision,
        "processes": processes,
        "images_per_step": run.batch_size,
        "peak": peak,
        "settings": plain(config),
        **environment(),
        "stages": {},
    }
    with closing(open_batches(run, task, source)) as batches:
        for name, step in stages.items():
            measured = measure_stage(config, trainer, task, batches, step)
            done = sum(flop[name].values())
            rate = measured["images_per_second"]["median"] / processes
            content["stages"][name] = {
                **measured,
                "mfu": rate * done / peak["flops"],
                "gflop_per_image": done / 1e9,
            }
            if config.out and trainer.accelerator.is_main_process:
                write_json(out_file(config.out), content)  # written as it goes
    if trainer.accelerator.is_main_process:
        show(content)
    return content


def stages_of(config: BenchConfig, task: Pretraining) -> dict[str, int]:
    """Name of each stage to measure -> a step in it. Raises InputError where the run has no such stage."""
    plan = task.plan
    found = {}
    if plan.switch_step > 0 and config.stages != "two":
        found["one"] = 0
    if plan.switch_step < plan.total_steps and config.stages != "one":
        found["two"] = plan.switch_step
    if not found:
        raise InputError(f"this run has no stage {config.stages}: leave --stages at both")
    return found


def measure_stage(
    config: BenchConfig,
    trainer: Trainer,
    task: Pretraining,
    batches: Iterator[Batch],
    step: int,
) -> dict[str, Any]:
    """Times and memory of one stage."""
    trainer.enter(step)
    on_gpu = trainer.device.type == "cuda"
    steps = config.steps or (10 if on_gpu else 2)
    images = task.plan.micro_batch
    fresh = measure.forget_peak(trainer.device)
    timed = measure.rates(trainer, batches, step, images, config.rounds, steps)
    world = trainer.accelerator.num_processes
    timed["images_per_second"] = {k: v * world for k, v in timed["images_per_second"].items()}
    return {
        **timed,
        "peak_memory_gb": measure.peak_gb(trainer.device),
        "peak_memory_of": ("the GPU" if on_gpu else "resident memory, this stage")
        if fresh
        else "resident memory, whole process",
    }


def open_batches(
    run: PretrainConfig, task: Pretraining, source: Source | None
) -> Generator[Batch, None, None]:
    """Synthetic batches, or those of the run."""
    crops, plan = assembly.crop_settings(run, task.frozen_networks.teacher), task.plan
    pin = task.device.type == "cuda"
    accelerator = task.accelerator
    if source is None:
        yield from synthetic_batches(
            crops, run.mask.rule, plan.n_patches, plan.micro_batch, run.seed, pin
        )
    else:
        yield from pretrain_batches(
            source, crops, noise_length=noise_length(run.mask.rule, plan.n_patches), seed=run.seed,
            batch_size=run.batch_size, micro_batch=plan.micro_batch, rank=accelerator.process_index,
            world=accelerator.num_processes, pin_memory=pin,
            workers=assembly.worker_count(run.data.workers, accelerator.num_processes),
        )  # fmt: skip


def out_file(out: str) -> Path:
    """A .json file as it is, a folder with bench.json in it."""
    return Path(out) if out.endswith(".json") else Path(out) / "bench.json"


def show(content: dict[str, Any]) -> None:
    """The table for people, on stderr."""
    stages = content["stages"]
    table = Table(
        title=f"{content['images_per_step']} images per step, {content['device']}, {content['precision']}"
    )
    table.add_column("")
    for name in stages:
        table.add_column(f"stage {name}", justify="right")

    def row(title: str, text: Any) -> None:
        table.add_row(title, *[text(stage) for stage in stages.values()])

    row(
        "images/s",
        lambda s: "{median:.4g} ({low:.4g} to {high:.4g})".format(**s["images_per_second"]),
    )
    row("MFU", lambda s: f"{s['mfu']:.1%}")
    row("GFLOP per image", lambda s: f"{s['gflop_per_image']:.4g}")
    row("waiting for data", lambda s: f"{s['data_wait_share']:.1%}")
    row("peak memory, GB", lambda s: f"{s['peak_memory_gb']:.2f}")
    console = Console(stderr=True)
    console.print(table)
    peak = content["peak"]
    console.print(f"peak {peak['flops'] / 1e12:.3g} TFLOP/s, {peak['how']}", style="dim")
    if content["teacher"]:
        about = f"teacher: {content['teacher']}; data: {content['data']}"
        console.print(printable(about), style="dim", markup=False)
