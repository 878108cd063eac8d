"""The charts of a run: which numbers of metrics.jsonl belong together, and what they mean.

The page of `report` and `watch` draws these.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from cmt_mae.core.run_reader import RunRecord
from cmt_mae.core.text import one_line

POINTS = 600
"""Points of a chart for one run, and for several together so many more that the page stays small."""
ALL_POINTS = 4000
TABLE_ROWS = 9
"""Lines of the table under a chart."""
SAME = (*((f"loss_{name}", "loss") for name in ("teacher", "momentum", "pixel", "hog")),)
"""Pairs of which the second is left out where it is the first throughout."""


@dataclass(frozen=True)
class Chart:
    """A chart that a run may have."""

    key: str
    title: str
    reading: str
    """One sentence on how to read it."""
    names: tuple[str, ...]
    """Of metrics; one that ends with ``_`` stands for all that begin with it."""
    unit: str = ""
    factor: float = 1.0
    chance: float | None = None
    """A level that says nothing, drawn as a line."""
    only_if_any: bool = False
    """Left out where every value is 0."""


CHARTS = (
    Chart("loss", "Loss",
          "Lower is better within a stage; the stages predict different things and do not compare.",
          ("loss", "loss_")),
    Chart("knn", "k-NN accuracy while training", "Votes of the nearest features; nothing is trained.",
          ("knn_top1",), "%"),
    Chart("val", "Validation while training", "On the images that are held out.", ("val_",)),
    Chart("lr", "Learning rate", "Warm-up, then a cosine to the end.", ("lr",)),
    Chart("alpha", "Weight of the momentum student (alpha)",
          "0 in stage one: the teacher alone. From the switch on, Eqs. 3 (mask) and 4 (loss).",
          ("alpha", "alpha_mask", "alpha_loss")),
    Chart("overlap", "Overlap of the two attentions",
          "Share of the teacher's most attended quarter of patches that the student attends to most as well.",
          ("overlap",), chance=0.25),
    Chart("entropy", "Entropy of attention",
          "1 = spread evenly over all patches; near 0 = one patch takes all.", ("entropy_",)),
    Chart("spread", "Spread of features", "Near 0 = collapse: every token has the same feature.", ("spread_",)),
    Chart("rank", "Effective rank of the targets", "1 = all targets on one line: nothing left to predict.",
          ("rank_target_",)),
    Chart("explained", "Share of the target explained beyond a constant",
          "0 = no better than the mean of all targets: the loss may fall and nothing is learnt of the images.",
          ("explained_",)),
    Chart("other_image", "Loss with another image's latents",
          "What it adds to the loss shows how much the decoder takes from the visible patches; 0 = nothing.",
          ("other_image_loss", "image_gain")),
    Chart("half_lives", "Half-lives of the momentum student",
          "How often the average has lost half of its start since the switch; below about 3 it is mostly old.",
          ("half_lives",)),
    Chart("image_share", "Share of the variance among images",
          "Near 0 = the features say where a patch is, not what is on it.", ("image_share_",)),
    Chart("class_mass", "Attention of the class token to itself",
          "What it does not spend on patches: a high share leaves little to guide the mask.", ("class_mass_",)),
    Chart("gradient", "Norm of the gradient", "Peaks stand for steps that hurt.", ("gradient_norm",)),
    Chart("speed", "Images per second", "Of all processes together.", ("images_per_second",)),
    Chart("wait", "Share of time spent waiting for data", "High = the loader is too slow: more workers, or pack.",
          ("data_wait_share",), "%", 100.0),
    Chart("memory", "Peak memory", "Of the GPU, or of the process on a CPU.", ("peak_memory_gb",), "GB"),
    Chart("skipped", "Steps skipped", "Their loss or gradient was not finite.",
          ("skipped_steps",), only_if_any=True),
    Chart("signs", "Signs of collapse", "How many of the numbers above are below their healthy least.",
          ("collapse_signs",), only_if_any=True),
)  # fmt: skip

NETWORKS = {
    "teacher": "teacher", "momentum": "momentum student", "student": "student", "decoder": "decoder",
    "collab": "both", "pixel": "pixel", "hog": "HOG",
}  # fmt: skip
"""What numbers are of -> word in a legend."""
LABELS = {
    "loss": "whole loss", "lr": "learning rate", "knn_top1": "k-NN top-1", "alpha_mask": "mask (Eq. 3)",
    "alpha_loss": "loss (Eq. 4)", "overlap": "teacher and momentum student",
    "images_per_second": "images per second", "data_wait_share": "waiting",
    "other_image_loss": "loss", "image_gain": "added to the loss",
    "peak_memory_gb": "peak memory", "collapse_signs": "signs",
}  # fmt: skip
OF_NETWORKS = (
    ("loss_", "{} loss"), ("spread_target_", "{} targets"), ("spread_prediction_", "predicted {} targets"),
    ("rank_target_", "{} targets"), ("explained_", "{} targets"), ("entropy_", "{}"), ("spread_", "{} output"),
    ("image_share_", "{}"), ("class_mass_", "{}"),
)  # fmt: skip
"""Beginning of a metric's name -> its label, with the network's word."""


def label_of(name: str) -> str:
    """``spread_prediction_teacher`` -> ``predicted teacher targets``; an unknown name without its underscores."""
    if name in LABELS:
        return LABELS[name]
    for start, words in OF_NETWORKS:
        network = NETWORKS.get(name.removeprefix(start)) if name.startswith(start) else None
        if network is not None:
            return words.format(network)
    return one_line(name.replace("_", " "), 60)


def charts(records: list[RunRecord]) -> list[dict[str, Any]]:
    """Every chart that has something to show, as the page's script and template take it.

    x is in epochs where every run says how many steps make one, else in steps. A chart holds one table a
    run: ``x``, ``steps`` and the values of each name, null where there is none.
    """
    in_epochs = all(record.plan("steps_per_epoch") for record in records)
    every = [rows_of(record) for record in records]
    points = min(POINTS, max(60, ALL_POINTS // len(records)))
    found = []
    for chart in CHARTS:
        tables = []
        for place, (record, rows) in enumerate(zip(records, every, strict=True)):
            table = table_of(chart, rows, points, record.switch_step)
            if table is None:
                continue
            per = record.plan("steps_per_epoch") if in_epochs else 1
            table["run"], table["x"] = place, [round(step / per, 5) for step in table["steps"]]
            table["words"] = [in_words(one, table["steps"], chart.unit) for one in table["lines"]]
            tables.append(table)
        if tables:
            about = {
                name: getattr(chart, name) for name in ("key", "title", "reading", "unit", "chance")
            }
            found.append({**about, "x_name": "epoch" if in_epochs else "step", "tables": tables})
    return found


def rows_of(record: RunRecord) -> list[dict[str, float]]:
    """One line per step, in order, with alpha of Eqs. 3 and 4, which is a setting and is not logged.

    Both sides of the switch of stages are there, so that a line of alpha rises where it did.
    """
    alpha, switch = alphas(record), record.switch_step
    by_step: dict[int, dict[str, float]] = {}  # one line per step: k-NN has lines of its own
    for row in record.rows:
        step = int(row["step"])
        logged = {} if alpha is None or "knn_top1" in row else alpha(step)
        by_step.setdefault(step, {}).update({**row, **logged})
    if alpha is not None and switch is not None:
        for step in (switch, switch + 1):
            if 0 < step <= record.last_step:
                by_step.setdefault(step, {"step": step}).update(alpha(step))
    return [by_step[step] for step in sorted(by_step)]


def alphas(record: RunRecord) -> Callable[[int], dict[str, float]] | None:
    """Step -> alpha (or alpha_mask and alpha_loss) of the step that ended there; None for a run of one stage."""
    switch, per = record.switch_step, record.plan("steps_per_epoch")
    base = record.number("alpha")
    if switch is None or math.isnan(base) or not per:
        return None
    ramp = record.number("alpha_ramp_epochs", 0.0) * per
    full = {name: record.number(name, base) for name in ("alpha_mask", "alpha_loss")}
    if full["alpha_mask"] == full["alpha_loss"]:
        full = {"alpha": full["alpha_mask"]}

    def at(step: int) -> dict[str, float]:
        done = step - 1 - switch  # the line of step n tells of the step that began at n - 1
        share = 0.0 if done < 0 else min(1.0, (done + 1) / ramp) if ramp else 1.0
        return {name: share * value for name, value in full.items()}

    return at


def table_of(
    chart: Chart, rows: list[dict[str, float]], points: int, switch: int | None = None
) -> dict[str, Any] | None:
    """Steps and lines of one chart of one run, the switch kept; None where it has nothing to show."""
    names = names_of(chart, rows)
    having = [row for row in rows if any(name in row for name in names)]
    if not names or (chart.only_if_any and not any(row.get(n) for row in having for n in names)):
        return None
    sides = () if switch is None else (switch, switch + 1)
    places = {place for place, row in enumerate(having) if row["step"] in sides}
    kept = [having[place] for place in sorted(places | {*thinned(having, names, points)})]
    lines = [
        {
            "label": label_of(name),
            "values": [short(row.get(name, math.nan) * chart.factor) for row in kept],
        }
        for name in names
    ]
    lines = [line for line in lines if any(value is not None for value in line["values"])]
    if not lines:
        return None
    return {"steps": [int(row["step"]) for row in kept], "lines": lines}


def names_of(chart: Chart, rows: list[dict[str, float]]) -> list[str]:
    """The metrics of a chart that occur, in the order in which the chart lists them, then in their own."""
    there: dict[str, None] = {}
    for row in rows:
        there.update(dict.fromkeys(row))
    found: list[str] = []
    for wanted in chart.names:
        for name in there:
            fits = name.startswith(wanted) if wanted.endswith("_") else name == wanted
            if fits and len(name) <= 60 and name.isprintable() and name not in found:
                found.append(name)
    for name, other in SAME:
        if {name, other} <= set(found) and all(_same(row, name, other) for row in rows):
            found.remove(other)
    return found[:12]


def _same(row: dict[str, float], name: str, other: str) -> bool:
    """Whether a line holds one number under both names, or neither."""
    one, two = row.get(name), row.get(other)
    return one == two or (
        one is not None and two is not None and math.isnan(one) and math.isnan(two)
    )


def thinned(rows: list[dict[str, float]], names: Iterable[str], points: int) -> list[int]:
    """Places of about ``points`` rows that keep both ends, and every peak and dip of every line."""
    names = list(names)
    if len(rows) <= points:
        return list(range(len(rows)))
    buckets = max(1, points // (2 * len(names)))
    kept = {0, len(rows) - 1}
    for bucket in range(buckets):
        inside = range(bucket * len(rows) // buckets, (bucket + 1) * len(rows) // buckets)
        for name in names:
            there = [p for p in inside if math.isfinite(rows[p].get(name, math.nan))]
            if there:
                kept.add(min(there, key=lambda p, n=name: rows[p][n]))  # type: ignore[misc]
                kept.add(max(there, key=lambda p, n=name: rows[p][n]))  # type: ignore[misc]
    return sorted(kept)


def short(value: float) -> float | None:
    """Five digits are more than a screen shows; None for what is not finite."""
    if not math.isfinite(value):
        return None
    rounded = float(f"{value:.5g}")
    return int(rounded) if rounded == int(rounded) and abs(rounded) < 1e15 else rounded


def in_words(line: dict[str, Any], steps: list[int], unit: str) -> str:
    """``whole loss: 1.58 at step 4, 0.39 at step 60, least 0.37 (step 56), most 1.58 (step 4)``."""
    pairs = [(s, v) for s, v in zip(steps, line["values"], strict=True) if v is not None]
    (first, begin), (last, end) = pairs[0], pairs[-1]
    unit = f" {unit}" if unit else ""
    if len(pairs) == 1:
        return f"{line['label']}: {shown(end)}{unit} at step {last}"
    low, high = min(pairs, key=lambda p: p[1]), max(pairs, key=lambda p: p[1])
    text = (
        f"{line['label']}: {shown(begin)}{unit} at step {first}, {shown(end)}{unit} at step {last}"
    )
    if low[1] == high[1]:
        return f"{line['label']}: {shown(end)}{unit} throughout"
    return f"{text}; least {shown(low[1])} (step {low[0]}), most {shown(high[1])} (step {high[0]})"


def shown(value: float | None) -> str:
    """A number in at most four digits; an en dash for none."""
    return "–" if value is None else f"{value:.4g}"


def sampled(table: dict[str, Any]) -> list[dict[str, Any]]:
    """Evenly spaced lines of a chart's table, for the table under it: step, x and one text per number."""
    count = len(table["steps"])
    rows = min(count, TABLE_ROWS)
    places = sorted({round(i * (count - 1) / max(1, rows - 1)) for i in range(rows)})
    return [
        {
            "step": table["steps"][place],
            "x": table["x"][place],
            "values": [shown(line["values"][place]) for line in table["lines"]],
        }
        for place in places
    ]
