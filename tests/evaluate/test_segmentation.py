"""Whole segmentations: protocols, learning, exact resume, two processes, bad input."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex
from trainings import last_checkpoint, program, rows, saved
from trainings import run as run_task

from cmt_mae.backbones import load_backbone
from cmt_mae.core.checkpoint import save_checkpoint
from cmt_mae.core.errors import InputError
from cmt_mae.core.runs import RunDir
from cmt_mae.data.ade20k import read_image, read_mask
from cmt_mae.data.sample import write_ade20k
from cmt_mae.data.segmentation_crops import resize_image
from cmt_mae.engine.processes import make_accelerator
from cmt_mae.evaluate.features import normalise
from cmt_mae.evaluate.result import Result
from cmt_mae.evaluate.segmentation import Ade20kConfig, at_window, open_ade20k, segmentation_task
from cmt_mae.evaluate.segmentation_protocols import SegmentationProtocol, published, resolve
from cmt_mae.evaluate.upernet import Segmenter
from tiny import tiny_vit


def run(**given: Any) -> Result:
    return run_task("ade20k", **given)


@pytest.fixture
def small(trainings: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """9 training images, batches of 4: two steps an epoch, 6 in all."""
    return trainings["ade20k"]


@pytest.fixture
def whole(undisturbed: Callable[[str], Path]) -> Path:
    return undisturbed("ade20k")


# --- protocols ----------------------------------------------------------------------------------


def test_the_three_published_recipes() -> None:
    """Specification 8, number by number."""
    paper = SegmentationProtocol(
        lr=3e-5, layer_decay=0.9, iterations=160_000, batch_size=16, warmup=1500, warmup_ratio=1e-6, power=1,
        weight_decay=0.05, drop_path=0.1, crop_size=512, stride=341, shorter_side=512, longer_side=2048,
        smallest_ratio=0.5, largest_ratio=2, cat_max_ratio=0.75, channels=768, dropout=0.1,
        auxiliary_weight=0.4, relative_bias=False, layer_scale=0,
    )  # fmt: skip
    assert published("paper") == published("paper_ft") == paper
    mae = published("mae")
    changed = {k for k in vars(paper) if getattr(paper, k) != getattr(mae, k)}
    assert changed == {"lr", "layer_decay", "relative_bias", "layer_scale"}
    assert (mae.lr, mae.layer_decay, mae.relative_bias, mae.layer_scale) == (1e-4, 0.65, True, 1.0)


def test_sides_follow_the_crop_and_the_warm_up_the_iterations() -> None:
    config = Ade20kConfig(preset="paper", crop_size=640, iterations=16_000)
    recipe = resolve(config, 20_000)
    assert (recipe.stride, recipe.shorter_side, recipe.longer_side) == (426, 640, 2560)
    assert recipe.warmup == 150
    config = Ade20kConfig(preset="paper", crop_size=640, stride=320, shorter_side=512, warmup=7)
    recipe = resolve(config, 20_000)
    assert (recipe.stride, recipe.shorter_side, recipe.longer_side) == (320, 512, 2048)
    assert recipe.warmup == 7
    assert resolve(Ade20kConfig(preset="paper", crop_size=512), 20_000) == published("paper")
    assert resolve(Ade20kConfig(preset="paper"), 5).batch_size == 5


def make(given: dict[str, Any], out: str) -> tuple[Any, Any]:
    """The task of these settings without training it, and its backbone at the window's size."""
    config = Ade20kConfig(**{"workers": 0, "device": "cpu", **given}, out=out)
    data = open_ade20k(config.data, config.classes)
    recipe = resolve(config, len(data.train))
    backbone, _ = at_window(config, load_backbone(config.backbone), recipe.crop_size)
    accelerator = make_accelerator("cpu", "fp32")
    nowhere = RunDir(out, {}, (), False)
    return segmentation_task(config, recipe, backbone, data, accelerator, nowhere), backbone


def test_learning_rates_of_the_paper(small: dict[str, Any], tmp_path: Path) -> None:
    given = {k: small[k] for k in ("backbone", "data", "crop_size", "batch_size", "channels")}
    task, _ = make(given, str(tmp_path / "r"))
    assert task.total_steps == 160_000
    assert task.steps_per_epoch == 2
    assert task.lr_at(0) == pytest.approx(3e-11)
    # mmcv: the poly rate times 1 - (1 - step / 1500) (1 - 1e-6)
    assert task.lr_at(750) == pytest.approx(3e-5 * (1 - 750 / 160_000) * 0.5, rel=1e-5)
    assert task.lr_at(1500) == pytest.approx(3e-5 * (1 - 1500 / 160_000))
    assert task.lr_at(80_000) == pytest.approx(1.5e-5)
    assert task.lr_at(160_000) == 0
    scales = {g["lr_scale"] for g in task.optimizer.param_groups}
    assert min(scales) == pytest.approx(0.9**5)
    assert max(scales) == 1.0


def test_the_fine_tuned_start_is_told_by_the_protocol(
    small: dict[str, Any], tmp_path: Path
) -> None:
    given = small | {"iterations": 1, "pictures": 0}
    results = {}
    for preset in ("paper", "paper_ft", "mae"):
        results[preset] = run(out=str(tmp_path / preset), **given | {"preset": preset})
    one, two, three = (results[p].protocol for p in ("paper", "paper_ft", "mae"))
    assert {k for k in one if one[k] != two[k]} == {"name", "weights"}
    assert "fine-tuned on ImageNet-1K" in two["weights"]
    assert results["paper"].identity() != results["paper_ft"].identity()
    assert three["relative_bias"] is True
    kept = last_checkpoint(tmp_path / "mae")["model"]
    assert kept["backbone.biases.3.table"].shape == (7 * 7 + 3, 2)  # 32 / 8 = 4 patches a side
    assert "cls_token and pos_embed do" in one["optimizer"]


# --- training and numbers -----------------------------------------------------------------------


def test_numbers_are_those_of_torchmetrics_on_a_plain_loop(
    whole: Path, small: dict[str, Any], tmp_path: Path
) -> None:
    """The trained weights, every image and window by hand, mmseg's order of resizing."""
    task, backbone = make(small, str(tmp_path / "r"))
    model: Segmenter = task.model
    model.load_state_dict(last_checkpoint(whole)["model"])
    model.eval()
    data = open_ade20k(small["data"])
    iou = MulticlassJaccardIndex(4, average="none", ignore_index=-1)
    accuracy = MulticlassAccuracy(4, average="none", ignore_index=-1)
    right = MulticlassAccuracy(4, average="micro", ignore_index=-1)
    for path, mask_path in zip(data.val.images, data.val.masks, strict=True):
        image, mask = read_image(path, 3), torch.from_numpy(read_mask(mask_path, 4))
        factor = min(128 / max(image.shape[:2]), 32 / min(image.shape[:2]))
        h, w = (int(side * factor + 0.5) for side in image.shape[:2])
        x = normalise(
            torch.from_numpy(resize_image(image, (h, w))).permute(2, 0, 1)[None], backbone
        )
        total, seen = torch.zeros(1, 4, h, w), torch.zeros(h, w)
        for left in {0, max(0, min(21, w - 32)), max(0, w - 32)}:  # 32 rows: one row of windows
            with torch.no_grad():
                total[..., left : left + 32] += model.logits(x[..., left : left + 32])
            seen[:, left : left + 32] += 1
        full = F.interpolate(total / seen, size=mask.shape, mode="bilinear", align_corners=False)
        prediction = full.softmax(1).argmax(1)
        for metric in (iou, accuracy, right):
            metric.update(prediction, mask[None].long())
    found = saved(whole)
    masks = np.concatenate([read_mask(m, 4).ravel() for m in data.val.masks])
    pixels = np.bincount(masks[masks >= 0], minlength=4)
    # windows one by one round otherwise than in a batch, so a pixel where two classes tie may fall either way
    ties = 2
    least = pixels[pixels > 0].min()
    assert found.metrics["aAcc"] == pytest.approx(
        100 * right.compute().item(), abs=100 * ties / pixels.sum()
    )
    assert found.metrics["mAcc"] == pytest.approx(
        100 * accuracy.compute()[:3].mean().item(), abs=100 * ties / least
    )
    classes = found.details["classes"]
    said = [k for k in range(4) if classes[k]["iou"] is not None]
    assert said[:3] == [0, 1, 2]
    assert found.metrics["mIoU"] == pytest.approx(
        100 * iou.compute()[said].mean().item(), abs=100 * ties / least
    )
    assert [c["pixels"] for c in classes] == pixels.tolist()


def test_what_a_result_says(whole: Path, small: dict[str, Any]) -> None:
    found = saved(whole)
    assert (found.task, found.protocol["name"], found.protocol["headline"]) == (
        "ade20k",
        "quick",
        "mIoU",
    )
    assert found.backbone["digest"] == load_backbone(small["backbone"]).digest
    assert (found.data["train"], found.data["val"], found.data["classes"]) == (9, 5, 4)
    assert found.protocol["window"] == [32, 32]
    low, high = found.interval("mIoU")  # over the five images
    assert 0 <= low < found.metrics["mIoU"] < high <= 100
    assert any("iterations 6 instead of" in line for line in found.protocol["differs"])
    assert [r["step"] for r in rows(whole) if "val_mIoU" in r] == [2, 4, 6]
    with Image.open(whole / "pictures" / "step_00000006.png") as picture:
        assert picture.width > 1000


def test_quick_learns_generated_scenes(tmp_path: Path) -> None:
    write_ade20k(tmp_path / "data", 16, 4)
    result = run(
        backbone="embedded", data=str(tmp_path / "data"), out=str(tmp_path / "run"), preset="quick",
        crop_size=64, iterations=40, channels=32, log_every=5, pictures=1,
    )  # fmt: skip
    losses = [r["loss_segmentation"] for r in rows(tmp_path / "run") if "lr" in r]
    assert np.mean(losses[4:]) < 0.9 * np.mean(losses[:2])
    classes = result.details["classes"]
    largest = max(c["pixels"] for c in classes) / sum(c["pixels"] for c in classes)
    always = 100 * largest / len([c for c in classes if c["pixels"]])  # one answer everywhere
    assert result.metrics["mIoU"] > 1.2 * always
    assert len(classes) == 13


def deep(path: Path, **changes: Any) -> str:
    return tiny_vit(path, **{"embed_dim": 24, "depth": 4, "num_heads": 2, **changes})


def test_unusual_backbones(small: dict[str, Any], tmp_path: Path) -> None:
    """Patches that do not divide the crop are padded; what has no pyramid is refused."""
    seven = deep(tmp_path / "seven.safetensors", patch_size=7, img_size=(28, 28))
    result = run(out=str(tmp_path / "7"), **small | {"backbone": seven, "iterations": 2})
    assert result.protocol["window"] == [35, 35]
    assert "crops and windows padded from 32 to 35: whole patches" in result.protocol["differs"]
    bare = deep(tmp_path / "bare.safetensors", class_token=False, global_pool="avg")
    given = small | {"backbone": bare, "preset": "mae", "iterations": 2}
    assert 0 <= run(out=str(tmp_path / "bare"), **given).metrics["mIoU"] <= 100
    for changes, wanted in (
        ({"depth": 3}, "3 blocks has no four maps"),
        ({"patch_size": (8, 4)}, "patches of 8x4; UPerNet's pyramid needs square ones"),
    ):
        wrong = deep(tmp_path / "wrong.safetensors", **changes)
        with pytest.raises(InputError, match=wanted):
            run(out=str(tmp_path / "r"), **small | {"backbone": wrong})



def test_two_processes(whole: Path, small: dict[str, Any], tmp_path: Path) -> None:
    """Weights that one process trained and measured are measured again: 5 images, so their shares differ.
    And two processes train."""
    shutil.copytree(whole, tmp_path / "again")
    for file in (tmp_path / "again" / "results").iterdir():
        file.unlink()
    content = last_checkpoint(whole) | {"evaluated_at": 4, "last": None}
    save_checkpoint(tmp_path / "again" / "checkpoints", 6, content)
    trained = small | {"preset": "mae", "iterations": 2, "out": str(tmp_path / "trained")}
    done = program("ade20k", small | {"out": str(tmp_path / "again")}, trained, processes=2)
    assert done.returncode == 0, done.stderr
    one, two = saved(whole), saved(tmp_path / "again")
    assert two.hardware["processes"] == 2
    assert two.metrics == one.metrics
    assert two.details == one.details
    found = saved(tmp_path / "trained")
    assert found.protocol["batch_norm_images"] == 2  # gloo: every process by itself
    assert 0 <= found.metrics["mIoU"] <= 100



def test_the_command_line(
    small: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from cmt_mae.core.cli import main

    words = [f"--{k}={v}" for k, v in (small | {"iterations": 2, "pictures": 0}).items()]
    more = [f"--out={tmp_path / 'r'}", "--device=cpu", "--workers=0", "--progress=false", "--json"]
    assert main(["evaluate", "ade20k", *words, *more]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["task"] == "ade20k"
    assert main(["evaluate", "ade20k", *words, "--crop_size=x", *more]) == 2
