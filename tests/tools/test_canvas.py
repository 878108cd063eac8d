"""Honest colours and bars."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from cmt_mae.core.bare_words import with_lists
from cmt_mae.tools.inspect import canvas
from cmt_mae.tools.inspect.attention import attention_sheet, in_units
from cmt_mae.tools.inspect.canvas import (
    COVER,
    Scale,
    Sheet,
    at_pixels,
    common_scale,
    over,
    save,
    without,
)

ROOT = Path(__file__).resolve().parents[2]


def test_colours_over_mid_grey_are_those_of_the_bar() -> None:
    """The same value has the same colour in every map; the image only lightens or darkens it."""
    values = np.array([[0.0, 1.0], [2.0, 4.0]])
    scale = common_scale([values, np.array([[4.0]])])
    assert (scale.highest, scale.clipped) == (4.0, False)
    grey = np.full((8, 8, 3), 0.5)
    shown = over(grey, values, scale)
    bar = COVER * matplotlib.colormaps["inferno"](values / 4.0)[..., :3] + (1 - COVER) * 0.5
    np.testing.assert_allclose(shown[::4, ::4], bar)
    white = over(np.ones((8, 8, 3)), values, scale)
    np.testing.assert_allclose(white - shown, (1 - COVER) * 0.5)


def test_one_bright_patch_does_not_blacken_the_rest() -> None:
    values = np.ones(1000)
    values[0] = 100
    scale = common_scale([values])
    assert scale.clipped
    assert scale.highest < 2
    np.testing.assert_allclose(scale(np.array([100.0])), scale(np.array([scale.highest])))


def test_uniform_attention_is_one() -> None:
    assert (
        in_units(torch.full((2, 12), 1 / 12), (3, 4)).round(5).tolist()
        == np.ones((2, 3, 4)).tolist()
    )


def test_grids_that_do_not_divide_the_image() -> None:
    spread = at_pixels(np.arange(6).reshape(2, 3), 5, 7)
    assert spread.shape == (5, 7)
    assert spread[:, 0].tolist() == [0, 0, 0, 3, 3]
    assert spread[0].tolist() == [0, 0, 0, 1, 1, 2, 2]
    hidden = np.array([[True, False]])
    image = np.zeros((4, 4, 3))
    assert (without(image, hidden)[:, :2] > 0).all()
    assert (without(image, hidden)[:, 2:] == 0).all()


@pytest.mark.parametrize(
    ("grid", "height", "width"), [((8, 8), 64, 64), ((14, 14), 224, 224), ((2, 6), 32, 96)]
)
def test_sheets_fit_a_page_and_the_shape(
    tmp_path: Path, grid: tuple[int, int], height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cells have the images' proportions, and nothing is wider than a page."""
    monkeypatch.setattr(canvas, "DPI", 50)
    images = torch.randint(0, 255, (2, 3, height, width), dtype=torch.uint8)
    shares = torch.rand(2, grid[0] * grid[1])
    shares = shares / shares.sum(1, keepdim=True)
    maps = {"teacher": shares, "student": shares, "collab": shares}
    sheet = attention_sheet(images, maps, shares > 0.01, grid, "a $title_{of} <any> \x1b[31m name")
    (file,) = save(sheet.figure, tmp_path / "sheet", ["png"])
    box = sheet.axes[0, 0].get_window_extent()
    assert box.height / box.width == pytest.approx(height / width, rel=0.03)
    assert Image.open(file).width <= 350
    assert Sheet(1, 40, 1.0, "many heads").figure.get_figwidth() > 7


def test_lists_on_the_command_line() -> None:
    words = ["--images", "a,b", "c", "--what=x,y", "--size", "3", "-4", "--run", "r", "--count=2"]
    made = with_lists(words, ("images",), ("what", "size"))
    assert made == [
        "--run", "r", "--count=2", '--images=["a,b", "c"]', '--what=["x", "y"]', "--size=[3, -4]",
    ]  # fmt: skip
    assert with_lists(["--size=[1]", "--what", "[a]"], (), ("size", "what")) == [
        "--size=[1]",
        "--what=[a]",
    ]
    assert Scale(1.0, False).below is False
