"""The teacher's outputs for a whole photo, read at the boxes of crops (``teacher.view photo``).

An approximation of the teacher at the crop itself: here it has seen what lies outside of the crop too, and its
class-token feature is that of the whole photo.
"""

import torch
from torch import Tensor

from cmt_mae.method.teacher import TeacherOutput

Grid = tuple[int, int]  # rows, columns of patches


def at_crops(
    photos: TeacherOutput, own: Grid, goal: Grid, boxes: Tensor, flip: Tensor | None = None
) -> TeacherOutput:
    """Outputs for crops on the student's grid ``goal`` from those for whole photos on the teacher's grid ``own``.

    boxes (B, 4): top, left, height, width as shares of the photo; flip (B,) bool: crops that are mirrored
    afterwards. A map keeps the photo's sum, so that the attention of a crop is compared within the crop.
    """
    weights = box_weights(boxes, own, goal, flip)
    attention = sample(photos.attention[..., None], own, weights).squeeze(-1)
    total = photos.attention.sum(-1, keepdim=True)
    attention = attention * (total / attention.sum(-1, keepdim=True).clamp_min(1e-12))
    prefix = photos.features.shape[1] - own[0] * own[1]
    features = sample(photos.features[:, prefix:], own, weights)
    return TeacherOutput(
        attention, photos.mass, torch.cat([photos.features[:, :prefix], features], 1)
    )


def box_weights(
    boxes: Tensor, own: Grid, goal: Grid, flip: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """How much each row (B, r, R) and column (B, c, C) of the photo counts for those of the crop."""
    down = _axis_weights(boxes[:, 0], boxes[:, 2], own[0], goal[0])
    across = _axis_weights(boxes[:, 1], boxes[:, 3], own[1], goal[1])
    if flip is not None:
        across = torch.where(flip[:, None, None], across.flip(1), across)
    return down, across


def sample(values: Tensor, own: Grid, weights: tuple[Tensor, Tensor]) -> Tensor:
    """values (B, R * C, E) of the photos -> (B, r * c, E) of the crops, in fp32."""
    down, across = weights
    with torch.autocast(values.device.type, enabled=False):
        image = values.float().unflatten(1, own)
        rows = torch.einsum("brR,bRCe->brCe", down, image)
        return torch.einsum("bcC,brCe->brce", across, rows).flatten(1, 2)


def _axis_weights(start: Tensor, length: Tensor, cells: int, goal: int) -> Tensor:
    """Bilinear weights (B, goal, cells); where several cells fall into one of the crop, its wider (antialiased)
    form. That is what F.interpolate(mode="bilinear", antialias=True) does, for a box that begins anywhere."""
    scale = (length * (cells / goal))[:, None, None]  # cells of the photo in one of the crop
    places = torch.arange(goal, device=start.device)[None, :, None] + 0.5
    centre = start[:, None, None] * cells + places * scale
    distance = centre - torch.arange(cells, device=start.device) - 0.5
    weights = (1 - distance.abs() / scale.clamp_min(1)).clamp_min(0)
    return weights / weights.sum(-1, keepdim=True)
