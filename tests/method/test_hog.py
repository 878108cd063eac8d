"""HOG targets against scikit-image, against hand-worked pictures, and MaskFeat's conventions."""

import math

import numpy as np
import pytest
import torch
from skimage import data
from skimage.feature import hog as skimage_hog
from torch import Tensor

from cmt_mae.core.errors import InputError
from cmt_mae.method.hog import hog_cell, hog_dim, hog_targets


def photo(size: int) -> np.ndarray:
    """(3, size, size) floats in 0..1: a real picture that comes with scikit-image.

    Over 256, not 255, so that differences are exact and float32 and float64 agree on the many
    gradients of an 8-bit picture that lie exactly on an axis.
    """
    return np.ascontiguousarray(data.astronaut()[:size, 100 : 100 + size].transpose(2, 0, 1)) / 256


def cells_of(targets: Tensor, channels: int, bins: int, per_patch: int, rows: int) -> np.ndarray:
    """(channels, rows * per_patch, columns * per_patch, bins) from one image's targets."""
    shaped = targets[0].view(rows, -1, channels, bins, per_patch, per_patch)
    grid = shaped.permute(2, 0, 4, 1, 5, 3)
    return grid.reshape(channels, rows * per_patch, -1, bins).numpy()


@pytest.mark.parametrize(
    ("patch", "cell", "size", "bins"),
    [(16, 8, 96, 9), (8, 8, 64, 9), (14, 14, 98, 9), (14, 7, 98, 5)],
)
def test_equals_scikit_image(patch: int, cell: int, size: int, bins: int) -> None:
    image = photo(size)
    ours = hog_targets(
        torch.from_numpy(image)[None],
        patch,
        cell,
        bins,
        gradient="central",
        gaussian=False,
        angle_from="x",
    )
    got = cells_of(ours, 3, bins, patch // cell, size // patch)
    for channel in range(3):
        expected = skimage_hog(
            image[channel],
            orientations=bins,
            pixels_per_cell=(cell, cell),
            cells_per_block=(1, 1),
            block_norm="L2",
            feature_vector=False,
        )[:, :, 0, 0, :]
        np.testing.assert_allclose(got[channel], expected, atol=1e-5)


@pytest.mark.parametrize("gaussian", [True, False])
def test_maskfeat_definition_in_plain_loops(gaussian: bool) -> None:
    # MaskFeat's order of work written pixel by pixel in float64, with no tensor operation of ours.
    size, bins, cell = 32, 9, 8
    image = photo(size)[:1]
    padded = np.pad(image[0], 1, mode="reflect")
    sobel = np.array([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])
    expected = np.zeros((size // cell, size // cell, bins))
    for row in range(size):
        for column in range(size):
            window = padded[row : row + 3, column : column + 3]
            gx, gy = (window * sobel).sum(), (window * sobel.T).sum()
            index = math.floor(math.atan2(gx, gy) / math.pi * bins) % bins
            offset_y, offset_x = (row % 16 - 7.5) / 8, (column % 16 - 7.5) / 8
            weight = math.exp(-0.5 * (offset_y**2 + offset_x**2)) if gaussian else 1
            expected[row // cell, column // cell, index] += weight * math.hypot(gx, gy)
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    ours = hog_targets(torch.from_numpy(image)[None], patch_size=16, gaussian=gaussian)
    np.testing.assert_allclose(cells_of(ours, 1, bins, 2, 2)[0], expected, atol=1e-5)


def test_constant_image_is_zeros() -> None:
    for value in (0.0, 0.3, 1.0):
        targets = hog_targets(torch.full((2, 3, 32, 32), value), 16)
        assert targets.shape == (2, 4, 108)
        assert targets.abs().max() == 0


@pytest.mark.parametrize(
    ("patch", "cell", "size", "cells"),
    [(8, 8, (32, 48), 1), (14, 14, (56, 28), 1), (16, 8, (32, 64), 4), (4, 4, (16, 16), 1)],
)
def test_shapes_and_cell_rule(patch: int, cell: int, size: tuple[int, int], cells: int) -> None:
    assert hog_cell(patch) == cell
    targets = hog_targets(torch.rand(2, 4, *size), patch)
    assert targets.shape == (2, size[0] * size[1] // patch**2, 4 * 9 * cells)
    assert targets.shape[-1] == hog_dim(patch, channels=4)
    assert targets.min() >= 0
    assert targets.max() <= 1 + 1e-6


def test_every_cell_has_unit_norm_and_ignores_normalisation() -> None:
    image = torch.from_numpy(photo(64)).float()[None]
    targets = hog_targets(image, 16)
    norms = targets.view(1, 16, 3, 9, 4).norm(dim=3)
    torch.testing.assert_close(norms, torch.ones_like(norms))
    mean, std = torch.tensor([0.48, 0.46, 0.41]), torch.tensor([0.27, 0.26, 0.28])
    changed = hog_targets((image - mean.view(3, 1, 1)) / std.view(3, 1, 1), 16)
    # An 8-bit photo has many gradients exactly on the border of bins 0 and 8: rounding in the
    # normalisation must not move them (without the snap to the axis 25 % of the entries change).
    torch.testing.assert_close(changed, targets, atol=1e-4, rtol=0)


def test_float32_under_autocast() -> None:
    image = torch.rand(1, 3, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = hog_targets(image, 16)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, hog_targets(image, 16))
    assert hog_targets(image.bfloat16(), 16).dtype == torch.float32


def test_channels_last_gives_the_same() -> None:
    image = torch.rand(2, 3, 32, 48)
    last = image.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(hog_targets(last, 16), hog_targets(image, 16))


@pytest.mark.parametrize(
    ("shape", "options", "word"),
    [
        ((1, 3, 30, 32), {"patch_size": 16}, "multiple of 16"),
        ((3, 32, 32), {"patch_size": 16}, "shape"),
        ((1, 3, 32, 32), {"patch_size": 16, "bins": 0}, "bin"),
        ((1, 3, 32, 32), {"patch_size": 16, "cell": 0}, "cell"),
        ((1, 3, 1, 1), {"patch_size": 1}, "2 x 2"),
    ],
)
def test_impossible_input(shape: tuple[int, ...], options: dict[str, int], word: str) -> None:
    with pytest.raises(InputError, match=word):
        hog_targets(torch.rand(shape), **options)  # type: ignore[arg-type]
