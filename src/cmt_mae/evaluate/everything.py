"""``cmt-mae evaluate all``: every task that the data under one folder allow, one after another."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console

from cmt_mae.backbones import Backbone, load_backbone
from cmt_mae.core.backbone_facts import FACTS, BackboneFacts
from cmt_mae.core.errors import InputError, Stopped
from cmt_mae.core.files import write_json
from cmt_mae.core.settings import TIMEOUT_S, check_fields, default_of
from cmt_mae.core.text import hint, one_line, printable
from cmt_mae.data.ade20k import ZeroLabel
from cmt_mae.evaluate.features import FrozenSettings, start_processes
from cmt_mae.evaluate.layouts import Found, find_data, folder_fingerprint
from cmt_mae.evaluate.result import Result, results_folder
from cmt_mae.evaluate.tasks import TASKS, Preset

LEDGER = "evaluate_all.json"


@dataclass
class EvaluateAllConfig(BackboneFacts):
    """Every evaluation that the data allow. The same command again continues where it ended."""

    backbone: str
    """Run directory, checkpoint file, timm name or `embedded`."""
    data_root: str
    """A data set, or a folder with data sets in it: labelled images with train and val splits, COCO,
    ADE20K or DAVIS as they are published."""
    out: str | None = None
    """Folder for results/*.json and evaluations/. Default: the run directory, if the backbone is one."""
    preset: Preset = "quick"
    """quick: small trainings that show whether features are of use. paper: the published protocols."""
    tasks: tuple[str, ...] | None = None
    """knn, linear, davis, finetune, ade20k, coco. Default: all that have data."""
    device: str = "auto"
    """auto, cpu or cuda."""
    workers: int = 2
    """Processes that read images, for each process that computes."""
    timeout_s: float = TIMEOUT_S
    """A loader process that gives no answer for so many seconds counts as hung; 0: wait for ever."""
    seed: int = 0
    """Of everything random in the evaluations."""
    key: str | None = None
    """`momentum` evaluates the momentum student of a run."""
    zero_label: ZeroLabel | None = None
    """What label 0 is in ADE20K's layout, as in `evaluate ade20k`: ignored or class."""


@dataclass
class Job:
    """One task on one data set."""

    task: str
    """Name."""
    config: Any
    """Settings of the task."""
    key: str
    """sha256 of what is measured, see ``job_key``."""


def evaluate_all(config: EvaluateAllConfig) -> list[Result]:
    """Run all tasks that have data; returns their results, those of earlier calls included.

    Each result is in ``out/results`` as soon as it is there; a training lives in ``out/evaluations``
    and is continued. What was measured before (same weights, data, settings and seed) is not measured
    again. Every process may call it.

    Raises:
        InputError: nothing to do or an impossible setting, before any work; or, after all the other
            tasks, one line that names those that failed.
        Stopped: a signal asked for the end; the same command continues.
    """
    where = start_processes(config.device)
    console = Console(stderr=True, quiet=where.rank != 0, highlight=False, soft_wrap=True)

    def say(text: str) -> None:
        console.out(printable(text))

    wanted = check_tasks(config.tasks)
    out = output_folder(config)
    sets, notes = find_data(
        Path(config.data_root).expanduser(), {TASKS[task].layout for task in wanted}
    )
    backbone = load_backbone(config.backbone, key=config.key, facts=config)
    jobs = [
        make_job(name, one.path, config, backbone, out)
        for name in wanted
        for one in sets
        if one.layout == TASKS[name].layout
    ]
    notes += missing_data(config, wanted, sets)
    for note in notes:
        say(f"skipped {note}")
    if not jobs:
        raise InputError(f"{config.data_root}: nothing to evaluate on; {'; '.join(notes)}")
    del backbone
    results, failures = run_jobs(jobs, out, where.rank, say)
    if failures:
        raise InputError(
            f"{len(failures)} of {len(jobs)} evaluations failed ({'; '.join(failures)}); the results of "
            f"the others are in {out / 'results'}; the same command runs only what is missing"
        )
    say(f"results in {out / 'results'}; as one table: cmt-mae compare {shlex.quote(str(out))}")
    return results


def run_jobs(
    jobs: list[Job], out: Path, rank: int, say: Callable[[str], None]
) -> tuple[list[Result], list[str]]:
    """Results of all jobs, and a line for each that failed; Stopped and Ctrl-C end it at once."""
    done = {job.key: known_result(out, job.key) for job in jobs}
    PartialState().wait_for_everyone()  # all processes have read before one writes
    results, failures = [], []
    for number, job in enumerate(jobs, 1):
        name = f"{job.task} on {job.config.data}"
        result = done[job.key]
        if result is not None:
            say(f"[{number}/{len(jobs)}] {name}: {numbers_of(result)} (measured before)")
            results.append(result)
            continue
        say(f"[{number}/{len(jobs)}] {name} ...")
        try:
            result = TASKS[job.task].load_function()(job.config)
        except Stopped:
            raise
        except Exception as error:  # the other tasks do not depend on this one
            kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
            failures.append(f"{name}: {kind}{one_line(error) or 'no message'}")
            say(f"[{number}/{len(jobs)}] {failures[-1]}")
            if not isinstance(error, InputError):
                traceback.print_exc()  # a fault of ours: keep what a report of it needs
            continue
        if rank == 0:
            remember(out, job.key, result)
        say(f"[{number}/{len(jobs)}] {name}: {numbers_of(result)}, {result.seconds:.0f} s")
        results.append(result)
    return results, failures


def check_tasks(tasks: tuple[str, ...] | None) -> list[str]:
    """The wanted tasks, those on frozen features first: their numbers are there soon.

    Raises:
        InputError: an unknown one, or none.
    """
    for task in tasks or ():
        if task not in TASKS:
            raise InputError(
                f"task '{task}' is unknown{hint(task, list(TASKS))}: use {', '.join(TASKS)}"
            )
    if tasks is not None and not tasks:
        raise InputError(f"no task is left to evaluate: use {', '.join(TASKS)}")
    found = [task for task in TASKS if tasks is None or task in tasks]
    return sorted(found, key=lambda task: TASKS[task].trains)


def output_folder(config: EvaluateAllConfig) -> Path:
    """``out``, or the run directory that the backbone is.

    Raises:
        InputError: neither is there, or an unknown preset.
    """
    check_fields(config)
    folder = results_folder(config.out, config.backbone)
    if folder is not None:
        return folder
    raise InputError(f"{config.backbone} is no run directory, so results have no place: give --out")


def missing_data(config: EvaluateAllConfig, wanted: list[str], sets: list[Found]) -> list[str]:
    """A line for each task without data."""
    there = {one.layout for one in sets}
    without = [task for task in wanted if TASKS[task].layout not in there]
    return [f"{task}: no {TASKS[task].layout} data in {config.data_root}" for task in without]


def make_job(
    name: str, data: Path, config: EvaluateAllConfig, backbone: Backbone, out: Path
) -> Job:
    """Settings of one task for one data set."""
    task = TASKS[name]
    kind = task.load_settings()
    common = {
        "backbone": config.backbone,
        "data": str(data),
        "device": config.device,
        "workers": config.workers,
        "timeout_s": config.timeout_s,
        "seed": config.seed,
        "key": config.key,
        "zero_label": config.zero_label,
        **{name: getattr(config, name) for name in FACTS},
    }
    known = {field.name for field in fields(kind)}  # not every task has loader processes
    preset = task.quick if config.preset == "quick" else task.paper
    settings = kind(**{k: v for k, v in common.items() if k in known}, **preset)
    key = job_key(name, settings, backbone, data)
    settings.out = str(out)
    if task.trains:
        folder = Path(os.path.abspath(data)).name
        settings.out = str(out / "evaluations" / f"{name}-{folder}-{config.preset}-{key[:8]}")
    return Job(name, settings, key)


# settings of the tasks that change no number, as the ledgers' keys have it
NOT_IN_KEY = ("backbone", "data", "out", "key", "device", "workers", "timeout_s", *FACTS)
YOUNGER = ("zero_label", "range", "val_share", "deterministic", "compile", "parallel")
"""Settings that came after the first ledgers: no part of a key while they have their defaults."""


def job_key(task: str, settings: Any, backbone: Backbone, data: Path) -> str:
    """sha256 of everything that the number follows from: weights and input, data, settings, seed.

    Like ``Result.identity`` it leaves out places, machine and versions; unlike it, it is known
    before the work.
    """
    kept = settings_in_key(settings)
    network = [backbone.digest, backbone.architecture, backbone.kwargs]
    entry = [backbone.mean, backbone.std, backbone.img_size]
    what = [task, kept, network, entry, folder_fingerprint(data)]
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()


YOUNGER_IN_ADE20K = (
    "warmup_ratio", "power", "smallest_ratio", "largest_ratio", "cat_max_ratio", "dropout", "auxiliary_weight",
)  # fmt: skip
"""Of ade20k alone: coco's warmup_ratio is in the old keys."""


def settings_in_key(settings: Any) -> dict[str, Any]:
    """Those that change the number. A key of an old ledger must stay what it was when a setting is added."""
    kept = {k: v for k, v in asdict(settings).items() if k not in NOT_IN_KEY}
    if isinstance(settings, FrozenSettings):
        del kept["progress"]
    younger = YOUNGER + (YOUNGER_IN_ADE20K if hasattr(settings, "zero_label") else ())
    for one in fields(settings):
        if one.name in younger and kept[one.name] == default_of(one):
            del kept[one.name]
    return kept


def known_result(out: Path, key: str) -> Result | None:
    """The result of this key, if an earlier call left it and its file is still the same measurement."""
    try:
        entry = read_ledger(out)[key]
        # its name alone: a ledger that came with somebody's run may point anywhere
        result = Result.load(out / "results" / Path(entry["result"]).name)
        return result if result.identity() == entry["identity"] else None
    except (InputError, TypeError, LookupError, AttributeError):
        return None  # never measured, or its file is gone or damaged: measure again


def remember(out: Path, key: str, result: Result) -> None:
    """Save the result in ``out`` (a training saves its own copy only) and note its key."""
    path = result.save(out)
    entry = {
        "task": result.task,
        "result": str(path.relative_to(out)),
        "identity": result.identity(),
    }
    write_json(out / LEDGER, {**read_ledger(out), key: entry})


def read_ledger(out: Path) -> dict[str, Any]:
    """Key -> task, result file and identity, of all earlier calls; empty where it cannot be read."""
    try:
        content = json.loads((out / LEDGER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def numbers_of(result: Result) -> str:
    """The headline, and its protocol."""
    headline = result.protocol["headline"]
    return f"{headline} {result.headline:.2f} (protocol {result.protocol['name']})"
