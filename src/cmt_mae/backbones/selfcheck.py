"""A file of ours remembers what its network made of one fixed picture.

The checksum says that the weights are those written; this says that the network built around them is: a wrong
activation (QuickGELU for GELU: 0.7 % here on the embedded teacher, 29 % on DeiT-Tiny) or normalisation changes no
weight and every feature.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from cmt_mae.core.errors import InputError

NUMBERS = 16
TOLERANCE = (
    0.002  # of the largest number: above the rounding of other devices, below a wrong activation
)


@torch.no_grad()
def features_of_fixed_picture(
    model: nn.Module, mean: Sequence[float], std: Sequence[float], img_size: tuple[int, int]
) -> list[float]:
    """First 16 channels of the mean token after the final norm, for a picture of waves in 0..1."""
    parameter = next(model.parameters())
    height, width = img_size
    waves = torch.arange(len(mean) * height * width, dtype=torch.float32).reshape(
        1, -1, height, width
    )
    picture = 0.5 + 0.5 * torch.cos(0.013 * waves)
    shape = (1, -1, 1, 1)
    picture = (picture - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    training = model.training
    model.eval()
    with torch.autocast(parameter.device.type, enabled=False):
        network: Any = model
        tokens = network.forward_features(picture.to(parameter.device, parameter.dtype))
    model.train(training)
    numbers: list[float] = tokens.float().mean(1)[0, :NUMBERS].cpu().tolist()
    return numbers


def check_features(
    written: Sequence[float],
    model: nn.Module,
    mean: Sequence[float],
    std: Sequence[float],
    img_size: tuple[int, int],
    where: str,
) -> None:
    """Raise InputError where the network's features are not those it had when it was written."""
    now = torch.tensor(features_of_fixed_picture(model, mean, std, img_size))
    before = torch.tensor(list(written), dtype=torch.float32)
    if (
        before.shape != now.shape
        or not (now - before).abs().max() <= TOLERANCE * before.abs().max()
    ):
        raise InputError(
            f"{where}: self-check failed, the network gives other features than when it was written (another "
            "activation or normalisation): load it with the versions it was made with, or export again"
        )
