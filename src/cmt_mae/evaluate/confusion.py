"""A picture of what a classifier confuses."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from cmt_mae.core.text import printable
from cmt_mae.evaluate.drawing import GREY, save_picture

NAMED = 40  # classes up to which each row is named
NUMBERED = 16  # classes up to which each cell shows its number
LONGEST = 22  # letters of a name


def most_frequent_mistakes(confusion: Tensor, count: int) -> list[tuple[int, int, int]]:
    """(truth, prediction, images) of the largest cells off the diagonal; the first among equal ones."""
    mistakes = confusion.clone()
    mistakes.fill_diagonal_(0)
    order = mistakes.flatten().sort(descending=True, stable=True).indices[:count].tolist()
    cells = [divmod(place, len(confusion)) for place in order]
    return [(t, p, int(confusion[t, p])) for t, p in cells if t != p and confusion[t, p] > 0]


def confusion_picture(
    path: Path, confusion: Tensor, classes: Sequence[str], title: str, mistakes: int = 8
) -> None:
    """Write a PNG: the confusion matrix, and the most frequent mistakes by name.

    confusion: (K, K) counts, rows are the truth. The colour is the share of a row, so that classes of any size
    compare. Names and numbers are left out where they could not be read.
    """
    k = len(confusion)
    names = [_short(name) for name in classes]
    share = confusion / confusion.sum(1, keepdim=True).clamp_min(1)
    highest = max(0.01, float(share.max()))
    side = min(7.5, max(4.0, 0.42 * k + 1.5))
    figure = Figure(figsize=(side + 4.6, side + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    matrix, bars = figure.subplots(1, 2, width_ratios=(side, 3.2))
    drawn = matrix.imshow(
        share.numpy(), cmap="Blues", vmin=0, vmax=highest, interpolation="nearest"
    )
    matrix.set_xlabel("prediction")
    matrix.set_ylabel("truth")
    if k <= NAMED:
        matrix.set_xticks(range(k), names, rotation=90, fontsize=8, parse_math=False)
        matrix.set_yticks(range(k), names, fontsize=8, parse_math=False)
    if k <= NUMBERED:
        for row in range(k):
            for column in range(k):
                matrix.text(
                    column, row, f"{int(confusion[row, column])}", ha="center", va="center", fontsize=7,
                    color="white" if share[row, column] > 0.6 * highest else "black",
                )  # fmt: skip
    figure.colorbar(drawn, ax=matrix, shrink=0.7, pad=0.02, label="share of the row")
    _draw_mistakes(bars, confusion, names, mistakes)
    figure.suptitle(printable(title), fontsize=11, parse_math=False)
    save_picture(figure, path)


def _draw_mistakes(axis: Axes, confusion: Tensor, names: list[str], count: int) -> None:
    """Bars of the most frequent mistakes, the first on top."""
    found = most_frequent_mistakes(confusion, count)
    axis.set_title("most frequent mistakes" if found else "no mistake", fontsize=10)
    for spine in ("top", "right", "bottom"):
        axis.spines[spine].set_visible(False)
    axis.set_xticks([])
    axis.set_yticks([])
    highest = max((n for _, _, n in found), default=1)
    for place, (truth, prediction, n) in enumerate(found):
        total = int(confusion[truth].sum())
        axis.barh(place, n, height=0.3, color="tab:red", alpha=0.75)
        text = f"{names[truth]} taken for {names[prediction]}"
        axis.text(0, place - 0.24, text, fontsize=8, va="bottom", color=GREY, parse_math=False)
        axis.text(n + 0.02 * highest, place, f"{n} of {total}", fontsize=8, va="center", color=GREY)
    axis.set_xlim(-0.02 * highest, 1.35 * highest)
    axis.set_ylim(max(count, 1) - 0.4, -0.9)


def _short(name: str) -> str:
    """A class name that fits."""
    half = (LONGEST - 1) // 2
    name = printable(name)
    return name if len(name) <= LONGEST else f"{name[:half]}…{name[-half:]}"
