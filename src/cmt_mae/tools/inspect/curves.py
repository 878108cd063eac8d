"""The charts of a run as one figure of publication size, for `explain`."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cmt_mae.core.run_reader import RunRecord
from cmt_mae.core.text import printable
from cmt_mae.tools.inspect.canvas import NORMAL, SMALL, WIDTH
from cmt_mae.tools.report.charts import charts

ACROSS = 3
"""Panels in a row."""
LINES = (
    ("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", "-."), ("#CC79A7", ":"), ("#333333", "-"), ("#E69F00", "--"),
)  # fmt: skip
"""Colour and dash, told apart by the colour-blind too (Okabe and Ito)."""


def curves_figure(record: RunRecord, title: str) -> Figure:
    """Every chart that the run has numbers for, over epochs; the switch of stages as an upright line.

    Raises ValueError where nothing is logged.
    """
    found = charts([record])
    if not found:
        raise ValueError("no metrics")
    down = -(-len(found) // ACROSS)
    figure = Figure(figsize=(WIDTH, 1.55 * down + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(down, ACROSS, squeeze=False, sharex=True)
    for axis in list(axes.flat)[len(found) :]:
        axis.set_visible(False)
    switch = record.switch_step
    for number, chart in enumerate(found):
        axis = axes.flat[number]
        draw(axis, chart)
        if switch is not None:
            per = record.plan("steps_per_epoch") or 1
            axis.axvline(switch / per, color="0.6", linewidth=0.7, linestyle=":")
        if number >= len(found) - ACROSS:
            axis.set_xlabel(chart["x_name"], fontsize=SMALL)
            axis.tick_params(labelbottom=True)
    note = "; dotted: stage two begins" if switch is not None else ""
    figure.suptitle(printable(title) + note, fontsize=NORMAL, parse_math=False)
    return figure


def draw(axis: Axes, chart: dict[str, Any]) -> None:
    """The lines of one chart of one run, as ``charts`` gives it."""
    (table,) = chart["tables"]
    for place, line in enumerate(table["lines"]):
        colour, dash = LINES[place % len(LINES)]
        pairs = [(x, y) for x, y in zip(table["x"], line["values"], strict=True) if y is not None]
        axis.plot(
            *zip(*pairs, strict=True), color=colour, linestyle=dash, linewidth=1.1, label=printable(line["label"]),
            marker="." if len(pairs) < 3 else "",
        )  # fmt: skip
    if chart["chance"] is not None:
        axis.axhline(chart["chance"], color="0.45", linewidth=0.8, linestyle="--", label="chance")
    unit = f", {chart['unit']}" if chart["unit"] else ""
    axis.set_title(chart["title"] + unit, fontsize=SMALL + 0.5, pad=3, wrap=True)
    axis.tick_params(labelsize=SMALL - 0.5, length=2, pad=2)
    axis.grid(color="0.92", linewidth=0.5)
    axis.set_axisbelow(True)
    for spine in ("top", "right"):
        axis.spines[spine].set_visible(False)
    if len(table["lines"]) > 1 or chart["chance"] is not None:
        axis.legend(fontsize=SMALL - 1, frameon=False, handlelength=1.8, borderaxespad=0.2)
