"""HOG targets, as MaskFeat predicts them (Wei et al., CVPR 2022): one histogram a cell and channel.

The defaults are MaskFeat's ``HOGLayerC`` with cells of 8 pixels, 9 bins and a tiled Gaussian window of 16
pixels with sigma 8: 3x3 Sobel gradients with reflected borders, *unsigned* orientation over 180 degrees
measured from the vertical axis, hard binning by magnitude, and each cell's histogram divided by its own
l2 norm, channel by channel. Meta's own runs have no window: ``gaussian=False`` (``target.hog_window``).
One difference is left: gradients on the axis between the last and the first bin all fall into the first here.
The keyword arguments reach the plain [-1, 0, 1] definition of Dalal and Triggs as well; with
``gradient="central", gaussian=False, angle_from="x"`` a channel equals
``skimage.feature.hog(..., cells_per_block=(1, 1), block_norm="L2")``.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cmt_mae.core.errors import InputError


def hog_cell(patch_size: int, cell: int = 8) -> int:
    """Side of a cell in pixels: ``cell`` where it divides the patch, else the whole patch.

    So patches of 8 and 16 px have 1 and 4 cells of 8 px, and a patch of 14 px (or one smaller than
    a cell) is one cell of its own size; pass ``cell=7`` for 4 cells in a patch of 14.
    """
    if patch_size < 1 or cell < 1:
        raise InputError(
            f"HOG needs a patch and a cell of at least 1 px, got patch_size {patch_size} and "
            f"cell {cell}: give positive numbers"
        )
    return cell if patch_size % cell == 0 else patch_size


def hog_dim(patch_size: int, channels: int = 3, cell: int = 8, bins: int = 9) -> int:
    """Length of one patch's target: channels x bins x cells (108 for RGB, 16 px, the defaults)."""
    return channels * bins * (patch_size // hog_cell(patch_size, cell)) ** 2


def _gradients(images: Tensor, gradient: str) -> tuple[Tensor, Tensor]:
    """(right - left, below - above) of every channel; at a reflected border the difference is 0."""
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    along_x = padded[..., :, 2:] - padded[..., :, :-2]
    along_y = padded[..., 2:, :] - padded[..., :-2, :]
    if gradient == "sobel":
        along_x = along_x[..., :-2, :] + 2 * along_x[..., 1:-1, :] + along_x[..., 2:, :]
        along_y = along_y[..., :, :-2] + 2 * along_y[..., :, 1:-1] + along_y[..., :, 2:]
        return along_x, along_y
    return along_x[..., 1:-1, :], along_y[..., :, 1:-1]


def _window(height: int, width: int, cell: int, device: torch.device) -> Tensor:
    """(H, W): Gaussians of 2 x 2 cells with sigma = one cell, laid side by side from the corner."""
    offset = torch.arange(2 * cell, device=device, dtype=torch.float32) - (cell - 0.5)
    bell = torch.exp(-0.5 * (offset / cell) ** 2)
    rows = bell.repeat(math.ceil(height / (2 * cell)))[:height]
    columns = bell.repeat(math.ceil(width / (2 * cell)))[:width]
    return rows[:, None] * columns[None, :]


@torch.no_grad()
def hog_targets(
    images: Tensor,
    patch_size: int,
    cell: int = 8,
    bins: int = 9,
    *,
    gradient: Literal["sobel", "central"] = "sobel",
    gaussian: bool = True,
    angle_from: Literal["y", "x"] = "y",
) -> Tensor:
    """Histograms of oriented gradients of every patch, in float32 whatever the input or autocast.

    Args:
        images: (B, C, H, W) floats in 0..1. A cell's histogram is divided by its norm, so any
            affine change of a channel (mean / std normalisation) gives the same target.
        patch_size: side of a patch in pixels; H and W are multiples of it.
        cell: side of a cell in pixels, under the rule of :func:`hog_cell`.
        bins: orientation bins over 180 degrees (unsigned: a gradient and its opposite are one).
        gradient: ``"sobel"`` is MaskFeat's, ``"central"`` is [-1, 0, 1] of Dalal and Triggs.
        gaussian: weigh magnitudes by MaskFeat's tiled Gaussian window.
        angle_from: the axis from which the angle runs. ``"y"`` is MaskFeat's atan2(gx, gy): a
            vertical edge falls in the middle bin. ``"x"`` is Dalal and Triggs' atan2(gy, gx): it
            falls in bin 0.

    Returns:
        (B, L, C * bins * cells) float32 in 0..1; patches in row-major order, inside a patch the
        order of MaskFeat: channel, bin, cell row, cell column. A cell without gradient is zeros.

    Raises:
        InputError: images are not 4-d, smaller than 2 px, or no multiple of the patch; bins < 1.
    """
    if images.dim() != 4 or min(images.shape[-2:]) < 2:
        raise InputError(
            f"HOG needs images (B, C, H, W) of at least 2 x 2 px, got shape {tuple(images.shape)}"
        )
    if bins < 1:
        raise InputError(f"HOG needs at least 1 bin, got {bins}: use 9 as MaskFeat does")
    side = hog_cell(patch_size, cell)
    batch, channels, height, width = images.shape
    if height % patch_size or width % patch_size:
        raise InputError(
            f"images of {height} x {width} px do not divide into patches of {patch_size} px: "
            f"choose an image size that is a multiple of {patch_size}"
        )
    with torch.autocast(images.device.type, enabled=False):
        along_x, along_y = _gradients(images.float(), gradient)
        magnitude = torch.sqrt(along_x.square() + along_y.square())
        across, axis = (along_x, along_y) if angle_from == "y" else (along_y, along_x)
        # In 8-bit pictures many gradients lie exactly on the axis, the border of the first and last
        # bin, where rounding would choose the bin (and did: a quarter of a photo's entries changed
        # with the mean and std). Within 1e-4 rad of the axis they are put on it: bin 0.
        across = torch.where(across.abs() < 1e-4 * axis.abs(), 0.0, across)
        angle = torch.atan2(across, axis)
        # The remainder folds opposite directions together: -pi, 0 and pi are all bin 0.
        which = (angle * (bins / math.pi)).floor().remainder(bins)
        if gaussian:
            magnitude = magnitude * _window(height, width, side, images.device)
        # A pass a bin, not a scatter: the sums come out the same on every run of a GPU.
        histograms = torch.stack(
            [F.avg_pool2d(magnitude * (which == index), side) for index in range(bins)], dim=2
        )
        histograms = F.normalize(histograms, dim=2)  # eps 1e-12: a flat cell stays zeros
    per_patch = patch_size // side
    rows, columns = height // patch_size, width // patch_size
    shaped = histograms.reshape(batch, channels * bins, rows, per_patch, columns, per_patch)
    return shaped.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)
