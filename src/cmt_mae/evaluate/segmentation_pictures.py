"""Pictures of a segmentation: image, truth and prediction side by side, with a legend."""

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from cmt_mae.core.text import printable
from cmt_mae.evaluate.drawing import save_picture

NAMES_SHOWN = 20
UNLABELLED = (0.93, 0.93, 0.93)


def class_colours(classes: int) -> np.ndarray:
    """(classes, 3) colours in 0..1, the same for the same class always.

    One after another the colour of a grid that lies farthest from all before, from the unlabelled grey and from
    black; 1000 different ones.
    """
    grid = np.stack(np.meshgrid(*[np.linspace(0.05, 0.95, 10)] * 3), axis=-1).reshape(-1, 3)
    nearest = np.minimum(
        np.linalg.norm(grid - np.array(UNLABELLED), axis=1), np.linalg.norm(grid, axis=1)
    )
    rows = []
    for _ in range(classes):
        colour = grid[nearest.argmax()]
        rows.append(colour)
        nearest = np.minimum(nearest, np.linalg.norm(grid - colour, axis=1))
    return np.array(rows)


def segmentation_picture(
    path: Path, rows: list[tuple[Tensor, Tensor, Tensor]], classes: list[str], title: str
) -> None:
    """Write a PNG with one row per image: the image, its truth, the prediction, where the two differ.

    rows: image uint8 (C, h, w), truth (H, W) and prediction (H, W), classes 0.., negative = unlabelled, which is
    light grey in the truth; the prediction is shown there all the same. The legend has the 20 largest classes of
    these images.
    """
    colours = class_colours(len(classes))
    figure = Figure(figsize=(11.5, 2.0 * len(rows) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), 4, squeeze=False)
    counts = np.zeros(len(classes), dtype=np.int64)
    for axis, (image, truth, prediction) in zip(axes, rows, strict=True):
        wanted, said = truth.numpy(), prediction.numpy()
        labelled = wanted >= 0
        for labels in (wanted[labelled], said.ravel()):
            counts += np.bincount(labels.astype(np.int64), minlength=len(classes))
        wrong = labelled & (wanted != said)
        ratio = wanted.shape[0] / wanted.shape[1]  # the image was resized, its proportions stay
        shown = (
            image[: 3 if len(image) >= 3 else 1].permute(1, 2, 0).expand(-1, -1, 3).numpy(),
            np.where(labelled[..., None], colours[np.maximum(wanted, 0)], UNLABELLED),
            colours[said],
            np.where(
                wrong[..., None], (0.8, 0.1, 0.1), np.where(labelled[..., None], 1.0, UNLABELLED)
            ),
        )
        for place, picture in zip(axis, shown, strict=True):
            place.imshow(picture, extent=(0, 1, 0, ratio), interpolation="nearest")
            place.set_xticks([])
            place.set_yticks([])
        right = 100 * (1 - wrong.sum() / max(1, labelled.sum()))
        axis[3].set_xlabel(f"{right:.1f} % of labelled pixels right", fontsize=8)
    for place, name in zip(axes[0], ("image", "truth", "prediction", "wrong pixels"), strict=True):
        place.set_title(name, fontsize=10)
    largest = [int(k) for k in np.argsort(-counts, kind="stable")[:NAMES_SHOWN] if counts[k]]
    handles = [Patch(color=colours[k], label=_short(classes[k])) for k in largest]
    handles.append(Patch(color=UNLABELLED, label="unlabelled"))
    legend = figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a $ in a class's name begins no formula
    figure.suptitle(printable(title), fontsize=11, parse_math=False)
    save_picture(figure, path)


def _short(name: str) -> str:
    """The first of several names of a class, at most 18 letters."""
    first = printable(name).replace(";", ",").split(",")[0].strip()
    return first if len(first) <= 18 else first[:17] + "…"
