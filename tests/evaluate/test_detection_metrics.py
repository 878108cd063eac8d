"""Average precision and detections in COCO's format, against pycocotools."""

import contextlib
import copy
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as reference_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.models.detection.roi_heads import paste_masks_in_image

from cmt_mae.data.coco import open_coco
from cmt_mae.data.sample import write_coco
from cmt_mae.evaluate.detection.metrics import AREAS, coco_metrics, objects_of
from cmt_mae.evaluate.detection.predict import paste, to_coco

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
IDS = (3, 4, 17, 90)  # categories with gaps


def pycocotools(truth: dict[str, Any], file: Path, kind: str) -> dict[str, float]:
    """The reference's six numbers of a stored result file, in percent; NaN for its -1."""
    with contextlib.redirect_stdout(io.StringIO()):
        annotated = COCO()
        annotated.dataset = copy.deepcopy(truth)
        annotated.createIndex()
        evaluation = COCOeval(annotated, annotated.loadRes(str(file)), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    images = [one for one in evaluation.evalImgs if one is not None]
    counted = [sum(int((one["gtIgnore"] == 0).sum()) for one in images if one["aRng"] == limits)
               for limits in evaluation.params.areaRng]  # fmt: skip
    assert objects_of(truth) == dict(zip(AREAS, counted, strict=True))
    values = [math.nan if v == -1 else 100 * float(v) for v in evaluation.stats[:6]]
    return dict(zip(NAMES, values, strict=True))


def ellipse(h: int, w: int, box: list[float]) -> np.ndarray:
    x, y, width, height = box
    rows, columns = np.mgrid[:h, :w] + 0.5
    inside = ((columns - x - width / 2) / max(width / 2, 0.5)) ** 2
    return (inside + ((rows - y - height / 2) / max(height / 2, 0.5)) ** 2 <= 1).astype(np.uint8)


def packed(mask: np.ndarray) -> dict[str, Any]:
    rle = reference_mask.encode(np.asfortranarray(mask))
    return {"size": [int(n) for n in rle["size"]], "counts": rle["counts"].decode()}


def random_case(
    seed: int, images: int = 6, most: int = 6
) -> tuple[dict[str, Any], list[Any], list[Any]]:
    """Truth with crowds, empty images and all sizes; detections near it, doubled, wrong and invented."""
    rng = np.random.default_rng(seed)
    truth: dict[str, Any] = {
        "images": [], "annotations": [], "categories": [{"id": i, "name": f"c{i}"} for i in IDS],
    }  # fmt: skip
    boxes: list[dict[str, Any]] = []
    masks: list[dict[str, Any]] = []

    def find(image: int, category: int, box: list[float], h: int, w: int) -> None:
        about = {"image_id": image, "category_id": int(category)}
        score = round(float(rng.choice([rng.random(), 0.5])), 5)  # ties happen
        boxes.append({**about, "bbox": [round(v, 2) for v in box], "score": score})
        masks.append({**about, "segmentation": packed(ellipse(h, w, box)), "score": score})

    for image in range(1, images + 1):
        h, w = (int(n) for n in rng.integers(40, 200, 2))
        truth["images"].append(
            {"id": image * 7, "file_name": f"{image}.jpg", "height": h, "width": w}
        )
        for _ in range(int(rng.integers(0, most)) if rng.random() < 0.8 else 0):
            side = np.exp(rng.uniform(np.log(4), np.log(180), 2))
            box = [float(v) for v in (rng.uniform(0, w - 4), rng.uniform(0, h - 4), *side)]
            mask, category = ellipse(h, w, box), int(rng.choice(IDS[:3]))
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1, "image_id": image * 7, "category_id": category,
                    "iscrowd": int(rng.random() < 0.25), "area": float(mask.sum()), "bbox": box,
                    "segmentation": packed(mask),
                }
            )  # fmt: skip
            for _ in range(int(rng.integers(0, 4))):
                near = [float(v * rng.uniform(0.85, 1.15)) for v in box]
                find(
                    image * 7, category if rng.random() < 0.8 else int(rng.choice(IDS)), near, h, w
                )
        for _ in range(int(rng.integers(0, 3))):
            find(image * 7, int(rng.choice(IDS)), [float(v) for v in rng.uniform(1, 40, 4)], h, w)
    return truth, boxes, masks


def assert_equal(truth: dict[str, Any], boxes: list[Any], masks: list[Any], folder: Path) -> None:
    before = copy.deepcopy((truth, boxes, masks))
    metrics, classes = coco_metrics(truth, boxes, masks)
    assert (truth, boxes, masks) == before, "nothing that was handed in is written to"
    for kind, iou, rows in (("box", "bbox", boxes), ("mask", "segm", masks)):
        file = folder / f"{iou}.json"
        file.write_text(json.dumps(rows))
        for name, value in pycocotools(truth, file, iou).items():
            assert metrics[f"{kind}/{name}"] == pytest.approx(value, abs=1e-6, nan_ok=True), name
        defined = [c[f"{kind}/AP"] for c in classes.values() if not math.isnan(c[f"{kind}/AP"])]
        mean = float(np.mean(defined)) if defined else math.nan
        assert metrics[f"{kind}/AP"] == pytest.approx(mean, abs=1e-6, nan_ok=True)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_ap_equals_pycocotools(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    truth, boxes, masks = random_case(seed)
    if boxes:  # the reference cannot read an empty file
        assert_equal(truth, boxes, masks, tmp_path_factory.mktemp("ap"))


def test_ap_equals_pycocotools_beyond_100_detections(tmp_path: Path) -> None:
    truth, boxes, masks = random_case(5, images=2, most=60)
    more, more_masks = [], []
    for shift in range(4):
        for box, mask in zip(boxes, masks, strict=True):
            score = round(box["score"] * 0.9**shift, 5)
            more.append({**box, "score": score})
            more_masks.append({**mask, "score": score})
    assert max(sum(b["image_id"] == i for b in more) for i in (7, 14)) > 100
    assert_equal(truth, more, more_masks, tmp_path)


def test_ap_equals_pycocotools_on_real_coco(shared: Path, tmp_path: Path) -> None:
    split = open_coco(shared / "data" / "coco", "val")
    truth, rng = split.ground_truth(), np.random.default_rng(0)
    boxes, masks = [], []
    for index in range(len(split)):
        for record in split.annotations(index):
            h, w = split.sizes[index]
            near = [float(v * rng.uniform(0.9, 1.1)) for v in record["bbox"]]
            about = {"image_id": record["image_id"], "category_id": record["category_id"]}
            score = round(float(rng.random()), 5)
            boxes.append({**about, "bbox": near, "score": score})
            mask = np.zeros((h, w), dtype=np.uint8)
            x, y, x1, y1 = (round(v) for v in (*near[:2], near[0] + near[2], near[1] + near[3]))
            mask[y:y1, x:x1] = 1
            masks.append({**about, "segmentation": packed(mask), "score": score})
    assert_equal(truth, boxes, masks, tmp_path)
    assert coco_metrics(truth, boxes, masks)[0]["box/AP"] > 20


def test_perfect_none_and_undefined(tmp_path: Path) -> None:
    write_coco(tmp_path / "coco", 4, 4)
    truth = open_coco(tmp_path / "coco", "val").ground_truth()
    single = [a for a in truth["annotations"] if not a["iscrowd"]]
    about = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "score": 1.0} for a in single
    ]
    sizes = {i["id"]: (i["height"], i["width"]) for i in truth["images"]}
    polygons = [
        reference_mask.merge(reference_mask.frPyObjects(a["segmentation"], *sizes[a["image_id"]]))
        for a in single
    ]
    boxes = [{**b, "bbox": a["bbox"]} for a, b in zip(single, about, strict=True)]
    masks = [
        {**b, "segmentation": packed(reference_mask.decode(p))}
        for p, b in zip(polygons, about, strict=True)
    ]
    metrics, classes = coco_metrics(truth, boxes, masks)
    assert metrics["box/AP"] == pytest.approx(100)
    assert metrics["mask/AP"] == pytest.approx(100)
    assert math.isnan(metrics["box/APl"]), "64 pixels hold nothing large"
    absent = set(classes) - {
        c["name"] for c in truth["categories"] if c["id"] in {a["category_id"] for a in single}
    }
    assert absent
    assert all(math.isnan(classes[name]["box/AP"]) for name in absent)
    nothing, _ = coco_metrics(truth, [], [])
    assert nothing["box/AP"] == nothing["mask/AP"] == 0
    empty, _ = coco_metrics({**truth, "annotations": []}, boxes, masks)
    assert all(math.isnan(value) for value in empty.values())


# --- detections in the original picture ------------------------------------------------------------


def test_boxes_and_masks_come_back_to_the_original() -> None:
    found = {
        "boxes": torch.tensor([[10.0, 20, 50, 60], [-5, 0, 300, 90]]),
        "labels": torch.tensor([2, 1]),
        "scores": torch.tensor([0.9, 0.123456789]),
        "masks": torch.ones(2, 1, 28, 28),
    }
    boxes, masks = to_coco(found, 77, [5, 90], (100, 200), (50, 400))
    assert boxes[0] == {
        "image_id": 77, "category_id": 90, "bbox": [20.0, 10.0, 80.0, 20.0], "score": 0.9,
    }  # fmt: skip
    assert boxes[1]["bbox"] == [0, 0, 400, 45]
    assert boxes[1]["score"] == 0.12346
    mask = reference_mask.decode(masks[0]["segmentation"])
    expected = np.zeros((50, 400), dtype=np.uint8)
    expected[10:30, 20:100] = 1
    assert np.array_equal(mask, expected), "a mask of ones fills its box and nothing else"
    json.dumps([boxes, masks])
    assert "bbox" not in masks[0], "or areas of masks would be taken from boxes"


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_paste_agrees_with_torchvision(seed: int) -> None:
    """Torchvision rounds boxes to pixels first, so borders may differ by about one."""
    rng = np.random.default_rng(seed)
    left, top = rng.uniform(-20, 60, 2)
    width, height = rng.uniform(30, 80, 2)
    box = (float(left), float(top), float(left + width), float(top + height))
    mask = torch.from_numpy(ellipse(28, 28, [4, 4, 20, 20])).float()
    ours = paste(mask, box, (90, 100))
    theirs = paste_masks_in_image(mask[None, None], torch.tensor([box]), (90, 100))[0, 0] >= 0.5
    union = (ours.astype(bool) | theirs.numpy()).sum()
    both = (ours.astype(bool) & theirs.numpy()).sum()
    assert union - both <= 0.12 * union + 8


def test_paste_of_boxes_that_are_nowhere() -> None:
    ones = torch.ones(28, 28)
    for box in ((5.0, 5.0, 5.0, 9.0), (200.0, 5.0, 240.0, 9.0), (-9.0, -9.0, -1.0, -1.0)):
        assert paste(ones, box, (50, 60)).sum() == 0
    assert paste(ones, (10.2, 10.2, 10.9, 10.9), (50, 60)).sum() == 1
    assert paste(ones, (-1e4, -1e4, 1e4, 1e4), (50, 60)).all()
