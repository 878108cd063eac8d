"""One run of a plan, in a process of its own: training, then the evaluations. ``python -m cmt_mae.tools.ablate``.

One process per run: whatever one of them dies of, the others go on.
"""

import json
import os
import shutil
import sys
import time
import traceback
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from cmt_mae.core.errors import InputError, Stopped
from cmt_mae.core.files import make_folder, write_json
from cmt_mae.core.lock import Lock
from cmt_mae.core.text import one_line
from cmt_mae.evaluate.tasks import TASKS
from cmt_mae.pretraining import assembly
from cmt_mae.tools.ablate.plan import Evaluation, PlannedRun, RunPlan, read_run_plan, settings_of
from cmt_mae.tools.ablate.share import borrow_stage_one


def main(out: Path, name: str) -> int:
    """Work off one run; 0 done, 1 failed (OUT/status/NAME.json says why), 75 stopped or already taken."""
    plan = read_run_plan(out)
    run = next(run for run in plan.runs if run.name == name)
    make_folder(out / "status")
    lock = Lock(out / "status" / f"{name}.lock")
    try:
        lock.take()
    except InputError as error:  # the same part was started twice
        print(error, file=sys.stderr)
        return 75
    begin = time.time()
    try:
        borrowed, results = work(run, plan, out)
    except (Stopped, KeyboardInterrupt):
        return 75
    except Exception as error:
        traceback.print_exc()
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        write_status(out, name, {"state": "failed", "error": kind + one_line(error, 300)})
        return 1
    finally:
        lock.give_back()
    write_status(
        out, name,
        {"state": "done", "evaluations": plan.evaluation_key(), "results": results,
         "seconds": round(time.time() - begin, 1), "stage_one_from": borrowed,
         "threads": torch.get_num_threads()},
    )  # fmt: skip
    return 0


def work(run: PlannedRun, plan: RunPlan, out: Path) -> tuple[str, list[str]]:
    """Train (or continue) and measure.

    Returns the sibling whose stage one was taken, or "", and below the run's folder the result file of each
    evaluation of the plan.
    """
    from cmt_mae.pretraining.student_files import save_student
    from cmt_mae.tools.pretrain import pretrain

    config = settings_of(run, out)
    borrowed = ""
    if run.train:
        borrowed = borrow_stage_one(run, plan, out)
        if borrowed:
            print(f"stage one is that of {borrowed}", file=sys.stderr)
        pretrain(config)
    else:
        folder = Path(config.out)
        make_folder(folder)
        student = assembly.build_learner(config, None).student
        save_student(folder, config, student, assembly.IMAGENET, {}, "")
        write_json(folder / "run.json", {"untrained": True, "seed": run.seed})
    features = out / "features" / run.name
    results = [
        evaluate(evaluation, run, Path(config.out), features) for evaluation in plan.evaluations
    ]
    shutil.rmtree(features, ignore_errors=True)
    return borrowed, results


def evaluate(evaluation: Evaluation, run: PlannedRun, folder: Path, features: Path) -> str:
    """One evaluation of one run, unless it was made before; its result file below the run directory."""
    from cmt_mae.backbones import load_backbone
    from cmt_mae.evaluate.everything import job_key, known_result, read_ledger, remember

    settings = settings_of_task(evaluation, run, folder)
    key = job_key(evaluation.task, settings, load_backbone(str(folder)), Path(evaluation.data))
    if known_result(folder, key) is not None:
        return str(read_ledger(folder)[key]["result"])
    settings.out = str(folder)
    if TASKS[evaluation.task].trains:
        name = f"{evaluation.task}-{Path(os.path.abspath(evaluation.data)).name}-{key[:8]}"
        settings.out = str(folder / "evaluations" / name)
    if hasattr(settings, "cache"):  # k-NN and linear probe look at the same features
        settings.cache = str(features)
    result = TASKS[evaluation.task].load_function()(settings)
    remember(folder, key, result)
    print(f"{evaluation.task} on {evaluation.data}: {result.headline:.2f}", file=sys.stderr)
    return str(read_ledger(folder)[key]["result"])


def settings_of_task(evaluation: Evaluation, run: PlannedRun, folder: Path) -> Any:
    """Settings of the task: its quick preset, then those of the plan. Raises InputError for what it lacks."""
    from cmt_mae.core.parsing import parse

    task = TASKS[evaluation.task]
    kind = task.load_settings()
    known = {field.name for field in fields(kind)}
    common = {
        "backbone": str(folder), "data": evaluation.data, "seed": run.seed, "workers": 0, "progress": False,
        "device": run.settings["runtime"]["device"],
    }  # fmt: skip
    content = {**{k: v for k, v in common.items() if k in known}, **task.quick}
    if (
        evaluation.task == "linear"
    ):  # what plans meant before there was a choice; a column holds one protocol
        content["protocol"] = "mae"
    return parse(f"evaluation {evaluation.task}", kind, [], {**content, **evaluation.settings})


def write_status(out: Path, name: str, content: dict[str, Any]) -> None:
    """OUT/status/NAME.json."""
    write_json(out / "status" / f"{name}.json", content)


def read_status(out: Path, name: str) -> dict[str, Any]:
    """State of a run: done or failed, with what is known of it; empty where nothing ended yet."""
    try:
        content = json.loads((out / "status" / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def is_done(run: PlannedRun, plan: RunPlan, out: Path) -> bool:
    """Whether the run was trained and got every evaluation of the plan."""
    status = read_status(out, run.name)
    return status.get("state") == "done" and status.get("evaluations") == plan.evaluation_key()


def check_evaluations(plan: RunPlan) -> None:
    """Raise InputError for settings that a task does not have, before anything runs."""
    for evaluation in plan.evaluations:
        settings = settings_of_task(evaluation, plan.runs[0], Path("run"))
        assert asdict(settings)
