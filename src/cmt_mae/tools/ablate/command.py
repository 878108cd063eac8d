"""The command: make the plan, start its runs, one process each, and write the table as they end."""

import os
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cmt_mae.core.errors import InputError, Stopped
from cmt_mae.core.files import make_folder
from cmt_mae.core.settings import Count, CountOrNone, check_fields
from cmt_mae.core.text import hint
from cmt_mae.data.sources import has_splits
from cmt_mae.engine.signals import StopRequest
from cmt_mae.evaluate.tasks import TASKS
from cmt_mae.tools.ablate.grid import Experiment, load_grid
from cmt_mae.tools.ablate.one import (
    check_evaluations,
    is_done,
    read_status,
    write_status,
)
from cmt_mae.tools.ablate.plan import (
    Evaluation,
    PlannedRun,
    RunPlan,
    make_run_plan,
    read_run_plan,
    settle,
)
from cmt_mae.tools.ablate.table import write_table

STOP_S = 120.0
"""Seconds that a run gets to write its checkpoint after a signal."""


@dataclass
class AblateConfig:
    """A grid of runs x seeds, each trained and measured, and one table. The same command again continues."""

    out: str
    """Folder for plan, runs and table. With a plan in it, nothing else need be given."""
    experiment: str = ""
    """components (Table 4) | alpha (Table 5) | masks (rules x loss tokens) | ladder | targets |
    split (stage one) | momentum | FILE.yaml: a grid of one's own."""
    data: str = ""
    """Images to train on, as for `pretrain`; with labelled train and val splits also those of k-NN and probe."""
    recipe: str = "micro64"
    """The scale: recipes or .yaml files joined by commas, after the method of each variant."""
    teacher: str = ""
    """As for `pretrain`; default: the recipe's."""
    seeds: Count = 3
    """Runs of each variant, with seeds 0, 1, ... More of them may be asked for later."""
    evaluate: tuple[str, ...] = ()
    """Further evaluations as TASK=FOLDER: linear=digits/, ade20k=camvid/, davis=davis/, coco=coco/."""
    only: tuple[str, ...] = ()
    """Variants to run now; default: all."""
    jobs: Count = 1
    """Runs at a time on this machine."""
    threads: CountOrNone = 0
    """CPU threads of each; 0: the cores shared out."""
    index: CountOrNone = 0
    """Which part of the plan this machine works off: 0 .. of - 1 (SLURM: $SLURM_ARRAY_TASK_ID)."""
    of: Count = 1
    """Into how many parts the plan is divided, one a machine that sees the folder."""
    table_only: bool = False
    """Start nothing, write the table of what is done."""
    progress: bool = True
    """Show the progress bar."""


def ablate(config: AblateConfig) -> dict[str, Any]:
    """Work off the plan and write OUT/table.md and table.json, whose content is returned.

    Raises InputError for settings that cannot work, and at the end where runs have failed (the table is there and
    names them); Stopped after a signal, when every run has written its checkpoint.
    """
    check(config)
    out = Path(config.out)
    plan = plan_of(config, out)
    check_evaluations(plan)
    unknown = set(config.only) - {one["name"] for one in plan.variants}
    if unknown:
        names = [one["name"] for one in plan.variants]
        word = sorted(unknown)[0]
        raise InputError(f"--only: no variant '{word}'{hint(word, names)}: use {', '.join(names)}")
    failed: list[str] = []
    if not config.table_only:
        failed = Workers(config, plan, out).work()
    content = write_table(plan, out)
    Console(stderr=True).print(f"table: {out / 'table.md'}", markup=False, highlight=False)
    if failed:
        reason = read_status(out, failed[0]).get("error", "")
        raise InputError(
            f"{len(failed)} of {len(plan.runs)} runs failed, first {failed[0]}: {reason}; the log is "
            f"{out / 'logs' / (failed[0] + '.log')}; the same command tries them again"
        )
    return content


def check(config: AblateConfig) -> None:
    """Raise InputError for numbers that cannot work."""
    check_fields(config)
    if config.index >= config.of:
        raise InputError(
            f"--index {config.index} is no part of {config.of}: give 0 to {config.of - 1}"
        )


def plan_of(config: AblateConfig, out: Path) -> RunPlan:
    """The plan that the settings ask for, joined with what the folder holds; or that of the folder alone."""
    if not config.experiment:
        return read_run_plan(out)
    grid = load_grid(config.experiment)
    if not config.data:
        raise InputError("no images: give --data FOLDER")
    data = absolute(config.data)
    further: dict[str, Any] = {}
    if config.teacher:
        further["teacher"] = {"name": absolute(config.teacher)}
    plan = make_run_plan(
        grid, out=out.absolute(), data=data, recipe=absolute_recipe(config.recipe), seeds=config.seeds,
        evaluations=evaluations(config, grid, data), further=further,
    )  # fmt: skip
    return settle(plan, out)


def absolute(name: str) -> str:
    """A path that holds wherever the runs are started; other names (hf://..., timm names) stay."""
    return os.path.abspath(name) if os.path.exists(name) else name


def absolute_recipe(names: str) -> str:
    """Recipes of which YAML files are told by their absolute paths."""
    return ",".join(
        absolute(one) if one.endswith((".yaml", ".yml")) else one for one in names.split(",")
    )


def evaluations(config: AblateConfig, grid: Experiment, data: str) -> list[Evaluation]:
    """What every run gets: the grid's evaluations on the training data's labels, then those asked for."""
    found = []
    if has_splits(data):
        found = [
            Evaluation(task, data, settings)
            for task, settings in grid.evaluate.items()
            if task in TASKS and TASKS[task].layout == "labelled"
        ]
    for word in config.evaluate:
        task, _, folder = word.partition("=")
        if task not in TASKS or not folder:
            raise InputError(
                f"--evaluate '{word}'{hint(task, list(TASKS))}: write TASK=FOLDER with one of {', '.join(TASKS)}"
            )
        if not os.path.isdir(folder):
            raise InputError(f"--evaluate {word}: {folder} is no folder")
        found.append(Evaluation(task, os.path.abspath(folder), grid.evaluate.get(task, {})))
    if not found:
        raise InputError(
            f"{data} has no train and val splits, so nothing would be measured: give --evaluate knn=FOLDER"
        )
    return found


class Workers:
    """The processes of this machine."""

    def __init__(self, config: AblateConfig, plan: RunPlan, out: Path) -> None:
        self.config, self.plan, self.out = config, plan, out
        wanted = set(config.only) or {one["name"] for one in plan.variants}
        part = plan.runs[config.index :: config.of]
        self.runs = [run for run in part if run.variant in wanted]
        self.waiting = deque(run for run in self.runs if not is_done(run, plan, out))
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.failed: list[str] = []

    def work(self) -> list[str]:
        """Until nothing waits and nothing runs; the names of the runs that failed."""
        make_folder(self.out / "logs")
        console = Console(stderr=True)
        bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            console=console, disable=not self.config.progress or not console.is_terminal,
        )  # fmt: skip
        with StopRequest() as stop, bar:
            task = bar.add_task("", total=len(self.runs))
            while self.waiting or self.running:
                while self.waiting and len(self.running) < self.config.jobs:
                    self.start(self.waiting.popleft())
                ended = self.collect(console)
                left = len(self.waiting) + len(self.running)
                bar.update(
                    task, description=", ".join(self.running), completed=len(self.runs) - left
                )
                if ended:
                    write_table(self.plan, self.out)
                if stop.asked:
                    self.stop()
                time.sleep(0.1)
        return self.failed

    def start(self, run: PlannedRun) -> None:
        """One process. A session of its own: Ctrl-C reaches it through us alone, and once."""
        threads = self.config.threads or max(1, (os.cpu_count() or 1) // self.config.jobs)
        numbers = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        with open(self.out / "logs" / f"{run.name}.log", "ab") as log:
            self.running[run.name] = subprocess.Popen(
                [sys.executable, "-m", "cmt_mae.tools.ablate", str(self.out), run.name],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, **numbers},
            )  # fmt: skip

    def collect(self, console: Console) -> bool:
        """Take note of processes that ended; whether there were any."""
        ended = [
            (name, process) for name, process in self.running.items() if process.poll() is not None
        ]
        for name, process in ended:
            del self.running[name]
            status = process.returncode
            if status != 0:
                if status not in (1, 75):  # it could not say so itself
                    error = f"ended with status {status}, see the log"
                    if status < 0:
                        error = f"killed by {signal.Signals(-status).name} (out of memory?), see the log"
                    write_status(self.out, name, {"state": "failed", "error": error})
                self.failed.append(name)
                error = read_status(self.out, name).get("error", "stopped, see the log")
                console.print(f"{name} failed: {error}", markup=False, highlight=False)
        return bool(ended)

    def stop(self) -> None:
        """Every run writes a checkpoint and ends. Raises Stopped."""
        for process in self.running.values():
            process.send_signal(signal.SIGTERM)
        until = time.monotonic() + STOP_S
        for process in self.running.values():
            try:
                process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
        done = sum(is_done(run, self.plan, self.out) for run in self.runs)
        raise Stopped(
            f"stopped with {done} of {len(self.runs)} runs done, checkpoints written in {self.out / 'runs'}: run "
            "the same command to continue"
        )
