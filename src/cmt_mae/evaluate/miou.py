"""mIoU, mAcc and aAcc from a confusion matrix, with mmseg's conventions."""

from dataclasses import dataclass

import torch
from torch import Tensor


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


def scores(confusion: Tensor) -> Scores:
    """The numbers of a confusion matrix summed over all images.

    A class that is predicted somewhere but occurs nowhere has IoU 0 and counts; one that is neither is
    left out. All NaN where no pixel is labelled.
    """
    matrix = confusion.cpu().double()
    right, truth, said = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    iou, accuracy = right / (truth + said - right), right / truth
    return Scores(
        miou=iou.nanmean().item(),
        macc=accuracy.nanmean().item(),
        aacc=(right.sum() / truth.sum()).item(),
        iou=iou,
        accuracy=accuracy,
        pixels=truth.long(),
    )
