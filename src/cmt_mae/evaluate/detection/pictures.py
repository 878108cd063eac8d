"""Pictures of detections: what is there on the left, what was found on the right."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cmt_mae.core.text import printable
from cmt_mae.data.coco import CocoSplit
from cmt_mae.data.coco_masks import mask_of
from cmt_mae.evaluate.drawing import save_picture

SHOWN_SCORE = 0.3
"""Detections below are not drawn."""
MOST_SHOWN = 30
"""The best detections of an image that are drawn."""
ACROSS = 2
"""Pairs of pictures in a row."""


def detection_picture(
    path: Path,
    split: CocoSplit,
    indexes: Sequence[int],
    boxes: list[dict[str, Any]],
    masks: list[dict[str, Any]] | None,
    title: str,
    channels: int = 3,
) -> None:
    """Write a PNG of these images of the split, each twice: ground truth, and detections with scores.

    channels: of the image files; the first three are shown, one is shown as grey.
    boxes, masks: all detections in COCO's result format, in the same order (predict.to_coco); masks None: boxes
    alone. A class has the same colour on both sides; heaps (``iscrowd``) are hatched.
    """
    by_image = best_by_image(boxes, masks)
    rows = -(-len(indexes) // ACROSS)
    figure = Figure(figsize=(7.0 * ACROSS, 2.9 * rows + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 2 * ACROSS, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for place, index in enumerate(indexes):
        left, right = axes[place // ACROSS, 2 * (place % ACROSS) :][:2]
        whole = split.image(index, channels)
        shown = (whole if channels >= 3 else whole[:1].expand(3, -1, -1))[:3]
        image = shown.permute(1, 2, 0).numpy()
        truth = split.annotations(index)
        draw_objects(left, image, truth, split)
        found = by_image.get(int(split.ids[index]), [])
        draw_objects(right, image, found[:MOST_SHOWN], split)
        left.set_title(
            f"{printable(split.names[index])}: {len(truth)} there", fontsize=8, parse_math=False
        )
        right.set_title(f"{len(found)} found with score {SHOWN_SCORE} or more", fontsize=8)
    figure.suptitle(printable(title), fontsize=11, parse_math=False)
    save_picture(figure, path)


def best_by_image(
    boxes: list[dict[str, Any]], masks: list[dict[str, Any]] | None
) -> dict[int, list[dict[str, Any]]]:
    """Image id -> its detections with score SHOWN_SCORE or more, the best first, box and mask in one record."""
    kept: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for box, mask in zip(boxes, masks if masks is not None else [{}] * len(boxes), strict=True):
        if box["score"] >= SHOWN_SCORE:
            kept[int(box["image_id"])].append({**mask, **box})
    for found in kept.values():
        found.sort(key=lambda one: -one["score"])
    return kept


def draw_objects(
    axis: Any, image: np.ndarray, objects: list[dict[str, Any]], split: CocoSplit
) -> None:
    """One picture with masks laid over it, boxes, names and scores. objects: annotations or detections."""
    canvas = image.astype(np.float32) / 255
    for record in objects:
        if "segmentation" not in record:
            continue
        inside = mask_of(record["segmentation"], *image.shape[:2]).astype(bool)
        canvas[inside] = 0.55 * canvas[inside] + 0.45 * np.array(_colour(record, split))
    axis.imshow(canvas, interpolation="nearest")
    for record in objects:
        (x, y, w, h), score = record["bbox"], record.get("score")
        colour, heap = _colour(record, split), record.get("iscrowd", 0)
        axis.add_patch(
            Rectangle(
                (x - 0.5, y - 0.5), w, h, fill=False, edgecolor=colour, linewidth=1.2,
                hatch="//" if heap else None,
            )
        )  # fmt: skip
        name = printable(split.classes[split.category_ids.index(record["category_id"])])
        text = name + (" (heap)" if heap else "") + ("" if score is None else f" {score:.2f}")
        above = y > 0.06 * len(image)  # else it would be cut off
        axis.text(
            max(0.0, x), max(0.0, y), text, fontsize=6, color="white",
            va="bottom" if above else "top", clip_on=True,
            parse_math=False, bbox={"facecolor": colour, "alpha": 0.8, "pad": 0.8, "linewidth": 0},
        )  # fmt: skip


def _colour(record: dict[str, Any], split: CocoSplit) -> tuple[float, float, float]:
    """Of a class; neighbouring numbers differ most."""
    number = split.category_ids.index(record["category_id"])
    red, green, blue, _ = colormaps["hsv"]((number * 0.381966) % 1.0)
    return 0.8 * red, 0.75 * green, 0.85 * blue
