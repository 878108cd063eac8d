"""A run that does not learn: its likely cause and the mend, from its files alone (metrics, settings, bad images).

Causes come first: what the settings, images or teacher cannot give. Signs (collapse, a loss that stays, a k-NN
that stays) are told only where no cause explains them. Limits are set so that healthy recorded runs stay quiet
(tests/doctor) and sick ones do not (benchmarks/sick_runs.py, docs/results/doctor.md).
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from cmt_mae.core.metrics_file import read_metrics
from cmt_mae.engine.collapse import signs
from cmt_mae.engine.schedules import learning_rate
from cmt_mae.pretraining.settings import PretrainConfig
from cmt_mae.pretraining.stepping import Plan
from cmt_mae.tools.diagnose.finding import Finding, problem, warning
from cmt_mae.tools.diagnose.settings import FAR, check_settings, few_images
from cmt_mae.tools.diagnose.teacher import GREEDY, SAME, UNIFORM
from cmt_mae.tools.inspect.networks import read_config, read_plan

TARGETS = ("teacher", "pixel", "hog", "momentum")  # the first that a run predicts tells how it does
SETTLED = 100  # steps before which a loss says little
LEAST_MOVED = (
    0.02  # sum of the learning rate over all steps: AdamW moves a weight by no more; healthy: 0.1
)
NO_BETTER = 0.97  # of the loss of predicting 0
ROSE = 1.15  # loss at the end over its lowest: healthy runs stay below 1.05
EXPLODED = 1.5  # loss of any line over that of the first: healthy runs only fall
MEAN_ONLY = 0.05  # spread of predictions over that of targets; healthy small runs end at 0.2 to 0.6
LEAST_SPREAD = 1e-3  # of targets; healthy ones: 0.2 to 1.3
WAITING = 0.25
FLAT_KNN = 0.5  # points between the first and the best later k-NN


@dataclass
class Run:
    """What is known of a run."""

    path: Path
    config: PretrainConfig
    plan: Plan | None
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Lines of metrics with a loss, oldest first."""
    knn: list[tuple[int, float]] = field(default_factory=list)
    """(step, top-1 in percent)."""
    bad: list[str] = field(default_factory=list)
    """Lines of bad_images.txt: name and reason."""
    images: int = 0

    @property
    def step(self) -> int:
        """The last step that metrics tell of."""
        return self.rows[-1]["step"] if self.rows else 0

    @property
    def late(self) -> list[dict[str, Any]]:
        """The last quarter of the lines, at least one."""
        return self.rows[-max(1, len(self.rows) // 4) :] if self.rows else []


def read_run(folder: Path) -> Run:
    """Read a run directory. Raises InputError where the folder holds none, or its settings are damaged."""
    config, rows = read_config(folder), read_metrics(folder)
    bad = folder / "bad_images.txt"
    return Run(
        path=folder,
        config=config,
        plan=read_plan(folder),
        rows=[row for row in rows if "loss" in row],
        knn=[(row["step"], float(row["knn_top1"])) for row in rows if "knn_top1" in row],
        bad=bad.read_text(errors="replace").splitlines() if bad.is_file() else [],
        images=count_images(folder),
    )


def count_images(folder: Path) -> int:
    """How many images the run has, by its run.json; 0 where that does not say so."""
    try:
        return int(json.loads((folder / "run.json").read_bytes())["data"]["images"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return 0


def diagnose(run: Run) -> list[Finding]:
    """Likely causes first, problems before warnings; nothing for a run that does well."""
    causes = [*check_settings(run.config, run.plan)] if run.plan else []
    if run.rows:
        for rule in (not_finite, off_centre, dull_images, too_low, too_high):
            causes += rule(run)
        if not dull_images(run):  # before which any teacher is blind
            causes += blind_teacher(run)
    if not any(one.level == "problem" for one in causes) and run.rows:
        for rule in (collapsed, no_better, mean_only, flat_knn):
            causes += rule(run)
    for rule in (broken, waiting):
        causes += rule(run)
    causes += few_images(run.images)
    unique = list({one.what: one for one in reversed(causes)}.values())[::-1]
    return sorted(unique, key=lambda one: one.level != "problem")


def facts_of(run: Run) -> dict[str, Any]:
    """Where the run stands, in plain numbers."""
    total = run.plan.total_steps if run.plan else None
    last = run.rows[-1] if run.rows else {}
    return {
        "path": str(run.path),
        "step": run.step,
        "total_steps": total,
        "state": "finished" if total and run.step >= total else "not finished",
        "stage": last.get("stage"),
        "losses": {
            name: round(value, 4) for name, value in last.items() if name.startswith("loss")
        },
        "knn_top1": [list(one) for one in run.knn],
        "skipped_steps": sum(int(row.get("skipped_steps", 0)) for row in run.rows),
        "bad_images": len(run.bad),
        "images_per_second": last.get("images_per_second"),
        "data_wait_share": last.get("data_wait_share"),
    }


# --- causes ------------------------------------------------------------------------------------


def not_finite(run: Run) -> list[Finding]:
    """Steps that were skipped."""
    skipped = sum(int(row.get("skipped_steps", 0)) for row in run.rows)
    if not skipped:
        return []
    first = next(row["step"] for row in run.rows if row.get("skipped_steps"))
    made = problem if skipped > 0.01 * run.step else warning
    return [made(
        "run", "steps that are not finite", f"{skipped} of {run.step} steps were skipped, the first up to "
        f"step {first}",
        f"{lower_blr(run)}, or --optim.clip 1; on a GPU try --precision fp32",
    )]  # fmt: skip


def off_centre(run: Run) -> list[Finding]:
    """Images that are far from 0 after normalisation."""
    centre = late_mean(run, "image_mean")
    if not abs(centre) > FAR:
        return []
    return [problem(
        "run", "normalisation wrong", f"normalised images have mean {centre:.2f}; with the right mean and std "
        f"it is near 0",
        "leave data.mean and data.std out, or give them for pixels in 0..1",
    )]  # fmt: skip


def blind_teacher(run: Run) -> list[Finding]:
    """A teacher whose attention chooses nothing."""
    entropy, mass = late_mean(run, "entropy_teacher"), late_mean(run, "class_mass_teacher")
    if entropy > UNIFORM:
        return [problem(
            "run", "teacher attends to nothing",
            f"entropy of its attention is {entropy:.4f} of the uniform map's: random weights, or the wrong file",
            "another --teacher, or --mask.rule random",
        )]  # fmt: skip
    if mass > GREEDY:
        return [warning(
            "run", "attention stays on the class token", f"{mass:.1%} of the teacher's: the mask follows noise",
            "another --teacher, or --mask.rule random",
        )]  # fmt: skip
    return []


def dull_images(run: Run) -> list[Finding]:
    """Targets that are the same for every image: the images are, or the teacher cannot tell them apart."""
    for name in TARGETS[:-1]:
        share, spread = (
            late_mean(run, f"image_share_{name}"),
            late_mean(run, f"spread_target_{name}"),
        )
        if spread < LEAST_SPREAD:
            why = f"the {name} targets are all the same (their spread is {spread:.2g})"
        elif share < SAME:
            why = f"images make {share:.2%} of the variance of the {name} targets, places in them the rest"
        else:
            continue
        mend = "look at the images (one colour? the same crop of a scan?) and at the teacher"
        return [problem("run", "images say nothing", why, mend)]
    return []


def too_low(run: Run) -> list[Finding]:
    """A learning rate that cannot move the weights within this run."""
    plan, optim = run.plan, run.config.optim
    epochs = run.config.epochs
    if plan is None or plan.total_steps < SETTLED or optim.warmup_epochs >= epochs:
        return []  # told as too few steps, as a warm-up that is too long
    points = [epochs * (i + 0.5) / 200 for i in range(200)]
    rates = [learning_rate(e, plan.lr, optim.warmup_epochs, epochs, optim.min_lr) for e in points]
    moved = fmean(rates) * plan.total_steps
    if moved >= LEAST_MOVED:
        return []
    return [problem(
        "run", "learning rate too low", f"over all {plan.total_steps} steps it sums up to {moved:.2g}, and "
        "AdamW moves a weight "
        "by no more than that", f"--optim.blr {optim.blr * max(2.0, min(1000.0, 0.2 / moved)):.2g}, or more "
        f"--epochs",
    )]  # fmt: skip


def too_high(run: Run) -> list[Finding]:
    """A loss that rises again: at its end, or to a level that it never leaves."""
    values = losses(run)
    if len(values) < 4 or run.step < SETTLED:
        return []
    lowest, end = min(values), fmean(values[-max(1, len(values) // 8) :])
    if max(values[1:]) > EXPLODED * values[0]:
        lowest, end = values[0], max(values[1:])
    elif end <= ROSE * lowest:
        return []
    return [problem(
        "run", "learning rate too high", f"the loss of the {predicted(run)} target rose from {lowest:.3g} to "
        f"{end:.3g}",
        f"{lower_blr(run)}, or longer --optim.warmup_epochs",
    )]  # fmt: skip


def lower_blr(run: Run) -> str:
    """A third of the learning rate, as an option."""
    return f"--optim.blr {run.config.optim.blr / 3:.2g} ({run.config.optim.blr:g} now)"


# --- signs -------------------------------------------------------------------------------------


def collapsed(run: Run) -> list[Finding]:
    """Features or attention that say nothing about the images any more."""
    found = signs({name: late_mean(run, name) for name in run.late[-1]})
    if not found:
        return []
    return [problem(
        "run", "collapse", f"at step {run.step}: {', '.join(found)}",
        f"{lower_blr(run)}; where the momentum student alone is the target: --momentum.start 0.99 or more, "
        "--target.norm layer_norm, or mix in a teacher (alpha 0.3)",
    )]  # fmt: skip


def no_better(run: Run) -> list[Finding]:
    """A loss that is no better than predicting 0."""
    level = zero_level(run.config)
    values = losses(run)
    if level is None or not values or run.step < 2 * SETTLED or late_of(values) < NO_BETTER * level:
        return []
    return [problem(
        "run", "no better than predicting 0", f"the loss of the {predicted(run)} target is "
        f"{late_of(values):.3g} after "
        f"{run.step} steps; predicting 0 gives {level:g}",
        f"more steps, or another learning rate ({run.config.optim.blr:g} now): three times as much, then a third",
    )]  # fmt: skip


def mean_only(run: Run) -> list[Finding]:
    """Predictions that are nearly the same everywhere."""
    name = predicted(run)
    wide, narrow = (
        late_mean(run, f"spread_target_{name}"),
        late_mean(run, f"spread_prediction_{name}"),
    )
    if run.step < 2 * SETTLED or not narrow < MEAN_ONLY * wide:
        return []
    return [problem(
        "run", "predicts the mean", f"spread of predictions is {narrow / wide:.1%} of that of the targets "
        f"after {run.step} steps",
        f"more steps; else {lower_blr(run)}, or --mask.ratio 0.6 ({run.config.mask.ratio:g} now)",
    )]  # fmt: skip


def flat_knn(run: Run) -> list[Finding]:
    """k-NN accuracy that does not rise."""
    if len(run.knn) < 3 or run.step < 2 * SETTLED:
        return []
    first, best = run.knn[0][1], max(value for _, value in run.knn[1:])
    if best > first + FLAT_KNN:
        return []
    few = f"; {run.images} images are few: more of them" if 0 < run.images < 1000 else ""
    return [warning(
        "run", "k-NN does not rise", f"{first:.1f} at step {run.knn[0][0]}, at best {best:.1f} later, while "
        "the loss went from "
        f"{losses(run)[0]:.3g} to {losses(run)[-1]:.3g}",
        f"--target.tokens all+cls --mask.ratio 0.5, more steps, a stronger --teacher{few}",
    )]  # fmt: skip


# --- beside the learning -------------------------------------------------------------------------


def broken(run: Run) -> list[Finding]:
    """Images that could not be read."""
    if not run.bad:
        return []
    seen = max(1, min(run.images or 1, run.step * run.config.batch_size))
    made = problem if len(run.bad) > run.config.data.max_bad * seen else warning
    return [made(
        "run", "broken images", f"{len(run.bad)} of {seen} seen, first {run.bad[0].replace(chr(9), ': ')}",
        f"mend or delete those in {run.path / 'bad_images.txt'}",
    )]  # fmt: skip


def waiting(run: Run) -> list[Finding]:
    """Time spent waiting for images, after the first lines."""
    shares = [row["data_wait_share"] for row in run.rows[1:] if "data_wait_share" in row]
    if not shares or fmean(shares) <= WAITING:
        return []
    return [warning(
        "run", "waiting for data", f"{fmean(shares):.0%} of the time (data.workers {run.config.data.workers})",
        "more --workers where there are cores, cmt-mae pack --size 256 once, or a faster disk",
    )]  # fmt: skip


# --- numbers -------------------------------------------------------------------------------------


def predicted(run: Run) -> str:
    """The target that tells how the run does: the teacher's where it is predicted, else the only one."""
    return next((name for name in TARGETS if any(f"loss_{name}" in row for row in run.rows)), "")


def losses(run: Run) -> list[float]:
    """Loss of that target, line by line; lines that are not finite are left out."""
    name = f"loss_{predicted(run)}"
    return [row[name] for row in run.rows if name in row and math.isfinite(row[name])]


def late_of(values: list[float]) -> float:
    """Mean of the last quarter."""
    return fmean(values[-max(1, len(values) // 4) :])


def late_mean(run: Run, name: str) -> float:
    """Mean of a number over the last quarter of the lines; nan, which no limit is met by, where it is missing."""
    values = [row[name] for row in run.late if isinstance(row.get(name), int | float)]
    finite = [float(value) for value in values if math.isfinite(value)]
    return fmean(finite) if finite else math.nan


def zero_level(config: PretrainConfig) -> float | None:
    """Loss of predicting 0, where the target's normalisation fixes it."""
    target = config.target
    if target.loss != "mse" or target.reduce != "mean":
        return None
    return 1.0 if target.norm in ("layer_norm", "mae") else None
