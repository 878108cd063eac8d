"""Figures for run directories: readable on a light and on a dark page, whole or not there."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.text import Text

from cmt_mae.core.files import write_atomically

GREY = "#747c87"
"""Of words and lines outside the pictures: 4.2 : 1 or more on white and on the report's dark ground."""
DPI = 150


def save_picture(figure: Figure, path: Path) -> None:
    """Write a PNG without a ground of its own; titles, labels, ticks and legends become grey.

    Raises InputError where it cannot be written.
    """
    words: list[Text] = list(figure.texts)  # the heading too
    for axis in figure.axes:
        axis.tick_params(colors=GREY)
        words += [axis.title, axis.xaxis.label, axis.yaxis.label]
        for spine in axis.spines.values():
            spine.set_edgecolor(GREY)
        legend = axis.get_legend()
        words += legend.get_texts() if legend else []
    for one in figure.legends:
        words += one.get_texts()
    for word in words:
        word.set_color(GREY)
    write_atomically(
        path, lambda aside: figure.savefig(aside, format="png", dpi=DPI, transparent=True)
    )
