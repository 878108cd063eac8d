"""The picture that a run draws while it goes on: image, A_t, A_s, A_c and the mask in a row for each image."""

from pathlib import Path

from torch import Tensor

from cmt_mae.evaluate.drawing import save_picture
from cmt_mae.tools.report.attention import attention_sheet

NAMES = {"teacher": "teacher", "momentum": "student", "collab": "collab"}
"""Map of a run -> as attention.py calls it."""
CELL = 1.2
"""Inches: width of a picture; five of them and the colour bar fit in a row."""


def attention_picture(
    path: Path,
    images: Tensor,
    maps: dict[str, Tensor],
    mask: Tensor,
    grid: tuple[int, int],
    title: str,
) -> None:
    """Write a PNG with one row an image: the image, each map over it, the visible patches.

    images (B, C, H, W) in 0..1; maps: teacher, momentum, collab -> (B, L) that sum to 1, or none; mask (B, L)
    bool, True = hidden. All maps share one colour scale, times the uniform attention 1 / L: 1 = as much as
    chance. A cell has the same size whatever the number of maps.
    """
    shown = {name: maps[of] for of, name in NAMES.items() if of in maps}
    save_picture(attention_sheet(images, shown, mask, grid, title, largest=CELL).figure, path)
