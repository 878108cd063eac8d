"""What the three evaluations that train have in common: open a run, train in it, measure, save one result."""

import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from cmt_mae.backbones import Backbone
from cmt_mae.core.runs import RunDir, plain
from cmt_mae.core.settings import resume_safe_settings
from cmt_mae.data.tasks import Collate, Sample, train_batches
from cmt_mae.engine.fit import fit
from cmt_mae.engine.supervised import SupervisedTask
from cmt_mae.engine.task import Evaluation, micro_batches
from cmt_mae.engine.task_settings import TaskSettings
from cmt_mae.evaluate.result import Result, backbone_name, make_result, save_where


def open_run(
    out: Path, config: TaskSettings, numbers: dict[str, Any], accelerator: Accelerator
) -> RunDir:
    """The training's run directory. numbers: what the preset resolved to.

    Raises InputError for a folder that holds something else, or a run with other settings.
    """
    kind: Any = type(config)
    settings = plain(config) | numbers
    younger = {"val_share": 0.0, "range": []}  # what runs from before these settings meant
    return RunDir(
        str(out),
        settings,
        resume_safe_settings(kind),
        writes=accelerator.is_main_process,
        defaults={name: value for name, value in younger.items() if name in settings},
    )


def make_task(
    config: TaskSettings,
    accelerator: Accelerator,
    model: nn.Module,
    groups: list[dict[str, Any]],
    *,
    sample: Sample,
    collate: Collate,
    images: int,
    batch_size: int,
    total_steps: int,
    lr: float,
    schedule: Callable[[int], float],
    to_device: Callable[[Any], Any],
    measure: Callable[[int], Evaluation],
    headline: str,
    pin_memory: bool = True,
    **more: Any,
) -> SupervisedTask:
    """A training with AdamW on ``images`` labelled images.

    Args:
        model, groups: on the device, and its parameters as AdamW takes them.
        sample, collate: see ``train_batches``.
        lr, schedule: highest rate, and the rate of each step.
        more: further fields of ``SupervisedTask``.
    """
    world = accelerator.num_processes
    micro, accumulation = micro_batches(batch_size, config.micro_batch, world)

    def batches(start: int) -> Generator[Any, None, None]:
        return train_batches(
            sample,
            collate,
            images,
            seed=config.seed,
            batch_size=batch_size,
            micro_batch=micro,
            rank=accelerator.process_index,
            world=world,
            workers=config.workers,
            timeout_s=config.timeout_s,
            start_step=start,
            pin_memory=pin_memory and accelerator.device.type == "cuda",
        )

    return SupervisedTask(
        model=model,
        optimizer=torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), fused=True),
        schedule=schedule,
        loader=batches,
        to_device=to_device,
        measure=measure,
        headline=headline,
        seed=config.seed,
        batch_size=batch_size,
        micro_batch=micro,
        accumulation=accumulation,
        steps_per_epoch=max(1, images // batch_size),
        total_steps=total_steps,
        eval_every=config.eval_every,
        **more,
    )


def train_and_measure(
    name: str,
    config: TaskSettings,
    task: SupervisedTask,
    accelerator: Accelerator,
    run: RunDir,
    backbone: Backbone,
    data: dict[str, Any],
    finish: Callable[[Evaluation], tuple[dict[str, float], dict[str, Any], dict[str, Any]]],
    *,
    said: Sequence[str] = (),
    packages: Sequence[str] = (),
    started: float,
) -> Result:
    """Train, or continue, to the end; the result is in the run and beside the backbone's own, if that is a run.

    Args:
        name: of the task in results.
        data: ``Result.data``.
        finish: the last evaluation -> metrics, protocol and details of the result; every process calls it.
        said: where the run leaves the published protocol, printed before it starts.
        packages: further ones whose versions the number depends on.
        started: ``time.perf_counter()`` when the evaluation began.
    """
    for line in said if accelerator.is_main_process else ():
        print(f"{name}, preset {vars(config)['preset']}: {line}", file=sys.stderr)
    about: dict[str, Any] = {
        "name": backbone_name(config.backbone, config.key),
        "architecture": backbone.architecture,
        "digest": backbone.digest,
        "facts": backbone.facts,
    }
    with closing(run):
        last = fit(config, task, accelerator, run, {"task": name, "backbone": about, "data": data})
        metrics, protocol, details = finish(last.evaluation)
        result = make_result(
            name,
            config,
            backbone,
            metrics=metrics,
            protocol=protocol,
            data=data,
            device=accelerator.device,
            processes=accelerator.num_processes,
            started=started,
            details=details,
        )
        result.versions |= {package: version(package) for package in packages}
        if accelerator.is_main_process:
            result.save(run.path)
            save_where(result, None, config.backbone)
    return result
