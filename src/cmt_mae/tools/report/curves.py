"""Curves of a run from its metrics: losses, attention, alpha, features, accuracy, speed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from cmt_mae.core.text import printable
from cmt_mae.tools.report.canvas import NORMAL, SMALL, WIDTH

Row = dict[str, Any]
CHANCE = 0.25
"""Overlap of two top quarters drawn at random."""
ACROSS = 3
"""Panels in a row."""
MOST_POINTS = 400
"""Of a curve; longer ones are averaged, so that a picture of a long run is no band of ink."""
COLOURS = {
    "teacher": "#0072B2", "momentum": "#D55E00", "collab": "#009E73", "": "#333333",
}  # fmt: skip
"""Of the networks, the same in every panel; told apart by the colour-blind too (Okabe and Ito)."""
WORDS = {"teacher": "teacher", "momentum": "student", "collab": "both", "": "all"}
STYLES = {"teacher": "-", "momentum": "--", "collab": "-.", "": "-"}


@dataclass
class Panel:
    """One set of axes."""

    title: str
    names: tuple[str, ...]
    """Metrics in it: those that begin with these words, the network's name behind."""
    lowest: float | None = None
    """Where the axis begins; None: by the data."""
    line: tuple[float, str] | None = None
    """A level to compare with, and its name."""
    log: bool = False


PANELS = (
    Panel("loss", ("loss",)),
    Panel("overlap of the top quarters", ("overlap",), 0.0, (CHANCE, "chance")),
    Panel("entropy of attention / uniform", ("entropy",)),
    Panel("alpha", ("alpha_mask", "alpha_loss"), 0.0),
    Panel("attention on the class token", ("class_mass",), 0.0),
    Panel("spread of targets", ("spread_target",), 0.0),
    Panel("spread of predictions", ("spread_prediction",), 0.0),
    Panel("effective rank of targets", ("rank_target",), 0.0),
    Panel("share of variance between images", ("image_share",), 0.0),
    Panel("k-NN top-1, %", ("knn_top1",)),
    Panel("norm of the gradient", ("gradient_norm",), log=True),
    Panel("learning rate", ("lr",), 0.0),
    Panel("images/s", ("images_per_second",), 0.0),
)


def curves_figure(
    rows: Sequence[Row], steps_per_epoch: float, switch: int | None, title: str
) -> Figure:
    """Every panel that these lines of metrics have numbers for, over epochs.

    switch: first step of stage two, marked in each panel; None: there is none. Raises ValueError for no rows.
    """
    panels = [(panel, curves(rows, panel, steps_per_epoch)) for panel in PANELS]
    panels = [(panel, found) for panel, found in panels if found]
    if not panels:
        raise ValueError("no metrics")
    down = -(-len(panels) // ACROSS)
    figure = Figure(figsize=(WIDTH, 1.55 * down + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(down, ACROSS, squeeze=False, sharex=True)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    for number, (panel, found) in enumerate(panels):
        axis = axes.flat[number]
        draw(axis, panel, found)
        if switch is not None:
            axis.axvline(switch / steps_per_epoch, color="0.6", linewidth=0.7, linestyle=":")
        if number >= len(panels) - ACROSS:
            axis.set_xlabel("epoch", fontsize=SMALL)
            axis.tick_params(labelbottom=True)
    note = "; dotted: stage two begins" if switch is not None else ""
    figure.suptitle(printable(title) + note, fontsize=NORMAL, parse_math=False)
    return figure


def curves(
    rows: Sequence[Row], panel: Panel, steps_per_epoch: float
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Name -> epochs and values of each metric of a panel, in the order of COLOURS."""
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for start in panel.names:
        for part in ("", *(p for p in COLOURS if p)):
            name = f"{start}_{part}" if part else start
            points = [
                (row["step"] / steps_per_epoch, float(row[name]))
                for row in rows
                if isinstance(row.get(name), int | float) and np.isfinite(row[name])
            ]
            if points:
                epochs, values = np.array(points).T
                found[name] = thinned(epochs), thinned(values)
    if {"loss", "loss_teacher"} <= found.keys() and "loss_momentum" not in found:
        del found["loss"]  # one network alone is predicted: the two are the same
    if {"loss", "loss_pixel"} <= found.keys():
        del found["loss_pixel"]
    return found


def thinned(values: np.ndarray) -> np.ndarray:
    """At most MOST_POINTS means of equally many neighbours; the last ones may be fewer."""
    size = -(-len(values) // MOST_POINTS)
    if size <= 1:
        return values
    starts = np.arange(0, len(values), size)
    return np.asarray(np.add.reduceat(values, starts) / np.diff([*starts, len(values)]))


def draw(axis: Axes, panel: Panel, found: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """The curves of one panel."""
    for name, (epochs, values) in found.items():
        part = name.rsplit("_", 1)[-1]
        part = part if part in COLOURS else ""
        label, colour, style = WORDS[part], COLOURS[part], STYLES[part]
        if len(found) == 1:
            label = name
        if name in ("alpha_mask", "alpha_loss"):
            label = {"alpha_mask": "mask (Eq. 3)", "alpha_loss": "loss (Eq. 4)"}[name]
            colour, style = {"alpha_mask": ("#333333", "-"), "alpha_loss": ("#CC79A7", "--")}[name]
        dots = "." if len(values) < 3 else ""
        axis.plot(
            epochs, values, color=colour, linestyle=style, linewidth=1.1, label=label, marker=dots,
            drawstyle="steps-pre" if name.startswith("alpha") else "default",
        )  # fmt: skip
    if panel.line is not None:
        level, word = panel.line
        axis.axhline(level, color="0.45", linewidth=0.8, linestyle="--", label=word)
    if panel.log:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
    elif panel.lowest is not None:
        top = max(float(values.max()) for _, values in found.values())
        axis.set_ylim(panel.lowest, 1.08 * max(top, panel.line[0] if panel.line else 0) or 1.0)
    axis.set_title(panel.title, fontsize=SMALL + 0.5, pad=3)
    axis.tick_params(labelsize=SMALL - 0.5, length=2, pad=2)
    axis.grid(color="0.92", linewidth=0.5)
    axis.set_axisbelow(True)
    for spine in ("top", "right"):
        axis.spines[spine].set_visible(False)
    if len(found) > 1 or panel.line is not None:
        axis.legend(fontsize=SMALL - 1, frameon=False, handlelength=1.8, borderaxespad=0.2)
