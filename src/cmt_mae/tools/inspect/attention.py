"""Pictures of attention and of masks: A_t, A_s and A_c over images, heads, growth over a run, every rule."""

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from cmt_mae.tools.inspect.canvas import (
    LARGEST,
    Picture,
    Sheet,
    as_picture,
    common_scale,
    over,
    without,
)

Grid = tuple[int, int]
UNIT = "attention / uniform"
"""1: as much as every patch would have if all had the same."""
TITLES = {"teacher": "teacher $A_t$", "student": "student $A_s$", "collab": "both $A_c$"}


def pictures_of(images: Tensor) -> list[Picture]:
    """uint8 (B, C, H, W) -> a picture each."""
    return [as_picture(image) for image in images]


def in_units(shares: Tensor, grid: Grid) -> np.ndarray:
    """Maps (..., L) that sum to 1 -> (..., rows, columns), times the uniform attention."""
    return (shares.float().cpu().numpy() * (grid[0] * grid[1])).reshape(*shares.shape[:-1], *grid)


def attention_sheet(
    images: Tensor,
    maps: dict[str, Tensor],
    hidden: Tensor | None,
    grid: Grid,
    title: str,
    titles: dict[str, str] | None = None,
    notes: Mapping[str, Sequence[str]] | None = None,
    largest: float = LARGEST,
) -> Sheet:
    """A row per image: the image, each map over it, the visible patches; one colour scale.

    images uint8, or float in 0..1, (B, C, H, W); maps: name -> (B, L) that sum to 1, or none; hidden (B, L) bool;
    titles of the maps in place of TITLES; notes: name -> a line under the map of each image; largest: inches, the
    width of a cell.
    """
    values = {name: in_units(one, grid) for name, one in maps.items()}
    scale = common_scale(list(values.values())) if values else None
    shown, names = pictures_of(images), {**TITLES, **(titles or {})}
    aspect = shown[0].shape[0] / shown[0].shape[1]
    columns = 1 + len(maps) + (hidden is not None)
    lines = 1 + max((names[name].count("\n") for name in maps), default=0)
    sheet = Sheet(
        len(shown), columns, aspect, title, bar=UNIT if scale else "", below=bool(notes), head_lines=lines,
        largest=largest,
    )  # fmt: skip
    for row, image in enumerate(shown):
        sheet.show(row, 0, image)
        for column, (name, value) in enumerate(values.items(), start=1):
            assert scale is not None
            note = (notes or {}).get(name)
            sheet.show(row, column, over(image, value[row], scale), note[row] if note else "")
        if hidden is not None:
            sheet.show(row, columns - 1, without(image, hidden[row].reshape(grid).numpy()))
    last = ["visible patches"] if hidden is not None else []
    sheet.heads(["image", *(names[name] for name in maps), *last])
    if scale is not None:
        sheet.colour_bar(scale)
    return sheet


def heads_sheet(images: Tensor, heads: Tensor, grid: Grid, title: str) -> Sheet:
    """A row per image: the image, the mean of the heads' maps, each head; one colour scale.

    heads (B, heads, L), each summing to 1, on the network's own grid.
    """
    values = in_units(heads, grid)
    scale = common_scale([values])
    shown = pictures_of(images)
    count = values.shape[1]
    aspect = shown[0].shape[0] / shown[0].shape[1]
    sheet = Sheet(len(shown), 2 + count, aspect, title, bar=UNIT)
    for row, image in enumerate(shown):
        sheet.show(row, 0, image)
        sheet.show(row, 1, over(image, values[row].mean(0), scale))
        for head in range(count):
            sheet.show(row, 2 + head, over(image, values[row, head], scale))
    sheet.heads(["image", "mean", *(f"head {head}" for head in range(1, count + 1))])
    sheet.colour_bar(scale)
    return sheet


def growth_sheet(
    images: Tensor,
    maps: dict[str, Tensor],
    grid: Grid,
    title: str,
    notes: Mapping[str, Sequence[str]] | None = None,
) -> Sheet:
    """As ``attention_sheet`` with a column per checkpoint; maps: title of the column -> (B, L)."""
    return attention_sheet(
        images, maps, None, grid, title, titles={name: name for name in maps}, notes=notes
    )


def masks_sheet(
    images: Tensor, masks: dict[str, Tensor], grid: Grid, title: str, own: str = ""
) -> Sheet:
    """A row per image: the image, then what each rule leaves visible. masks: rule -> (B, L) bool, True = hidden.

    own: the rule of the run, its title in bold.
    """
    shown = pictures_of(images)
    aspect = shown[0].shape[0] / shown[0].shape[1]
    sheet = Sheet(len(shown), 1 + len(masks), aspect, title, head_lines=2)
    for row, image in enumerate(shown):
        sheet.show(row, 0, image)
        for column, mask in enumerate(masks.values(), start=1):
            sheet.show(row, column, without(image, mask[row].reshape(grid).numpy()))
    names = ["image", *(rule.replace("_", "\n") for rule in masks)]
    sheet.heads(names, bold=1 + list(masks).index(own) if own in masks else -1)
    return sheet
