"""What the three evaluations that train have in common: open a run, train in it, measure, save one result."""

import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from cmt_mae.backbones import Backbone
from cmt_mae.core.runs import RunDir, plain
from cmt_mae.core.settings import resume_safe_settings
from cmt_mae.engine.fit import fit
from cmt_mae.engine.supervised import SupervisedTask
from cmt_mae.engine.task import Evaluation
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


def train_and_measure(
    name: str,
    config: TaskSettings,
    task: SupervisedTask,
    accelerator: Accelerator,
    run: RunDir,
    backbone: Backbone,
    data: dict[str, Any],
    describe: Callable[[Evaluation], tuple[dict[str, float], dict[str, Any], dict[str, Any]]],
    *,
    said: Sequence[str] = (),
    packages: Sequence[str] = (),
    started: float,
) -> Result:
    """Train, or continue, to the end; the result is in the run and beside the backbone's own, if that is a run.

    Args:
        name: of the task in results.
        data: ``Result.data``.
        describe: the last evaluation -> metrics, protocol and details of the result; every process calls it.
        said: where the run leaves the published protocol, printed before it starts.
        packages: further ones whose versions the number depends on.
        started: ``time.perf_counter()`` when the evaluation began.
    """
    for line in said if accelerator.is_main_process else ():
        print(f"{name}, preset {vars(config)['preset']}: {line}", file=sys.stderr)
    about: dict[str, Any] = {"name": backbone_name(config), "architecture": backbone.architecture}
    about |= {"digest": backbone.digest, "facts": backbone.facts}
    with closing(run):
        last = fit(config, task, accelerator, run, {"task": name, "backbone": about, "data": data})
        metrics, protocol, details = describe(last.evaluation)
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
