"""Whole fine-tunings: against plain torch and timm, on two processes, few shots, on other data."""

import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.loss import SoftTargetCrossEntropy
from timm.optim import param_groups_layer_decay
from trainings import program, saved
from trainings import run as run_task

from cmt_mae.backbones import load_backbone
from cmt_mae.core.errors import InputError
from cmt_mae.core.runs import RunDir
from cmt_mae.data.pack import PackConfig, pack
from cmt_mae.data.sample import write_imagefolder
from cmt_mae.engine.processes import make_accelerator
from cmt_mae.evaluate import finetune
from cmt_mae.evaluate.features import open_labelled
from cmt_mae.evaluate.finetune import FinetuneConfig, finetuning_task
from cmt_mae.evaluate.finetune_protocols import resolve
from cmt_mae.evaluate.result import Result
from tiny import write_pictures


def run(**given: Any) -> Result:
    return run_task("finetune", **given)


@pytest.fixture
def given(vit: str, pictures: str, tmp_path: Path) -> dict[str, Any]:
    """27 training pictures of 3 colours, batches of 8: 3 steps an epoch."""
    return {
        "backbone": vit, "data": pictures, "out": str(tmp_path / "run"), "batch_size": 8, "epochs": 2,
        "log_every": 1,
    }  # fmt: skip


def test_the_whole_training_equals_a_plain_loop_with_timms_parts(given: dict[str, Any]) -> None:
    """timm's network, groups, loss and AdamW on the same batches; MAE's schedule written out here."""
    given |= {"drop_path": 0.0, "micro_batch": 4, "blr": 0.02, "warmup_epochs": 0.5}
    result = run(**given)
    config = FinetuneConfig(**{**given, "out": given["out"] + "2", "workers": 0})
    train, val = open_labelled(config.data)
    recipe = resolve(config, 48, len(train))
    backbone = load_backbone(config.backbone)
    accelerator = make_accelerator("cpu", "fp32")
    task = finetuning_task(
        config, recipe, backbone, train, val, accelerator, RunDir(str(config.out), {}, (), False)
    )

    network: Any = timm.create_model(
        backbone.architecture, num_classes=3, global_pool="avg", **backbone.kwargs
    )
    start = {k.removeprefix("backbone."): v for k, v in task.model.state_dict().items()}
    network.load_state_dict(start)
    groups = param_groups_layer_decay(
        network, 0.05, no_weight_decay_list=network.no_weight_decay(), layer_decay=0.65
    )
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
    batches = task.batches(0)
    peak = 0.02 * 8 / 256
    for step in range(6):
        epoch = step / 3
        lr = peak * epoch / 0.5
        if epoch >= 0.5:
            lr = 1e-6 + (peak - 1e-6) * 0.5 * (1 + math.cos(math.pi * (epoch - 0.5) / 1.5))
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        for _ in range(2):  # two micro-batches of 4
            batch = task.to_device(next(batches))
            (SoftTargetCrossEntropy()(network(batch["images"]), batch["labels"]) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    batches.close()
    trained = load_file(Path(given["out"]) / "classifier.safetensors")
    moved = (trained["head.weight"] - start["head.weight"]).abs().max()
    assert moved > 1e-4
    for name, value in network.state_dict().items():
        torch.testing.assert_close(trained[name], value, atol=3e-6, rtol=1e-4)
    assert result.protocol["lr"] == peak
    assert result.protocol["layer_decay"] == 0.65


def test_two_processes_find_what_one_finds(given: dict[str, Any], tmp_path: Path) -> None:
    """15 validation pictures, so the processes' shares differ; without what is drawn per process."""
    given |= {"drop_path": 0.0, "mixup": 0.0, "cutmix": 0.0, "blr": 0.02}
    one = run(**given)
    two_out = str(tmp_path / "two")
    done = program("finetune", {**given, "out": two_out}, processes=2)
    assert done.returncode == 0, done.stderr
    two = saved(two_out)
    assert two.hardware["processes"] == 2
    assert two.metrics == pytest.approx(one.metrics)
    assert two.details["confusion"] == one.details["confusion"]
    assert sum(c["images"] for c in two.details["classes"]) == 15
    mine, theirs = (load_file(Path(o) / "classifier.safetensors") for o in (given["out"], two_out))
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], atol=2e-5, rtol=1e-3)


def test_quick_learns_the_generated_scenes(tmp_path: Path) -> None:
    data = tmp_path / "scenes"
    write_imagefolder(data, 240, 60, size=48)
    out = tmp_path / "run"
    result = run(
        backbone="embedded", data=str(data), out=str(out), preset="quick", ema_decay=0.8, eval_every=5,
        size=32, pictures=1,
    )  # fmt: skip
    assert result.metrics["top1"] > 25  # 10 classes
    assert result.metrics["best_top1"] >= result.metrics["top1"] == result.headline
    assert {"top5", "class_mean", "ema_top1", "ema_top5"} <= result.metrics.keys()
    evaluations = result.details["evaluations"]
    assert [e["epoch"] for e in evaluations] == [5, 10]
    assert max(e["top1"] for e in evaluations) == result.metrics["best_top1"]
    assert sum(result.details["confusion"]["count"]) == 60
    assert saved(str(out)).to_json() == result.to_json()
    image = Image.open(out / "pictures" / "confusion.png")
    assert image.width > 400
    again = load_backbone(str(out))
    assert again.img_size == (32, 32)
    assert "fine-tuned on scenes, preset quick" in again.source
    assert again.licence == load_backbone("embedded").licence


def test_few_shot_is_told_and_its_seeds_can_be_averaged(
    given: dict[str, Any], tmp_path: Path
) -> None:
    """Another seed draws other images under the same protocol: one mark in ``compare``, with mean and spread."""
    more = {"epochs": 1, "frozen_layers": "all", "batch_size": 2}
    found = {
        case: run(**{**given, **more, "few_shot": case[0], "seed": case[1], "out": f"{tmp_path}/{case}"})
        for case in (("4", 0), ("4", 1), ("50%", 0), (None, 0))
    }
    four, other, half, whole = found.values()
    assert four.protocol["few_shot"]["images"] == four.data["train"] == 12
    assert half.protocol["few_shot"] == {"part": "50%", "images": 12, "drawn": "by the seed"}
    assert whole.protocol["few_shot"] is whole.details["few_shot_images"] is None
    assert four.details["few_shot_images"] == half.details["few_shot_images"]
    assert four.details["few_shot_images"] != other.details["few_shot_images"]
    assert (four.protocol, four.data) == (other.protocol, other.data)
    assert len({str(one.identity()) for one in (four, half, whole)}) == 3  # the protocols' texts differ


def test_data_that_cannot_be_fine_tuned_on_and_grey_packs_that_can(
    given: dict[str, Any], tmp_path: Path
) -> None:
    write_pictures(tmp_path / "no_val" / "train", 4, seed=0)
    write_pictures(tmp_path / "other_classes" / "train", 4, seed=0)
    write_pictures(tmp_path / "other_classes" / "val", 2, seed=0, teal=(0, 200, 200))
    for split in ("train", "val"):
        (tmp_path / "flat" / split).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "flat" / split / "a.png")
    for case, message in {"no_val": "val", "other_classes": "teal", "flat": "has no label"}.items():
        with pytest.raises(InputError, match=message):
            run(**{**given, "data": str(tmp_path / case)})
    assert not Path(given["out"]).exists()
    packed = str(tmp_path / "packed")
    pack(PackConfig(data=given["data"], out=packed, size=32, channels=1, workers=0))
    grey = run(**{**given, "data": packed, "epochs": 1})  # 1 channel becomes 3
    assert grey.data["train"] == 27


def test_labels_beyond_the_list_of_names(given: dict[str, Any], monkeypatch) -> None:
    train, val = open_labelled(given["data"])
    train.classes = ["blue", "green"]
    monkeypatch.setattr(finetune, "open_labelled", lambda *_: (train, val))
    with pytest.raises(InputError, match=r"has label 2, but there are 2 classes \(0 to 1\)"):
        run(**given)
