"""A run that does not learn: its likely cause and how to fix it, from its files alone.

Causes come first: what the settings, images or teacher cannot give. Signs (collapse, a loss that stays, a k-NN
that stays) are told only where no cause explains them. Limits are set so that healthy recorded runs stay quiet
(tests/tools/test_doctor.py) and sick ones do not (benchmarks/sick_runs.py, docs/results/doctor.md).
"""

import math
from statistics import fmean

from cmt_mae.core.run_reader import RunRecord, section
from cmt_mae.engine.collapse import FIX, signs
from cmt_mae.tools.diagnose.finding import Finding, problem, warning
from cmt_mae.tools.diagnose.limits import FAR, GREEDY, SAME, UNIFORM
from cmt_mae.tools.diagnose.settings import check_settings, few_images

TARGETS = ("teacher", "pixel", "hog", "momentum")  # the first that a run predicts tells how it does
SETTLED = 100  # steps before which a loss says little
LEAST_MOVED = 0.02
"""Sum of the learning rate over all steps: AdamW moves a weight by no more; healthy: 0.1."""
NO_BETTER = 0.97  # of the loss of predicting 0
ROSE = 1.15  # loss at the end over its lowest: healthy runs stay below 1.05
EXPLODED = 1.5  # loss of any line over that of the first: healthy runs only fall
MEAN_ONLY = 0.05  # spread of predictions over that of targets; healthy small runs end at 0.2 to 0.6
LEAST_SPREAD = 1e-3  # of targets; healthy ones: 0.2 to 1.3
LOST = 0.1  # share of steps skipped from which it is a problem
WAITING = 0.25  # share of the time
FLAT_KNN = 0.5  # points between the first and the best later k-NN


def diagnose(run: RunRecord) -> list[Finding]:
    """Likely causes first, problems before warnings; nothing for a run that does well."""
    causes = check_settings(run) if run.total_steps else []
    if late(run):
        for rule in (not_finite, off_centre, dull_images, too_low, too_high):
            causes += rule(run)
        if not dull_images(run):  # before which any teacher is blind
            causes += blind_teacher(run)
        if losses(run) and not any(one.level == "problem" for one in causes):
            for rule in (collapsed, no_better, mean_only, flat_knn):
                causes += rule(run)
    for rule in (broken, waiting):
        causes += rule(run)
    causes += few_images(run.images)
    unique = list({one.what: one for one in reversed(causes)}.values())[::-1]
    return sorted(unique, key=lambda one: one.level != "problem")


# --- causes ------------------------------------------------------------------------------------


def not_finite(run: RunRecord) -> list[Finding]:
    """Steps that were skipped."""
    skipped = skipped_steps(run)
    if not skipped:
        return []
    first = next(row["step"] for row in run.rows if row.get("skipped_steps", 0) > 0)
    made = problem if skipped > LOST * run.last_step else warning
    return [made(
        "run", "steps that are not finite",
        f"{skipped} of {run.last_step} steps were skipped, the first up to step {first}",
        f"{lower_blr(run)}, or --optim.clip 1; on a GPU try --precision fp32; the warnings name the first part "
        "that was not finite",
    )]  # fmt: skip


def off_centre(run: RunRecord) -> list[Finding]:
    """Images that are far from 0 after normalisation."""
    centre = late_mean(run, "image_mean")
    if not abs(centre) > FAR:
        return []
    return [problem(
        "run", "normalisation wrong",
        f"normalised images have mean {centre:.2f}; with the right mean and std it is near 0",
        "leave data.mean and data.std out, or give them for pixels in 0..1",
    )]  # fmt: skip


def blind_teacher(run: RunRecord) -> list[Finding]:
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


def dull_images(run: RunRecord) -> list[Finding]:
    """Targets that are the same for every image: the images are alike, or the teacher sees no difference."""
    for name in TARGETS[:-1]:
        share = late_mean(run, f"image_share_{name}")
        spread = late_mean(run, f"spread_target_{name}")
        if spread < LEAST_SPREAD:
            why = f"the {name} targets are all the same (their spread is {spread:.2g})"
        elif share < SAME:
            why = f"images make {share:.2%} of the variance of the {name} targets, places in them the rest"
        else:
            continue
        fix = "look at the images (one colour? the same crop of a scan?) and at the teacher"
        return [problem("run", "images say nothing", why, fix)]
    return []


def too_low(run: RunRecord) -> list[Finding]:
    """A learning rate that cannot move the weights within this run."""
    epochs, warmup, steps = run.number("epochs"), run.number("optim.warmup_epochs"), run.total_steps
    peak, blr = section(run.facts, "plan").get("lr"), run.number("optim.blr")
    if not isinstance(peak, float) or steps < SETTLED or not warmup < epochs:
        return []  # told as too few steps, as a warm-up that is too long
    rising = warmup / epochs  # then half a cosine, whose mean is that of its two ends
    moved = steps * (rising * peak + (1 - rising) * (peak + run.number("optim.min_lr", 0.0))) / 2
    if moved >= LEAST_MOVED:
        return []
    return [problem(
        "run", "learning rate too low",
        f"over all {steps} steps it sums up to {moved:.2g}, and AdamW moves a weight by no more than that",
        f"--optim.blr {blr * max(2.0, min(1000.0, 0.2 / moved)):.2g}, or more --epochs",
    )]  # fmt: skip


def too_high(run: RunRecord) -> list[Finding]:
    """A loss that rises again: at its end, or to a level that it never leaves."""
    values = losses(run)
    if len(values) < 4 or run.last_step < SETTLED:
        return []
    lowest, end = min(values), fmean(values[-max(1, len(values) // 8) :])
    if max(values[1:]) > EXPLODED * values[0]:
        lowest, end = values[0], max(values[1:])
    elif end <= ROSE * lowest:
        return []
    return [problem(
        "run", "learning rate too high",
        f"the loss of the {predicted(run)} target rose from {lowest:.3g} to {end:.3g}",
        f"{lower_blr(run)}, or longer --optim.warmup_epochs",
    )]  # fmt: skip


def lower_blr(run: RunRecord) -> str:
    """A third of the learning rate, as an option."""
    blr = run.number("optim.blr")
    return "a lower --optim.blr" if math.isnan(blr) else f"--optim.blr {blr / 3:.2g} ({blr:g} now)"


# --- signs -------------------------------------------------------------------------------------


def collapsed(run: RunRecord) -> list[Finding]:
    """Features or attention that say nothing about the images any more."""
    rows = late(run)
    found = signs({name: late_mean(run, name) for name in rows[-1]})
    if not found:
        return []
    watched = [row for row in run.log_rows() if "loss" in row]
    healthy = max((place for place, row in enumerate(watched) if not signs(row)), default=-1)
    since = watched[min(healthy + 1, len(watched) - 1)]["step"]
    return [problem(
        "run", "signs of collapse", f"since step {since:.0f}, {', '.join(found)}",
        f"{FIX}: {lower_blr(run)}; where the momentum student alone is the target: "
        "--momentum.start 0.99 or more, --target.norm layer_norm, or mix in a teacher (alpha 0.3)",
    )]  # fmt: skip


def no_better(run: RunRecord) -> list[Finding]:
    """A loss that is no better than predicting 0, where the target's normalisation fixes that loss at 1."""
    values = losses(run)
    fixed = run.setting("target.loss") == "mse" and run.setting("target.reduce") == "mean"
    if not fixed or run.setting("target.norm") not in ("layer_norm", "mae"):
        return []
    if run.last_step < 2 * SETTLED or late_of(values) < NO_BETTER:
        return []
    return [problem(
        "run", "no better than predicting 0",
        f"the loss of the {predicted(run)} target is {late_of(values):.3g} after {run.last_step} steps; "
        "predicting 0 gives 1",
        f"more steps, or another learning rate ({run.number('optim.blr'):g} now): three times it, then a third",
    )]  # fmt: skip


def mean_only(run: RunRecord) -> list[Finding]:
    """Predictions that are nearly the same everywhere."""
    name = predicted(run)
    wide = late_mean(run, f"spread_target_{name}")
    narrow = late_mean(run, f"spread_prediction_{name}")
    if run.last_step < 2 * SETTLED or not narrow < MEAN_ONLY * wide:
        return []
    return [problem(
        "run", "predicts the mean",
        f"spread of predictions is {narrow / wide:.1%} of that of the targets after {run.last_step} steps",
        f"more steps; else {lower_blr(run)}, or --mask.ratio 0.6 ({run.number('mask.ratio'):g} now)",
    )]  # fmt: skip


def flat_knn(run: RunRecord) -> list[Finding]:
    """k-NN accuracy that does not rise."""
    knn = run.knn()
    if len(knn) < 3 or run.last_step < 2 * SETTLED:
        return []
    first, best = knn[0][1], max(value for _, value in knn[1:])
    if best > first + FLAT_KNN:
        return []
    few = f"; {run.images} images are few: more of them" if 0 < run.images < 1000 else ""
    return [warning(
        "run", "k-NN does not rise",
        f"{first:.1f} at step {knn[0][0]}, at best {best:.1f} later, while the loss went from "
        f"{losses(run)[0]:.3g} to {losses(run)[-1]:.3g}",
        f"--target.tokens all+cls --mask.ratio 0.5, more steps, a stronger --teacher{few}",
    )]  # fmt: skip


# --- beside the learning -------------------------------------------------------------------------


def broken(run: RunRecord) -> list[Finding]:
    """Images that could not be read."""
    if not run.bad_images:
        return []
    count, (name, reason) = len(run.bad_images), run.bad_images[0]
    batch = int(run.number("batch_size", 1))
    seen = max(1, min(run.images or 1, run.last_step * batch))
    made = problem if count > run.number("data.max_bad", 0.01) * seen else warning
    return [made(
        "run", "broken images", f"{count} of {seen} seen, first {name}: {reason}",
        f"repair or delete those in {run.path / 'bad_images.txt'}",
    )]  # fmt: skip


def waiting(run: RunRecord) -> list[Finding]:
    """Time spent waiting for images, after the first lines."""
    shares = [row["data_wait_share"] for row in run.rows if "data_wait_share" in row][1:]
    if not shares or not fmean(shares) > WAITING:
        return []
    return [warning(
        "run", "waiting for data", f"{fmean(shares):.0%} of the time (data.workers {run.setting('data.workers')})",
        "more --workers where there are cores, cmt-mae pack --size 256 once, or a faster disk",
    )]  # fmt: skip


# --- numbers -------------------------------------------------------------------------------------


def skipped_steps(run: RunRecord) -> int:
    """How many steps were left out because a number was not finite."""
    counts = [row.get("skipped_steps", 0.0) for row in run.rows]
    return int(sum(count for count in counts if math.isfinite(count) and count > 0))


def predicted(run: RunRecord) -> str:
    """The target that tells how the run does: the teacher's where it is predicted, else the only one."""
    return next((name for name in TARGETS if any(f"loss_{name}" in row for row in run.rows)), "")


def losses(run: RunRecord) -> list[float]:
    """Loss of that target, line by line; lines that are not finite are left out."""
    name = f"loss_{predicted(run)}"
    return [row[name] for row in run.rows if name in row and math.isfinite(row[name])]


def late_of(values: list[float]) -> float:
    """Mean of the last quarter."""
    return fmean(values[-max(1, len(values) // 4) :])


def late(run: RunRecord) -> list[dict[str, float]]:
    """The last quarter of the lines with a loss, at least one."""
    rows = [row for row in run.rows if "loss" in row]
    return rows[-max(1, len(rows) // 4) :]


def late_mean(run: RunRecord, name: str) -> float:
    """Mean of a number over the last quarter of the lines; nan, which no limit is met by, where it is missing."""
    finite = [row[name] for row in late(run) if math.isfinite(row.get(name, math.nan))]
    return fmean(finite) if finite else math.nan
