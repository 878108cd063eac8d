"""Outputs for photos read at boxes, against torch's own resampling."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from cmt_mae.method.photo_view import at_crops, box_weights, sample
from cmt_mae.method.teacher import TeacherOutput

WHOLE = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
shares = st.floats(0.0, 1.0, width=32)


def output(grid: tuple[int, int], images: int = 1, class_token: bool = False) -> TeacherOutput:
    generator = torch.Generator().manual_seed(grid[0])
    patches = grid[0] * grid[1]
    attention = torch.rand(images, patches, generator=generator) + 0.01
    mass = torch.rand(images, generator=generator)
    attention = attention / attention.sum(1, keepdim=True) * (1 - mass)[:, None]
    features = torch.randn(images, patches + class_token, 5, generator=generator)
    return TeacherOutput(attention, mass, features)


def image_of(values: Tensor, grid: tuple[int, int]) -> Tensor:
    return values.transpose(1, 2).unflatten(2, grid)


def test_a_box_on_grid_lines_is_the_part_of_the_grid() -> None:
    given = output((8, 8))
    box = torch.tensor([[2 / 8, 1 / 8, 4 / 8, 6 / 8]])
    found = at_crops(given, (8, 8), (4, 6), box)
    part = image_of(given.features, (8, 8))[:, :, 2:6, 1:7]
    torch.testing.assert_close(image_of(found.features, (4, 6)), part)
    part = image_of(given.attention[..., None], (8, 8))[:, 0, 2:6, 1:7].flatten(1)
    torch.testing.assert_close(
        found.attention / found.attention.sum(), part / part.sum(), rtol=1e-5, atol=1e-7
    )
    torch.testing.assert_close(found.attention.sum(), given.attention.sum())


@pytest.mark.parametrize("goal", [(3, 3), (7, 5), (14, 14), (16, 20)])
def test_of_the_whole_photo_it_is_torchs_antialiased_interpolation(goal: tuple[int, int]) -> None:
    features = output((14, 14)).features
    found = sample(features, (14, 14), box_weights(WHOLE, (14, 14), goal))
    wanted = F.interpolate(image_of(features, (14, 14)), goal, mode="bilinear", antialias=True)
    torch.testing.assert_close(image_of(found, goal), wanted, rtol=1e-5, atol=1e-5)


@given(
    shares,
    shares,
    st.floats(0.0625, 1.0, width=32),
    st.floats(0.0625, 1.0, width=32),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_small_box_is_torchs_grid_sample(
    top: float, left: float, height: float, width: float, flip: bool
) -> None:
    """Where no cell of the crop is larger than one of the photo, plain bilinear reading."""
    own, goal = (5, 7), (6, 8)
    height, width = min(height, 1.0), min(width, 1.0)
    box = torch.tensor([[top * (1 - height), left * (1 - width), height, width]])
    features = output(own).features
    found = sample(features, own, box_weights(box, own, goal, torch.tensor([flip])))
    y = box[0, 0] + (torch.arange(goal[0]) + 0.5) / goal[0] * box[0, 2]
    x = box[0, 1] + (torch.arange(goal[1]) + 0.5) / goal[1] * box[0, 3]
    x = x.flip(0) if flip else x
    places = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None] * 2 - 1
    wanted = F.grid_sample(
        image_of(features, own), places, padding_mode="border", align_corners=False
    )
    torch.testing.assert_close(image_of(found, goal), wanted, rtol=1e-4, atol=1e-4)


def test_each_crop_has_its_own_box_and_flip() -> None:
    given = output((4, 4), images=3)
    boxes = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [0.25, 0.5, 0.5, 0.5]])
    flip = torch.tensor([False, True, True])
    found = at_crops(given, (4, 4), (4, 4), boxes, flip)
    for row in range(3):
        one = TeacherOutput(given.attention[[row]], given.mass[[row]], given.features[[row]])
        alone = at_crops(one, (4, 4), (4, 4), boxes[[row]], flip[[row]])
        torch.testing.assert_close(found.features[[row]], alone.features)
        torch.testing.assert_close(found.attention[[row]], alone.attention)
    mirrored = image_of(given.features, (4, 4))[1].flip(-1)
    torch.testing.assert_close(image_of(found.features, (4, 4))[1], mirrored)
