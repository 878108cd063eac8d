"""Bars of the ladder, from nothing to the whole method (as the paper's Figure 1): accuracy of each rung."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cmt_mae.core.errors import InputError
from cmt_mae.core.text import printable
from cmt_mae.tools.inspect.canvas import NORMAL, SMALL, WIDTH

MEASURES = (("knn_mean", "k-NN top-1, %"), ("linear_mean", "linear probe top-1, %"))
"""Key in the file and title of the panel; features are the mean of the patch tokens."""
REFERENCES = ("untrained", "teacher")
"""Rungs that are no training: levels to compare with."""
SHOWN = {"cmt": "CMT-MAE", "mae": "MAE", "mvp": "MVP"}


@dataclass
class Rung:
    """One method, its seeds together."""

    name: str
    values: dict[str, list[float]]
    """Measure -> a number a seed."""


def read_ladder(path: Path) -> list[Rung]:
    """Rungs of a file of benchmarks.ladder, in its order. Raises InputError where it is none."""
    try:
        rows = json.loads(path.read_bytes())["rows"]
        rungs: dict[str, Rung] = {}
        for row in rows:
            name = re.sub(r"_s\d+$", "", str(row["name"]))
            rung = rungs.setdefault(name, Rung(name, {}))
            for measure, _ in MEASURES:
                rung.values.setdefault(measure, []).append(float(row[measure]))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; check the path") from error
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path} is no file of the ladder: give one that `python -m benchmarks.ladder` wrote"
        ) from error
    if not any(rung.name not in REFERENCES for rung in rungs.values()):
        raise InputError(f"{path} holds no trained rung: give a whole ladder.json")
    return list(rungs.values())


def ladder_figure(rungs: list[Rung]) -> Figure:
    """A panel a measure: a bar a rung (mean over seeds), a dot a seed, lines for no training and the teacher."""
    trained = [rung for rung in rungs if rung.name not in REFERENCES]
    figure = Figure(figsize=(WIDTH, 0.27 * len(trained) + 1.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(MEASURES), sharey=True, squeeze=False)[0]
    for axis, (measure, label) in zip(axes, MEASURES, strict=True):
        draw(axis, trained, measure)
        levels(axis, [rung for rung in rungs if rung.name in REFERENCES], measure)
        axis.set_xlabel(label, fontsize=SMALL + 0.5)
    names = [SHOWN.get(rung.name, rung.name.replace("_", " ")) for rung in trained]
    axes[0].set_yticks(range(len(trained)), [printable(n) for n in names], fontsize=SMALL + 0.5)
    axes[0].invert_yaxis()
    seeds = sorted({len(next(iter(rung.values.values()))) for rung in trained})
    many = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    figure.suptitle(f"bars: mean of {many} seed(s); dots: each seed", fontsize=NORMAL)
    return figure


def draw(axis: Axes, rungs: list[Rung], measure: str) -> None:
    """The bars of one panel."""
    for place, rung in enumerate(rungs):
        values = rung.values[measure]
        mean = float(np.mean(values))
        colour = "#D55E00" if rung.name == "cmt" else "#0072B2"
        axis.barh(place, mean, height=0.62, color=colour, alpha=0.8)
        if len(values) > 1:
            axis.plot(values, [place] * len(values), "o", color="black", markersize=2.5)
        axis.text(
            0.6, place, f"{mean:.1f}", va="center", fontsize=SMALL, color="white", fontweight="bold"
        )
    axis.set_xlim(0, 100)
    axis.tick_params(labelsize=SMALL, length=2)
    axis.grid(axis="x", color="0.9", linewidth=0.5)
    axis.set_axisbelow(True)
    for spine in ("top", "right"):
        axis.spines[spine].set_visible(False)


def levels(axis: Axes, rungs: list[Rung], measure: str) -> None:
    """Lines of what was not trained here, named above the axes."""
    place: Any = axis.get_xaxis_transform()
    for rung in rungs:
        mean = float(np.mean(rung.values[measure]))
        axis.axvline(mean, color="0.3", linewidth=0.9, linestyle="--")
        axis.text(
            mean, 1.01, f"{printable(rung.name)} {mean:.1f}", fontsize=SMALL - 0.5, ha="center",
            va="bottom", transform=place,
        )  # fmt: skip
