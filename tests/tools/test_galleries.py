"""Galleries: what lies in the files is what is drawn."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from faster_coco_eval.core import mask as coco_mask
from PIL import Image

from cmt_mae.core.errors import InputError
from cmt_mae.data.ade20k import open_ade20k
from cmt_mae.data.coco import open_coco
from cmt_mae.data.coco_masks import mask_of
from cmt_mae.data.davis import open_davis
from cmt_mae.data.sample import write_ade20k, write_coco, write_davis
from cmt_mae.tools.inspect.galleries import (
    detections_sheet,
    labels_of,
    outputs,
    segmentations_sheet,
    strips_figure,
)


def test_strips_hold_a_row_a_method(tmp_path: Path) -> None:
    """Masks that are the truth are painted as the truth is; a method without the video is refused."""
    write_davis(tmp_path / "davis", 1, 4)
    (sequence,) = open_davis(str(tmp_path / "davis"))
    for name in ("one", "two"):
        shelf = tmp_path / name / "davis" / "dino-0123456789"
        shutil.copytree(sequence.masks[0].parent, shelf / "masks" / sequence.name)
        scores = {
            "name": sequence.name, "fingerprint": sequence.fingerprint, "frames": 4, "size": [40, 71],
            "input": [40, 64], "grid": [5, 8], "objects": [1], "vanished": [], "j": [[0.5, 0.7]],
            "f": [[0.7, 0.9]], "seconds": {},
        }  # fmt: skip
        (shelf / "scores").mkdir()
        (shelf / "scores" / f"{sequence.name}.json").write_text(json.dumps(scores))
    methods = outputs([str(tmp_path / "one"), str(tmp_path / "two")], "davis")
    figure = strips_figure(sequence, methods, 3)
    rows = [axis.get_ylabel() for axis in figure.axes[::3]]
    assert rows == ["frames", "ground truth", "one\nJ&F 70.0", "two\nJ&F 70.0"]
    painted = [np.asarray(axis.images[0].get_array()) for axis in figure.axes]
    assert (painted[3] == painted[6]).all()
    assert (painted[0] != painted[3]).any()
    (tmp_path / "two" / "davis" / "dino-0123456789" / "scores" / f"{sequence.name}.json").unlink()
    with pytest.raises(InputError, match="holds no whole masks"):
        strips_figure(sequence, methods, 3)
    with pytest.raises(InputError, match="holds no predictions of davis"):
        outputs([str(tmp_path)], "davis")


def test_detections_that_are_the_truth(tmp_path: Path) -> None:
    write_coco(tmp_path / "coco", 2, 3)
    split = open_coco(tmp_path / "coco", "val")
    folder = tmp_path / "run" / "evaluations" / "coco-quick" / "predictions"
    folder.mkdir(parents=True)
    answers = split.ground_truth()["annotations"]
    boxes = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": s}
        for a, s in zip(answers, [0.9] + [0.1] * (len(answers) - 1), strict=True)
    ]
    sizes = {int(i): size for i, size in zip(split.ids, split.sizes, strict=True)}
    masks = []
    for answer in answers:
        pixels = mask_of(answer["segmentation"], *sizes[answer["image_id"]])
        masks.append({"segmentation": _plain(coco_mask.encode(np.asfortranarray(pixels)))})
    (folder / "bbox.json").write_text(json.dumps(boxes))
    (folder / "segm.json").write_text(json.dumps(masks))
    methods = outputs([str(tmp_path / "run")], "coco")
    sheet = detections_sheet(split, methods, 3)
    found = [sheet.axes[row, 1].get_xlabel() for row in range(len(sheet.axes))]
    assert sorted(found) == ["0 found", "0 found", "1 found"]  # the others have a score of 0.1
    (folder / "segm.json").write_text("[{]")
    with pytest.raises(InputError, match="no detections that can be read"):
        detections_sheet(split, methods, 3)


def _plain(run_lengths: dict[str, object]) -> dict[str, object]:
    counts = run_lengths["counts"]
    return {**run_lengths, "counts": counts.decode() if isinstance(counts, bytes) else counts}


def test_segmentations_beside_the_truth(tmp_path: Path) -> None:
    """A right method has 100 %, one that says class 1 everywhere the share of that class."""
    write_ade20k(tmp_path / "data", 1, 2)
    data = open_ade20k(tmp_path / "data")
    truths = [labels_of(mask, data) for mask in data.val.masks]
    for name in ("right", "dull"):
        for image, truth in zip(data.val.images, truths, strict=True):
            place = Path(image).relative_to(tmp_path / "data" / "images" / "validation")
            path = tmp_path / name / "predictions" / place.with_suffix(".png")
            path.parent.mkdir(parents=True, exist_ok=True)
            labels = np.maximum(truth, 0) if name == "right" else np.zeros_like(truth)
            Image.fromarray((labels + 1).astype(np.uint8)).save(path)
    methods = outputs([str(tmp_path / "right"), str(tmp_path / "dull")], "ade20k")
    sheet = segmentations_sheet(data, methods, 2)
    for row, truth in enumerate(truths):
        assert sheet.axes[row, 2].get_xlabel() == "100 % right"
        share = 100 * (truth == 0)[truth >= 0].mean()
        assert sheet.axes[row, 3].get_xlabel() == f"{share:.0f} % right"
    assert [axis.get_title() for axis in sheet.axes[0]] == [
        "image",
        "ground truth",
        "right",
        "dull",
    ]
