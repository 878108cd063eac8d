"""The table of an experiment: OUT/table.md and table.json, from the results in the run directories."""

import math
import statistics
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cmt_mae.core.errors import InputError
from cmt_mae.core.files import write_json, write_text
from cmt_mae.core.run_reader import read_metrics
from cmt_mae.core.runs import environment
from cmt_mae.evaluate.result import Result, json_values
from cmt_mae.evaluate.tasks import TASKS
from cmt_mae.tools.ablate.one import is_done, read_status
from cmt_mae.tools.ablate.plan import Evaluation, PlannedRun, RunPlan
from cmt_mae.tools.ablate.statistics import (
    TESTS,
    Effect,
    against_baseline,
    axis_effects,
    detectable,
    pooled_spread,
    spread,
)
from cmt_mae.tools.report.paper import SOURCE, paper_numbers


@dataclass
class Column:
    """One metric of one evaluation."""

    title: str
    values: dict[str, dict[int, float]] = field(default_factory=dict)
    """Variant -> seed -> value in percent."""
    effects: dict[str, Effect] = field(default_factory=dict)
    """Variant -> difference to the baseline."""
    axes: dict[str, dict[str, Effect]] = field(default_factory=dict)
    """Axis -> level -> difference to the axis' first level."""
    spread: float | None = None
    """Standard deviation between seeds, pooled over the variants."""
    detectable: float | None = None
    """Smallest true difference that these seeds would show, about."""


def write_table(plan: RunPlan, out: Path) -> dict[str, Any]:
    """Collect what is done and write both files; returns the content of the JSON."""
    columns = collect(plan, out)
    for column in columns:
        judge(column, plan)
    content = {
        "experiment": plan.experiment, "title": plan.title, "baseline": plan.baseline, "recipe": plan.recipe,
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "tests": TESTS, "runs_planned": len(plan.runs),
        "runs_done": sum(is_done(run, plan, out) for run in plan.runs),
        "variants": [{**one, **facts(one["name"], plan, out)} for one in plan.variants],
        "columns": [asdict(column) for column in columns],
        "paper": {"source": SOURCE, "numbers": paper_of(plan)},
        "failed": {
            run.name: read_status(out, run.name)["error"]
            for run in plan.runs
            if read_status(out, run.name).get("state") == "failed"
        },
        "evaluations": [asdict(one) for one in plan.evaluations],
        "settings": common_settings(plan),
        **environment(),
    }  # fmt: skip
    content = json_values(content)
    write_json(out / "table.json", content)
    from cmt_mae.tools.ablate.text import markdown

    write_text(out / "table.md", markdown(content))
    return content


def collect(plan: RunPlan, out: Path) -> list[Column]:
    """The columns in the order of the evaluations, with every value that is there."""
    columns: dict[tuple[int, str], Column] = {}
    for run in plan.runs:
        status = read_status(out, run.name)
        if not is_done(run, plan, out):
            continue
        files = status.get("results", [])
        for number, (evaluation, file) in enumerate(zip(plan.evaluations, files, strict=False)):
            try:
                result = Result.load(out / "runs" / run.name / "results" / Path(str(file)).name)
            except InputError:
                continue
            for metric, value in metrics_of(result).items():
                column = columns.setdefault(
                    (number, metric), Column(title_of(evaluation, metric, plan))
                )
                column.values.setdefault(run.variant, {})[run.seed] = value
    return [columns[key] for key in sorted(columns, key=lambda key: key[0])]


def metrics_of(result: Result) -> dict[str, float]:
    """The numbers of one result that get a column: all pools of k-NN and probe, else the task's usual metrics."""
    if result.task in ("knn", "linear"):
        pools = {
            name.split("/")[0]: value
            for name, value in result.metrics.items()
            if name.endswith("/top1") and not name.startswith(("default/", "best/"))
        }
        return pools or {"": result.headline}
    named = [
        m
        for m in (TASKS[result.task].columns if result.task in TASKS else ())
        if m in result.metrics
    ]
    found = {name: result.metrics[name] for name in named} or {"": result.headline}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def title_of(evaluation: Evaluation, metric: str, plan: RunPlan) -> str:
    """E.g. "k-NN mean"; with the data set's name where it is not the first one."""
    data = Path(evaluation.data).name
    where = "" if evaluation.data == plan.evaluations[0].data else data
    return " ".join(part for part in (TASKS[evaluation.task].title, metric, where) if part)


def judge(column: Column, plan: RunPlan) -> None:
    """Differences, tests, spread and power of one column."""
    groups = [list(seeds.values()) for seeds in column.values.values()]
    column.effects, fit = against_baseline(column.values, plan.baseline)
    deviation, freedom = pooled_spread(groups)
    if freedom:
        column.spread = deviation
    if fit is not None:
        typical = round(statistics.fmean(len(group) for group in groups))
        column.detectable = detectable(fit.deviation, fit.freedom, typical, len(column.effects))
    levels = {one["name"]: tuple(one["levels"].values()) for one in plan.variants if one["levels"]}
    values = {levels[name]: seeds for name, seeds in column.values.items() if name in levels}
    for place, (axis, words) in enumerate(plan.axes.items()):
        column.axes[axis] = axis_effects(values, place, words)


def facts(variant: str, plan: RunPlan, out: Path) -> dict[str, Any]:
    """Runs done, mean and spread of each variant's training time."""
    runs = [run for run in plan.runs if run.variant == variant]
    done = [run for run in runs if is_done(run, plan, out)]
    minutes = [training_minutes(run, out) for run in done if run.train]
    return {
        "planned": len(runs),
        "done": len(done),
        "minutes": round(statistics.fmean(minutes), 2) if minutes else None,
        "minutes_spread": spread(minutes),
    }


def training_minutes(run: PlannedRun, out: Path) -> float:
    """Of the steps alone, a borrowed stage one included, from the run's own lines of metrics."""
    lines = [row for row in read_metrics(out / "runs" / run.name) if "images_per_second" in row]
    starts = [0, *(row["step"] for row in lines)]
    batch = run.settings["batch_size"]
    seconds = (
        (row["step"] - start) * batch / max(1e-9, row["images_per_second"])
        for row, start in zip(lines, starts, strict=False)
    )
    return sum(seconds) / 60


def paper_of(plan: RunPlan) -> dict[str, dict[str, float]]:
    """Variant -> task metric -> the paper's number, of the tasks that the plan has."""
    tasks = {one.task for one in plan.evaluations}
    names = {one["paper"]: one["name"] for one in plan.variants if one["paper"]}
    found: dict[str, dict[str, float]] = {}
    for number in paper_numbers():
        if number.method in names and number.task in tasks and number.table in (4, 5):
            key = f"{number.task} {number.metric}"
            found.setdefault(names[number.method], {})[key] = number.value
    return found


def common_settings(plan: RunPlan) -> dict[str, Any]:
    """Settings that all trained runs share; what differs is in the plan."""
    from cmt_mae.core.parsing import flatten

    flat = [flatten(run.settings) for run in plan.runs if run.train]
    if not flat:
        return {}
    first = flat[0]
    return {
        key: value
        for key, value in first.items()
        if key != "out" and all(one.get(key) == value for one in flat)
    }
