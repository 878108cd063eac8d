"""Features of video frames: resized as the published script does, one forward pass per frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cmt_mae.backbones import Backbone, resized
from cmt_mae.backbones.backbone import IMAGENET_MEAN, IMAGENET_STD
from cmt_mae.core.errors import InputError
from cmt_mae.evaluate.pyramid import depth_of, patch_of
from cmt_mae.evaluate.video.protocol import VideoProtocol

TYPO_STD = (0.228, 0.224, 0.225)
"""ImageNet's standard deviation as DINO's video script has it (spec 9.1)."""


def resize_linear(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """uint8 (H, W, C) to (height, width, C), bit for bit as OpenCV's INTER_LINEAR does.

    Two by two pixels are mixed however small the result (no antialias), with weights of 11 bits and
    OpenCV's roundings: half of the numbers differ by one from an exact mean, so features would too.
    """
    if image.shape[:2] == (height, width):
        return image
    across, weights = _taps(image.shape[1], width, clamp=True)
    wide = image.astype(np.int32)
    rows = wide[:, across[0]] * weights[0][:, None] + wide[:, across[1]] * weights[1][:, None]
    rows >>= 4
    down, weights = _taps(image.shape[0], height, clamp=False)
    mixed = (rows[down[0]] * weights[0][:, None, None]) >> 16
    mixed += (rows[down[1]] * weights[1][:, None, None]) >> 16
    return ((mixed + 2) >> 2).clip(0, 255).astype(np.uint8)


def _taps(old: int, new: int, clamp: bool) -> tuple[list[NDArray[Any]], list[NDArray[Any]]]:
    """For each new place the two old places and their weights times 2048.

    Beyond the border OpenCV takes the border pixel whole along rows (clamp), but mixes it with
    itself down columns, which rounds differently.
    """
    centre = ((np.arange(new) + 0.5) * (old / new) - 0.5).astype(np.float32)
    left = np.floor(centre).astype(np.int64)
    share = centre - left.astype(np.float32)
    if clamp:
        share[(left < 0) | (left >= old - 1)] = 0
    one, scale = np.float32(1), np.float32(2048)
    weights = [np.rint((one - share) * scale), np.rint(share * scale)]
    places = [left.clip(0, old - 1), (left + 1).clip(0, old - 1)]
    return places, [weight.astype(np.int32) for weight in weights]


@dataclass
class Extractor:
    """A backbone at one input size, ready to give features."""

    backbone: Backbone
    protocol: VideoProtocol
    device: torch.device
    size: tuple[int, int]
    """Height and width of its input in pixels."""
    patch: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """What its input is normalised with: the backbone's own, but for the protocol's typo."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.size[0] // self.patch[0], self.size[1] // self.patch[1]

    @torch.no_grad()
    def __call__(self, frames: NDArray[np.uint8]) -> Tensor:
        """Frames uint8 (B, height, width, C) -> l2-normalised features (B, rows, columns, D), float32.

        Class token and registers are dropped. Raises InputError where a feature is not finite.
        """
        pixels = torch.from_numpy(frames).to(self.device).permute(0, 3, 1, 2).float() / 255
        mean = torch.tensor(self.mean, device=self.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=self.device).view(-1, 1, 1)
        tokens = self._tokens((pixels - mean) / std).float()
        if not tokens.isfinite().all():
            raise InputError(
                f"features of {self.backbone.source} are not finite; its weights are at fault"
            )
        return F.normalize(tokens, dim=-1).unflatten(1, self.grid)

    def _tokens(self, x: Tensor) -> Tensor:
        """Patch tokens (B, N, D) of the protocol's layer."""
        model: Any = self.backbone.model
        if self.protocol.layer is None and self.protocol.final_norm:
            tokens: Tensor = model.forward_features(x)
            return tokens[:, self.backbone.prefix_tokens :]
        last = len(model.blocks) if self.protocol.layer is None else self.protocol.layer
        (found,) = model.forward_intermediates(
            x,
            indices=[last - 1],
            norm=self.protocol.final_norm,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        chosen: Tensor = found
        return chosen


def make_extractor(
    native: Backbone,
    size: tuple[int, int],
    protocol: VideoProtocol,
    device: torch.device,
) -> Extractor:
    """The backbone at this input size.

    Args:
        native: the backbone at its own size.
        size: height and width, multiples of the patch.

    Raises:
        InputError: a layer that is not there, or positions that cannot be resized as asked.
    """
    patch = patch_of(native)
    depth = depth_of(native)
    if protocol.layer is not None and protocol.layer > depth:
        raise InputError(f"DAVIS: layer {protocol.layer}; {native.architecture} has {depth} blocks")
    backbone = native if size == native.img_size else resized(native, size)
    if protocol.positions == "scale_factor" and size != native.img_size:
        _positions_by_factor(backbone, native, patch)
    backbone.model.to(device).eval()
    typo = protocol.std_typo and (backbone.mean, backbone.std) == (IMAGENET_MEAN, IMAGENET_STD)
    std = TYPO_STD if typo else backbone.std
    return Extractor(backbone, protocol, device, size, patch, backbone.mean, std)


def _positions_by_factor(backbone: Backbone, native: Backbone, patch: tuple[int, int]) -> None:
    """DINO's resizing of positions: bicubic by the factor (grid + .1) / old grid (spec 9.1).

    The .1 was there against a grid one too small by rounding; it also moves every sample a little.
    """
    table: Tensor | None = getattr(native.model, "pos_embed", None)
    if table is None:
        raise InputError(
            f"positions scale_factor: {native.architecture} has no table of positions; use size"
        )
    old = (native.img_size[0] // patch[0], native.img_size[1] // patch[1])
    new = (backbone.img_size[0] // patch[0], backbone.img_size[1] // patch[1])
    prefix = table.shape[1] - old[0] * old[1]
    grid = table[:, prefix:].detach().unflatten(1, old).permute(0, 3, 1, 2)
    factor = ((new[0] + 0.1) / old[0], (new[1] + 0.1) / old[1])
    grid = F.interpolate(grid, scale_factor=factor, mode="bicubic", align_corners=False)
    if tuple(grid.shape[-2:]) != new:
        raise InputError(
            f"positions scale_factor gives a grid of {grid.shape[-2:]}, not {new}; use size"
        )
    with torch.no_grad():
        target: Any = backbone.model.pos_embed
        target[:, prefix:] = grid.permute(0, 2, 3, 1).flatten(1, 2)
