"""mIoU, mAcc and aAcc from a confusion matrix, with mmseg's conventions."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

REPLICATES = 1000
"""Sets of images drawn with replacement, from whose numbers an interval is read."""


@dataclass(frozen=True)
class Scores:
    """Shares 0..1 from a confusion matrix."""

    miou: float
    """Mean over the classes that occur in truth or prediction of intersection / union."""
    macc: float
    """Mean over the classes that occur in the truth of the share of their pixels that is found."""
    aacc: float
    """Share of all labelled pixels that is right."""
    iou: Tensor
    """(classes,) float64; NaN where a class occurs neither in the truth nor in the predictions."""
    accuracy: Tensor
    """(classes,) float64; NaN where a class does not occur in the truth."""
    pixels: Tensor
    """(classes,) int64: labelled pixels of each class."""


def confusion_matrix(prediction: Tensor, truth: Tensor, classes: int) -> Tensor:
    """(classes, classes) int64 on the tensors' device: [t, p] pixels of class t were called p.

    prediction: 0 .. classes - 1. truth: the same shape; negative values are not counted.
    """
    counted = truth >= 0
    pairs = truth[counted].long() * classes + prediction[counted].long()
    return torch.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def counts(confusion: Tensor) -> Tensor:
    """(3, classes) of a confusion matrix: right, true and predicted pixels of each class."""
    return torch.stack([confusion.diagonal(), confusion.sum(1), confusion.sum(0)])


def scores(confusion: Tensor) -> Scores:
    """The numbers of a confusion matrix summed over all images.

    A class that is predicted somewhere but occurs nowhere has IoU 0 and counts; one that is neither is
    left out. All NaN where no pixel is labelled.
    """
    right, truth, said = counts(confusion.cpu().double())
    iou, accuracy = right / (truth + said - right), right / truth
    return Scores(
        miou=iou.nanmean().item(),
        macc=accuracy.nanmean().item(),
        aacc=(right.sum() / truth.sum()).item(),
        iou=iou,
        accuracy=accuracy,
        pixels=truth.long(),
    )


def intervals(images: Tensor) -> dict[str, list[float]]:
    """mIoU, mAcc and aAcc -> the ends of their 95 % interval over images, in percent.

    images: ``counts`` of each, (N, 3, classes). By the bootstrap: the 2.5 % and 97.5 % quantiles over
    sets of N images drawn with replacement, always the same sets. Empty for fewer than two images.
    """
    n, _, classes = images.shape
    if n < 2:
        return {}
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=REPLICATES)
    sums = torch.from_numpy(drawn).double() @ images.reshape(n, -1).double()
    right, truth, said = sums.reshape(REPLICATES, 3, classes).unbind(1)
    found = {
        "mIoU": (right / (truth + said - right)).nanmean(1),
        "mAcc": (right / truth).nanmean(1),
        "aAcc": right.sum(1) / truth.sum(1),
    }
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    return {
        name: (100 * values.nanquantile(ends)).tolist()
        for name, values in found.items()
        if not values.isnan().all()
    }
