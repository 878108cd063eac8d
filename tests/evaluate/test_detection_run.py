"""Whole detection runs: stopped and killed, on two processes, learning, and on bad input."""

import contextlib
import io
import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from trainings import SMALL_COCO, last_checkpoint, program, rows, saved
from trainings import run as run_task

from cmt_mae.core.errors import InputError, Stopped
from cmt_mae.data.coco import open_coco
from cmt_mae.data.sample import write_coco
from cmt_mae.engine.processes import make_accelerator
from cmt_mae.evaluate.detection import CocoConfig, evaluate_coco
from cmt_mae.evaluate.detection.detector import build_detector
from cmt_mae.evaluate.detection.task import Evaluator, detection_task, open_backbone, to_device
from cmt_mae.evaluate.result import Result
from tiny import tiny_vit


def run(**given: Any) -> Result:
    return run_task("coco", **given)


@pytest.fixture
def given(trainings: dict[str, dict[str, Any]], tmp_path: Path) -> dict[str, Any]:
    """12 training pictures in batches of 4: 3 steps an epoch, 6 in all."""
    kept = {k: trainings["coco"][k] for k in ("backbone", "data")}
    return kept | {"out": str(tmp_path / "run")}


def equal(one: float, two: float) -> bool:
    return one == two or (math.isnan(one) and math.isnan(two))


def test_two_processes_train_and_evaluate_every_image_once(given: dict[str, Any]) -> None:
    """With BatchNorm and GIoU. Their numbers are those of one process on the same weights."""
    given |= {"norm": "bn", "box_head": "4conv1fc", "box_loss": "giou", "epochs": 1}
    done = program("coco", given, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    two = saved(given["out"])
    assert two.hardware["processes"] == 2
    assert two.details["images"] == 5
    assert two.details["detections"] > 0
    config = CocoConfig(**{**SMALL_COCO, "device": "cpu", "workers": 0, "progress": False, **given})
    backbone, protocol, _ = open_backbone(config)
    detector = build_detector(backbone, 10, protocol)
    detector.load_state_dict(last_checkpoint(given["out"])["model"])
    alone = Path(given["out"]) / "alone"
    accelerator = make_accelerator("cpu", "fp32")
    val = open_coco(given["data"], "val")
    evaluator = Evaluator(detector.eval(), val, protocol, backbone, accelerator, alone, config)
    with torch.no_grad():
        one = evaluator(3)
    assert all(equal(one.metrics[k], v) for k, v in two.metrics.items())
    for name in ("bbox", "segm"):
        file = f"predictions/{name}.json"
        assert (alone / file).read_bytes() == (Path(given["out"]) / file).read_bytes()


def test_stored_detections_give_pycocotools_the_same_numbers(given: dict[str, Any]) -> None:
    result = run(**given, eval_split="train", save_memory=True)
    truth = Path(given["data"]) / "annotations" / "instances_train2017.json"
    known = {c["id"] for c in json.loads(truth.read_text())["categories"]}
    for kind, name in (("box", "bbox"), ("mask", "segm")):
        file = Path(given["out"]) / "predictions" / f"{name}.json"
        found = json.loads(file.read_text())
        assert found
        assert {d["category_id"] for d in found} <= known
        with contextlib.redirect_stdout(io.StringIO()):
            annotated = COCO(str(truth))
            evaluation = COCOeval(annotated, annotated.loadRes(str(file)), name)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        for key, value in zip(
            ("AP", "AP50", "AP75", "APs", "APm", "APl"), evaluation.stats, strict=False
        ):
            expected = math.nan if value == -1 else 100 * value
            assert result.metrics[f"{kind}/{key}"] == pytest.approx(expected, abs=1e-6, nan_ok=True)
    assert result.protocol["name"] == "quick-changed-on-train"
    assert result.protocol["score_threshold"] == 0.01
    assert result.headline == result.metrics["box/AP"]
    assert result.data["val"] == 12
    assert {"faster-coco-eval", "torchvision"} <= result.versions.keys()
    assert saved(given["out"]).identity() == result.identity()
    assert len(result.details["classes"]) == 10
    objects = [a for a in json.loads(truth.read_text())["annotations"] if not a["iscrowd"]]
    assert result.over("mask/AP50") == f"12 images, {len(objects)} objects"


def test_quick_learns_generated_scenes(tmp_path: Path) -> None:
    """The preset on the package's own backbone, end to end, with pictures."""
    write_coco(tmp_path / "coco", 8, 4)
    result = evaluate_coco(
        CocoConfig(
            backbone="embedded", data=str(tmp_path / "coco"), out=str(tmp_path / "run"), preset="quick",
            eval_split="train", epochs=14, drops=(12.0,), short_sides=(64,), longest=80,
            test_short=64, test_longest=80, lr=5e-4, workers=0, progress=False, device="cpu", pictures=4,
            log_every=4,
        )
    )  # fmt: skip
    losses = [row["loss"] for row in rows(str(tmp_path / "run")) if "loss" in row]
    assert losses[-1] < 0.5 * losses[0]
    assert result.metrics["box/AP50"] > 5
    assert result.metrics["mask/AP50"] > 2
    (picture,) = (tmp_path / "run" / "pictures").glob("detections_step_*.png")
    with Image.open(picture) as image:
        assert min(image.size) > 300
        assert np.asarray(image.convert("L")).std() > 10


def test_schedule_and_normalisation(given: dict[str, Any]) -> None:
    config = CocoConfig(
        **{**SMALL_COCO, "device": "cpu", "workers": 0, **given, "preset": "1x", "epochs": None},
        warmup_steps=10, batch_size=4,
    )
    backbone, protocol, _ = open_backbone(config)
    train = open_coco(config.data, "train")
    detector = build_detector(backbone, 10, protocol)
    chosen = np.arange(12)
    task = detection_task(
        config, protocol, detector, backbone, train, chosen, make_accelerator("cpu", "fp32"), lambda _: None,
    )  # fmt: skip
    assert (task.steps_per_epoch, task.total_steps) == (3, 36)
    expected = {0: 2e-7, 5: 2e-4 * 0.5005, 10: 2e-4, 23: 2e-4, 24: 2e-5, 32: 2e-5, 33: 2e-6}
    for step, rate in expected.items():
        assert task.lr_at(step) == pytest.approx(rate)
    batches = task.batches(0)
    examples = next(batches)
    batches.close()
    batch = to_device(examples, backbone, torch.device("cpu"))
    for image, example in zip(batch.images, examples, strict=True):
        for channel, (mean, std) in enumerate(zip(backbone.mean, backbone.std, strict=True)):
            theirs = (example.image[channel] / 255 - mean) / std
            torch.testing.assert_close(image[channel], theirs)


# --- bad input -------------------------------------------------------------------------------------


def refused(given: dict[str, Any], text: str, **more: Any) -> None:
    out = Path(given["out"])
    before = sorted(out.rglob("*")) if out.exists() else None
    with pytest.raises(InputError, match=text) as caught:
        run(**{**given, **more})
    assert "\n" not in str(caught.value)
    assert (sorted(out.rglob("*")) if out.exists() else None) == before, "nothing is left or lost"


def without(root: Path, split: str, how: Callable[[dict[str, Any]], Any]) -> None:
    """Change every annotation of a split."""
    file = root / "annotations" / f"instances_{split}2017.json"
    content = json.loads(file.read_text())
    for annotation in content["annotations"]:
        how(annotation)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("split", ["train", "val"])
def test_data_without_any_box(given: dict[str, Any], tmp_path: Path, split: str) -> None:
    write_coco(tmp_path / "coco", 4, 2)
    without(tmp_path / "coco", split, lambda a: a.update(iscrowd=1))
    refused(given, "no annotation of a single object", data=str(tmp_path / "coco"))


@pytest.mark.parametrize("augment", ["multiscale", "lsj"])
def test_boxes_alone_without_masks(given: dict[str, Any], tmp_path: Path, augment: str) -> None:
    write_coco(tmp_path / "coco", 4, 3)
    without(tmp_path / "coco", "train", lambda a: a.pop("segmentation"))
    data = given | {"data": str(tmp_path / "coco"), "out": str(tmp_path / "run"), "pictures": 1}
    refused(data, "only one of train and val has masks")
    without(tmp_path / "coco", "val", lambda a: a.pop("segmentation"))
    sizes = {"augment": augment, "lsj_size": 64, "test_short": 64, "test_longest": 64}
    result = run(**data, **sizes, epochs=1, batch_size=2)
    assert set(result.metrics) == {f"box/{name}" for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")}
    assert "no mask head" in result.protocol["masks"]
    assert [path.name for path in (tmp_path / "run" / "predictions").iterdir()] == ["bbox.json"]
    assert list((tmp_path / "run" / "pictures").iterdir())
    assert all("loss_mask" not in row for row in rows(str(tmp_path / "run")))


def test_images_without_boxes_are_left_out_or_trained_on(given: dict[str, Any]) -> None:
    """Of twelve scenes the fourth is empty: published protocols leave it out, quick takes it."""
    result = run(**given, epochs=1, empty_images=False, batch_size=11)
    assert (result.data["train"], result.data["train_without_boxes"]) == (11, 1)
    assert result.details["images"] == 5


def test_beit_needs_a_fixed_size(given: dict[str, Any], tmp_path: Path) -> None:
    sizes = {"embed_dim": 24, "depth": 4, "num_heads": 2}
    beit = tiny_vit(tmp_path / "beit.safetensors", "beit_base_patch16_224", **sizes)
    given |= {"backbone": beit, "epochs": 1}
    refused(given, "a BEiT, whose relative positions need one input size: add --augment lsj")
    result = run(**given, augment="lsj", lsj_size=64)
    assert math.isfinite(result.metrics["box/AP"])


def test_a_run_is_continued_only_with_its_own_data(given: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run(**given, kill_at=(int(signal.SIGTERM), 1))
    write_coco(tmp_path / "other", 13, 5)
    with pytest.raises(InputError, match="was started with another data"):
        run(**{**given, "data": str(tmp_path / "other")})


def test_a_folder_without_annotations(given: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(given, "no annotation file", data=str(tmp_path / "empty"))
