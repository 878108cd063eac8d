"""Figures of publication size: pictures in rows and columns, one colour scale, PNG and SVG."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray
from torch import Tensor

from cmt_mae.core.errors import InputError
from cmt_mae.core.files import write_atomically
from cmt_mae.core.text import printable

WIDTH = 7.0
"""Inches: the text width of a two-column page. Wider only where cells would be smaller than LEAST."""
LARGEST, LEAST = 1.35, 0.46
"""Inches: width of a cell."""
SMALL, NORMAL = 6.5, 8.0
"""Points."""
UNDATED = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
"""Format -> what is left out of the file, so that the same figure is the same file."""
FORMATS = tuple(UNDATED)
DPI = 300
COVER = 0.7
"""How much of a map's colour lies over the grey image; the colour bar lies over mid grey likewise."""
HIDDEN = 0.62
"""Grey of hidden patches."""
MAPS = "inferno"

Picture = NDArray[np.float64]
"""(H, W, 3) in 0..1."""


@dataclass
class Scale:
    """One colour scale for every map of a figure; it begins at 0."""

    highest: float
    """Value of the last colour."""
    clipped: bool
    """Whether there are values above it, which the colour bar's tip then shows."""
    below: bool = False
    """Whether there are values below 0, shown in the first colour."""
    colours: str = MAPS

    def __call__(self, values: NDArray[Any]) -> Picture:
        """Colours (..., 3) of values (...)."""
        return np.asarray(colormaps[self.colours](values / self.highest)[..., :3])


def common_scale(maps: Sequence[NDArray[Any]]) -> Scale:
    """From 0 to the largest of all values, or to their 99.5th percentile where the largest is far above it.

    Else one bright patch would leave all others black.
    """
    values = np.concatenate([np.ravel(one) for one in maps])
    largest, usual = float(values.max()), float(np.quantile(values, 0.995))
    clipped = usual < 0.7 * largest
    return Scale(max(usual if clipped else largest, 1e-12), clipped)


class Sheet:
    """A figure of equal cells, each a picture."""

    def __init__(
        self,
        rows: int,
        columns: int,
        aspect: float,
        title: str,
        *,
        bar: str = "",
        below: bool = False,
        head_lines: int = 1,
        largest: float = LARGEST,
    ) -> None:
        """aspect: height of a cell over its width. bar: label of the colour bar that will come, or "".

        below: leave room for a line under each cell. head_lines: lines of the titles of the columns.
        largest: width of a cell in inches.
        """
        beside = (0.62 if bar else 0.0) + 0.08
        cell = min(largest, max(LEAST, (WIDTH - beside) / columns))
        high = cell * aspect + (0.15 if below else 0.03)
        width = max(2.6, beside + cell * columns)
        lines = wrapped(printable(title), max(24, int(width * 15)))
        size = (width, 0.1 + 0.15 * len(lines) + 0.11 * head_lines + high * rows)
        layout = ConstrainedLayoutEngine(w_pad=0.012, h_pad=0.012, wspace=0, hspace=0)
        self.figure = Figure(figsize=size, layout=layout)
        self.bar = "\n".join(wrapped(bar, max(10, int(high * rows * 13))))
        FigureCanvasAgg(self.figure)
        self.axes: NDArray[Any] = self.figure.subplots(rows, columns, squeeze=False)
        for axis in self.axes.flat:
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set_visible(False)
        self.figure.suptitle("\n".join(lines), fontsize=NORMAL, parse_math=False)

    def show(self, row: int, column: int, picture: Picture, below: str = "") -> Axes:
        """Put a picture in a cell, with a line under it, which may hold anything."""
        axis: Axes = self.axes[row, column]
        axis.imshow(picture)
        if below:
            text = printable(below)
            axis.set_xlabel(text, fontsize=SMALL - 1, labelpad=1.5, parse_math=False)
        return axis

    def heads(self, names: Sequence[str], bold: int = -1) -> None:
        """Titles of the columns; ours, so that $...$ is a formula. bold: number of one to stress."""
        for number, (axis, name) in enumerate(zip(self.axes[0], names, strict=True)):
            weight = "bold" if number == bold else "normal"
            axis.set_title(name, fontsize=SMALL, pad=2.5, fontweight=weight)

    def colour_bar(self, scale: Scale, *, covered: bool = True) -> None:
        """At the right of all. covered: the maps lie over images, so that the bar lies over grey."""
        colours = scale(np.linspace(0, scale.highest, 256))
        if covered:
            colours = COVER * colours + (1 - COVER) * 0.5
        drawn = ScalarMappable(Normalize(0, scale.highest), ListedColormap(list(colours)))
        bar = self.figure.colorbar(
            drawn, ax=self.axes, shrink=0.9 if self.figure.get_figheight() < 3 else 0.5, pad=0.012, fraction=0.05,
            aspect=16, extend={(0, 0): "neither", (1, 0): "max", (0, 1): "min", (1, 1): "both"}[
                scale.clipped, scale.below
            ],
        )  # fmt: skip
        bar.set_label(self.bar, fontsize=SMALL)
        bar.ax.tick_params(labelsize=SMALL, length=2, pad=1.5)
        bar.outline.set_visible(False)  # type: ignore[operator]


def save(figure: Figure, path: Path, formats: Sequence[str]) -> list[Path]:
    """Write ``path`` with each ending, whole or not at all; the same figure is the same file.

    Raises InputError for an unknown format and where the disk refuses.
    """
    written = []
    for ending in formats:
        if ending not in FORMATS:
            raise InputError(
                f"--formats '{printable(ending)}' is unknown: use {', '.join(FORMATS)}"
            )
        file = path.with_name(f"{path.name}.{ending}")
        write = partial(figure.savefig, format=ending, dpi=DPI, metadata=UNDATED[ending])
        with matplotlib.rc_context({"svg.hashsalt": "cmt-mae"}):
            write_atomically(file, write)
        written.append(file)
    return written


def as_picture(image: Tensor) -> Picture:
    """uint8 (C, H, W), or float in 0..1, as a picture: grey three times, the first three of many channels."""
    array = image.detach().cpu().numpy()
    array = array / 255 if array.dtype == np.uint8 else array.clip(0, 1)
    array = array if array.shape[0] >= 3 else array[:1].repeat(3, 0)
    return np.asarray(array[:3].transpose(1, 2, 0), dtype=np.float64)


def at_pixels(cells: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """A grid (rows, columns, ...) spread over height x width pixels, each cell in one colour."""
    rows, columns = cells.shape[:2]
    down, right = np.arange(height) * rows // height, np.arange(width) * columns // width
    return cells[down[:, None], right[None]]


def over(image: Picture, values: NDArray[Any], scale: Scale) -> Picture:
    """A map (rows, columns) over the image in grey, which only darkens or lightens its colours a little."""
    colours = scale(at_pixels(values, *image.shape[:2]))
    return COVER * colours + (1 - COVER) * image.mean(2, keepdims=True)


def without(image: Picture, hidden: NDArray[np.bool_]) -> Picture:
    """The image with hidden patches (rows, columns) in grey."""
    return np.where(at_pixels(hidden, *image.shape[:2])[..., None], HIDDEN, image)


def wrapped(text: str, width: int) -> list[str]:
    """Lines of at most ``width`` letters, three at most."""
    import textwrap

    return textwrap.wrap(text, width, max_lines=3, placeholder=" …") or [""]
