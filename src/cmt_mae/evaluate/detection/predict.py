"""From the detector's answers to COCO's result format, in the original picture's pixels."""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from faster_coco_eval.core import mask as coco_mask
from torch import Tensor

Size = tuple[int, int]


def to_coco(
    found: dict[str, Tensor], image_id: int, category_ids: list[int], resized: Size, original: Size
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """One image's detections as COCO's results with boxes and, in the same order, with masks.

    found: boxes (N, 4) in the resized picture, labels (N,) 1..K, scores (N,), masks (N, 1, S, S) in 0..1
    (without a mask head there are none, and the second list is empty).
    resized, original: (height, width). Boxes get two decimals and scores five; masks compressed RLEs.
    """
    height, width = original
    factors = torch.tensor([width / resized[1], height / resized[0]] * 2)
    boxes = found["boxes"].float().cpu() * factors
    boxes = boxes.clamp(min=0).minimum(torch.tensor([width, height, width, height]))
    masks = found["masks"].float().cpu() if "masks" in found else [None] * len(boxes)
    labels, scores = found["labels"].tolist(), found["scores"].tolist()
    as_boxes, as_masks = [], []
    for box, label, score, mask in zip(boxes, labels, scores, masks, strict=True):
        left, top, right, bottom = box.tolist()
        about = {"image_id": image_id, "category_id": category_ids[label - 1]}
        corner_and_sides = [round(v, 2) for v in (left, top, right - left, bottom - top)]
        as_boxes.append({**about, "bbox": corner_and_sides, "score": round(score, 5)})
        if mask is None:
            continue
        rle = coco_mask.encode(
            np.asfortranarray(paste(mask[0], (left, top, right, bottom), original))
        )
        counts = rle["counts"].decode() if isinstance(rle["counts"], bytes) else rle["counts"]
        as_masks.append(
            {
                **about,
                "segmentation": {"size": [height, width], "counts": counts},
                "score": round(score, 5),
            }
        )
    return as_boxes, as_masks


def paste(mask: Tensor, box: tuple[float, float, float, float], size: Size) -> np.ndarray:
    """Mask (S, S) of probabilities, spread over its box (left, top, right, bottom) -> (H, W) uint8.

    A pixel is set where the bilinearly sampled probability at its centre is .5 or more.
    """
    height, width = size
    whole = np.zeros(size, dtype=np.uint8)
    left, top, right, bottom = box
    x0, x1 = max(0, math.floor(left)), min(width, math.ceil(right))
    y0, y1 = max(0, math.floor(top)), min(height, math.ceil(bottom))
    if x1 <= x0 or y1 <= y0 or right <= left or bottom <= top:
        return whole
    x, y = torch.arange(x0, x1), torch.arange(y0, y1)
    u = (x + 0.5 - left) / (right - left) * 2 - 1
    v = (y + 0.5 - top) / (bottom - top) * 2 - 1
    places = torch.stack(torch.meshgrid(u, v, indexing="xy"), dim=-1)
    sampled = F.grid_sample(mask[None, None], places[None].to(mask.dtype), align_corners=False)
    whole[y0:y1, x0:x1] = (sampled[0, 0] >= 0.5).numpy()
    return whole
