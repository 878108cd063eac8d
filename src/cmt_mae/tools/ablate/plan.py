"""The plan of an experiment: every run with its complete settings, in OUT/plan.json.

The file is all that the runs need: other processes and machines that see the folder work it off too.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cmt_mae.core.continuing import refuse_changes
from cmt_mae.core.errors import InputError
from cmt_mae.core.files import write_json
from cmt_mae.core.parsing import flatten, parse
from cmt_mae.core.recipes import load_recipes, merge
from cmt_mae.core.runs import plain
from cmt_mae.core.settings import resume_safe_settings
from cmt_mae.pretraining.settings import PretrainConfig
from cmt_mae.pretraining.start import take_shape
from cmt_mae.tools.ablate.grid import Experiment

FORMAT = 1
# settings that stage one does not depend on, where runs agree in all others
AFTER_STAGE_ONE = (
    "alpha", "alpha_mask", "alpha_loss", "alpha_ramp_epochs", "stage1_share", "stage1_epochs", "momentum.",
)  # fmt: skip


@dataclass
class PlannedRun:
    """One training with its evaluations."""

    name: str
    """VARIANT_sSEED: the run directory is OUT/runs/NAME."""
    variant: str
    seed: int
    train: bool
    settings: dict[str, Any]
    """Complete settings of `pretrain`, nested."""


@dataclass
class Evaluation:
    """One evaluation that every run gets."""

    task: str
    data: str
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class RunPlan:
    """Everything that is to be done, and how the table is to be read."""

    experiment: str
    title: str
    baseline: str
    recipe: str
    """The scale: recipes joined by commas."""
    variants: list[dict[str, Any]]
    """name, what, paper and levels of each, in the table's order."""
    axes: dict[str, list[str]]
    runs: list[PlannedRun]
    """One seed after the other, so that what is done at any time is a whole table of fewer seeds."""
    evaluations: list[Evaluation]

    def evaluation_key(self) -> str:
        """Names the evaluations: a run that was measured by others has to be measured again.

        Of a data set only the folder's name counts, so that it may lie elsewhere on another machine.
        """
        what = [[one.task, Path(one.data).name, one.settings] for one in self.evaluations]
        text = json.dumps(what, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def make_run_plan(
    grid: Experiment,
    *,
    out: Path,
    data: str,
    recipe: str,
    seeds: int,
    evaluations: list[Evaluation],
    further: dict[str, Any],
) -> RunPlan:
    """Settings of every run: the variant's method, then the scale, then ``further``, then the variant's own.

    Raises InputError for settings that `pretrain` refuses, before anything runs.
    """
    configs: dict[str, PretrainConfig] = {}
    for variant in grid.variants:
        content = load_recipes(f"{variant.recipe},{recipe}" if recipe else variant.recipe)
        merge(content, further)
        merge(content, variant.settings)
        merge(content, {"out": str(out), "data": {"path": data}, "runtime": {"progress": False}})
        config: PretrainConfig = parse(f"variant {variant.name}", PretrainConfig, [], content)
        take_shape(config)
        config.check()
        config.runtime.keep_switch = config.needs_momentum()
        configs[variant.name] = config
    runs = []
    for seed in range(seeds):
        for variant in grid.variants:
            name, config = f"{variant.name}_s{seed}", configs[variant.name]
            config.seed, config.out = seed, str(out / "runs" / name)
            runs.append(PlannedRun(name, variant.name, seed, variant.train, plain(config)))
    variants = [
        {"name": one.name, "what": one.what, "paper": one.paper, "levels": one.levels}
        for one in grid.variants
    ]
    return RunPlan(
        grid.name, grid.title, grid.baseline, recipe, variants, grid.axes, runs, evaluations
    )


def settle(plan: RunPlan, out: Path) -> RunPlan:
    """Join a plan with the one in the folder and write it: more seeds, variants and evaluations may come.

    Raises InputError where a run of the same name would have other settings, or the folder another experiment.
    """
    path = out / "plan.json"
    if path.exists():
        before = read_run_plan(out)
        if before.experiment != plan.experiment:
            raise InputError(
                f"{out} holds the experiment {before.experiment}: give another --out for {plan.experiment}"
            )
        known = {run.name: run for run in plan.runs}
        for run in before.runs:
            if run.name in known:
                refuse_changes(
                    out / "runs" / run.name,
                    run.settings,
                    known[run.name].settings,
                    resume_safe_settings(PretrainConfig),
                    plain(PretrainConfig()),
                )
        new = {run.name for run in plan.runs}
        plan.runs += [run for run in before.runs if run.name not in new]
        plan.runs.sort(key=lambda run: run.seed)  # stable: within a seed the order of the variants
        named = {one["name"] for one in plan.variants}
        plan.variants += [one for one in before.variants if one["name"] not in named]
    elif out.exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty and holds no plan: choose a new folder for --out")
    write_json(path, {"format": FORMAT, **asdict(plan)})
    return plan


def read_run_plan(out: Path) -> RunPlan:
    """The plan in a folder. Raises InputError where it is missing or damaged."""
    path = out / "plan.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise ValueError("another version wrote it")
        content["runs"] = [PlannedRun(**run) for run in content["runs"]]
        content["evaluations"] = [Evaluation(**one) for one in content["evaluations"]]
        return RunPlan(**content)
    except FileNotFoundError:
        raise InputError(f"{out} holds no plan.json: give the experiment and its data") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{path} is damaged ({' '.join(str(error).split())[:80]}): bring it back or delete it"
        ) from None


def settings_of(run: PlannedRun, out: Path) -> PretrainConfig:
    """A run's settings as `pretrain` takes them; its folder is where ``out`` is now."""
    content = {k: v for k, v in run.settings.items() if k != "out"}
    config: PretrainConfig = parse(f"run {run.name}", PretrainConfig, [], drop_none(content))
    config.out = os.path.join(out, "runs", run.name)
    kept = config.teacher.cache or config.teacher.view == "photo"
    if kept and not config.teacher.cache_folder:
        config.teacher.cache_folder = os.path.join(out, "teacher")  # one for all runs of a seed
    return config


def drop_none(content: dict[str, Any]) -> dict[str, Any]:
    """Without the settings that are not set."""
    return {
        key: drop_none(value) if isinstance(value, dict) else value
        for key, value in content.items()
        if value is not None
    }


def stage_one_key(settings: dict[str, Any]) -> str:
    """Equal for two runs exactly when their steps before the switch of stages are the same ones."""
    kept = {
        name: value
        for name, value in flatten(settings).items()
        if not name.startswith(resume_safe_settings(PretrainConfig))
        and not name.startswith(AFTER_STAGE_ONE)
    }
    return json.dumps(kept, sort_keys=True)
