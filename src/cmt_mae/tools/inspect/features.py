"""Pictures of features: principal axes as colours, predictions beside targets, pixels, neighbours."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from cmt_mae.tools.inspect.canvas import (
    HIDDEN,
    Picture,
    Scale,
    Sheet,
    as_picture,
    at_pixels,
    over,
    without,
)

Grid = tuple[int, int]
LIKENESS = Scale(1.0, clipped=False, below=True, colours="viridis")
"""Of cosines: 0..1, what is below 0 in the first colour."""


def features_sheet(images: Tensor, features: dict[str, tuple[Tensor, Grid]], title: str) -> Sheet:
    """A row per image: the image, the features of each network as colours.

    images uint8 (B, C, H, W); features: title of the column -> colours (B, L, 3) in 0..1 and their grid.
    """
    shown = [as_picture(image) for image in images]
    sheet = Sheet(len(shown), 1 + len(features), aspect_of(shown[0]), title, head_lines=2)
    for row, image in enumerate(shown):
        sheet.show(row, 0, image)
        for column, (colours, grid) in enumerate(features.values(), start=1):
            sheet.show(row, column, mosaic(colours[row], grid, image))
    sheet.heads(["image", *features])
    return sheet


@dataclass
class Predicted:
    """Predictions of one network's features on B images of L patches."""

    target: Tensor
    """(B, L, 3) colours."""
    said: Tensor
    """(B, L, 3) colours in the same basis."""
    cosine: Tensor
    """(B, L), between prediction and target after the targets' mean was taken from both."""
    explained: Sequence[float]
    """R2 of each image, where the loss was taken."""


def predictions_sheet(
    images: Tensor,
    predicted: dict[str, Predicted],
    hidden: Tensor,
    counted: Tensor,
    grid: Grid,
    title: str,
) -> Sheet:
    """A row per image: image, visible patches, and for each target its colours, the prediction's, their cosine.

    hidden (B, L) bool. counted (B, L) bool: where the loss was taken; the others are left grey.
    """
    shown = [as_picture(image) for image in images]
    columns = 2 + 3 * len(predicted)
    sheet = Sheet(
        len(shown), columns, aspect_of(shown[0]), title, bar="cosine around the mean target",
        below=True, head_lines=2,
    )  # fmt: skip
    for row, image in enumerate(shown):
        left = ~counted[row].reshape(grid).numpy()
        sheet.show(row, 0, image)
        sheet.show(row, 1, without(image, hidden[row].reshape(grid).numpy()))
        for number, one in enumerate(predicted.values()):
            likeness = over(image, one.cosine[row].reshape(grid).numpy(), LIKENESS)
            place = 2 + 3 * number
            sheet.show(row, place, mosaic(one.target[row], grid, image))
            sheet.show(row, place + 1, blank(mosaic(one.said[row], grid, image), left))
            sheet.show(row, place + 2, blank(likeness, left), f"R² {one.explained[row]:.2f}")
    heads = ["image", "visible\npatches"]
    for name in predicted:
        heads += [f"target:\n{name}", "predicted", "cosine"]
    sheet.heads(heads)
    sheet.colour_bar(LIKENESS)
    return sheet


def reconstruction_sheet(
    images: Tensor, hidden: Tensor, made: Tensor, grid: Grid, title: str
) -> Sheet:
    """A row per image: the image, visible patches, prediction at hidden patches with the visible ones pasted.

    images uint8 (B, C, H, W) at the network's size; made (B, C, H, W) in 0..1.
    """
    shown = [as_picture(image) for image in images]
    sheet = Sheet(len(shown), 3, aspect_of(shown[0]), title, below=True)
    for row, image in enumerate(shown):
        mask = hidden[row].reshape(grid).numpy()
        said = as_picture(made[row])
        wrong = float(np.abs(said - image)[at_pixels(mask, *image.shape[:2])].mean())
        sheet.show(row, 0, image)
        sheet.show(row, 1, without(image, mask))
        sheet.show(row, 2, said, f"mean error {255 * wrong:.0f} / 255")
    sheet.heads(["image", "visible patches", "predicted, visible pasted"])
    return sheet


def neighbours_sheet(
    images: Tensor,
    kinds: Sequence[str],
    found: Sequence[Sequence[tuple[Tensor, str, float]]],
    title: str,
) -> Sheet:
    """A row per image: the image and its nearest ones (image, class or "", cosine), nearest first.

    Neighbours of the same class have their line in bold.
    """
    shown = [as_picture(image) for image in images]
    columns = 1 + max(len(row) for row in found)
    sheet = Sheet(len(shown), columns, aspect_of(shown[0]), title, below=True)
    for row, (image, kind, others) in enumerate(zip(shown, kinds, found, strict=True)):
        sheet.show(row, 0, image, short(kind))
        for column, (other, its_kind, cosine) in enumerate(others, start=1):
            axis = sheet.show(row, column, as_picture(other), f"{cosine:.2f} {short(its_kind)}")
            if kind and its_kind == kind:
                axis.xaxis.label.set(fontweight="bold", color="#00703c")
    sheet.heads(["image", *(f"nearest {n}" if n == 1 else str(n) for n in range(1, columns))])
    return sheet


def aspect_of(picture: Picture) -> float:
    """Height over width."""
    return picture.shape[0] / picture.shape[1]


def mosaic(colours: Tensor, grid: Grid, image: Picture) -> Picture:
    """Colours of patches (L, 3) at the size of the image."""
    cells = colours.float().cpu().numpy().reshape(*grid, 3)
    spread: Picture = at_pixels(cells, *image.shape[:2]).astype(np.float64)
    return spread


def blank(picture: Picture, cells: np.ndarray[Any, np.dtype[np.bool_]]) -> Picture:
    """These cells (rows, columns) in light grey: nothing is said of them."""
    away = at_pixels(cells, *picture.shape[:2])[..., None]
    return np.where(away, (1 + HIDDEN) / 2, picture)


def short(name: str, most: int = 14) -> str:
    """A class's name that fits under a picture."""
    return name if len(name) <= most else name[: most - 1] + "…"
