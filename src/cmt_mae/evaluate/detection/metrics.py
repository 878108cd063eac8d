"""COCO's average precision by faster-coco-eval, from detections in COCO's result format."""

import copy
import math
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster

AREAS = ("", "s", "m", "l")
"""All, small (up to 32^2 pixels), medium, large (from 96^2 on)."""
LIMITS = (32.0**2, 96.0**2)


def coco_metrics(
    truth: dict[str, Any], boxes: list[dict[str, Any]], masks: list[dict[str, Any]] | None
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """(metrics, AP of each class by name), in percent; NaN where there is nothing to find.

    truth: a COCO dictionary (CocoSplit.ground_truth). boxes, masks: results with ``bbox`` and with
    ``segmentation`` (None: boxes alone). Metrics: box/AP (IoU .5:.95), box/AP50, box/AP75, box/APs, box/APm,
    box/APl and the same with mask/; at most 100 detections per image (spec 7).
    """
    metrics: dict[str, float] = {}
    classes: dict[str, dict[str, float]] = {c["name"]: {} for c in truth["categories"]}
    by_id = sorted(truth["categories"], key=lambda category: category["id"])
    for kind, iou_type, found in (("box", "bbox", boxes), ("mask", "segm", masks)):
        if found is None:
            continue
        precision = _precision(truth, found, iou_type)  # (10 IoUs, 101 recalls, K, 4 areas)
        metrics[f"{kind}/AP"] = _mean(precision[..., 0])
        metrics[f"{kind}/AP50"] = _mean(precision[0, ..., 0])
        metrics[f"{kind}/AP75"] = _mean(precision[5, ..., 0])
        for number, area in enumerate(AREAS[1:], start=1):
            metrics[f"{kind}/AP{area}"] = _mean(precision[..., number])
        for number, category in enumerate(by_id):
            classes[category["name"]][f"{kind}/AP"] = _mean(precision[:, :, number, 0])
    return metrics, classes


def objects_of(truth: dict[str, Any]) -> dict[str, int]:
    """How many objects each AP is over, by the end of its name ("" for all, s, m, l); heaps do not count."""
    areas = [float(a["area"]) for a in truth["annotations"] if not a["iscrowd"]]
    small, large = sum(a <= LIMITS[0] for a in areas), sum(a >= LIMITS[1] for a in areas)
    medium = sum(LIMITS[0] <= a <= LIMITS[1] for a in areas)
    return dict(zip(AREAS, (len(areas), small, medium, large), strict=True))


def _precision(truth: dict[str, Any], found: list[dict[str, Any]], iou_type: Any) -> np.ndarray:
    """Interpolated precision (IoU, recall, class, area) at 100 detections per image; -1: undefined."""
    # both are written to by the library
    annotated = COCO(copy.deepcopy(truth))
    evaluation = COCOeval_faster(
        annotated, annotated.loadRes(copy.deepcopy(found)), iou_type, print_function=_silent
    )
    evaluation.evaluate()
    evaluation.accumulate()
    shape = [len(evaluation.params.iouThrs), len(evaluation.params.recThrs)]
    shape += [len(truth["categories"]), len(AREAS), len(evaluation.params.maxDets)]
    precision: np.ndarray = np.asarray(evaluation.eval["precision"]).reshape(shape)
    return precision[..., -1]


def _mean(precision: np.ndarray) -> float:
    """In percent, over what is defined."""
    defined = precision[precision > -1]
    return 100 * float(defined.mean()) if defined.size else math.nan


def _silent(*_: Any) -> None:
    """In place of print."""
