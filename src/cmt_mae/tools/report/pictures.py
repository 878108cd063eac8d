"""Pictures of what guides a run: image, A_t, A_s, A_c and the mask in a row for each image."""

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from cmt_mae.core.files import write_atomically
from cmt_mae.core.text import printable

NAMES = {"teacher": "teacher $A_t$", "momentum": "student $A_s$", "collab": "both $A_c$"}


def attention_picture(
    path: Path,
    images: Tensor,
    maps: dict[str, Tensor],
    mask: Tensor,
    grid: tuple[int, int],
    title: str,
) -> None:
    """Write a PNG with one row an image: the image, each map over it, the visible patches.

    images (B, C, H, W) in 0..1; maps: teacher, momentum, collab -> (B, L) that sum to 1; mask (B, L) bool,
    True = hidden. All maps share one colour scale, times the uniform attention 1 / L: 1 = as much as chance.
    """
    shown = [name for name in NAMES if name in maps]
    columns, rows = 2 + len(shown), len(images)
    figure = Figure(figsize=(1.7 * columns + 0.9, 1.75 * rows + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    n_patches = grid[0] * grid[1]
    highest = max([float((maps[n] * n_patches).quantile(0.995)) for n in shown], default=1.0)
    drawn = None
    for row, image in enumerate(images):
        picture = _as_picture(image)
        extent = (0, picture.shape[1], picture.shape[0], 0)
        axes[row, 0].imshow(picture)
        for column, name in enumerate(shown, start=1):
            axes[row, column].imshow(picture.mean(2), cmap="gray", alpha=0.35)
            drawn = axes[row, column].imshow(
                (maps[name][row] * n_patches).reshape(grid).numpy(), cmap="magma", vmin=0, vmax=highest,
                extent=extent, alpha=0.8, interpolation="nearest",
            )  # fmt: skip
        hidden = mask[row].reshape(grid).numpy().repeat(picture.shape[0] // grid[0], 0)
        hidden = hidden.repeat(picture.shape[1] // grid[1], 1)[..., None]
        axes[row, -1].imshow(np.where(hidden, 0.55, picture))
    for axis, name in zip(axes[0], ["image", *(NAMES[n] for n in shown), "visible"], strict=True):
        axis.set_title(name, fontsize=10)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    if drawn is not None:
        bar = figure.colorbar(drawn, ax=axes, shrink=0.6, pad=0.01)
        bar.set_label("attention / uniform", fontsize=9)
    figure.suptitle(printable(title), fontsize=11, parse_math=False)
    write_atomically(path, lambda aside: figure.savefig(aside, format="png", dpi=110))


def _as_picture(image: Tensor) -> np.ndarray:
    """(C, H, W) in 0..1 -> (H, W, 3): grey channels three times, the first three of many."""
    array = image.clamp(0, 1).permute(1, 2, 0).numpy()
    if array.shape[2] < 3:
        array = array[:, :, :1].repeat(3, axis=2)
    return array[:, :, :3]
