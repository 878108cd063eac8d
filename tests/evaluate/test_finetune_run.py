"""Whole fine-tunings: against plain torch and timm, stopped and killed, on two processes, on bad input."""

import io
import json
import math
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import timm
import torch
from finetune_program import run
from PIL import Image
from safetensors.torch import load_file
from timm.loss import SoftTargetCrossEntropy
from timm.optim import param_groups_layer_decay

from cmt_mae.backbones import load_backbone
from cmt_mae.core.checkpoint import list_checkpoints, load_checkpoint
from cmt_mae.core.errors import InputError, Stopped
from cmt_mae.core.runs import RunDir
from cmt_mae.data.pack import PackConfig, pack
from cmt_mae.data.sample import write_imagefolder
from cmt_mae.engine.processes import make_accelerator
from cmt_mae.evaluate.features import open_labelled
from cmt_mae.evaluate.finetune import FinetuneConfig, make_task
from cmt_mae.evaluate.finetune_protocols import resolve
from cmt_mae.evaluate.result import Result
from programs import start

PROGRAM = Path(__file__).with_name("finetune_program.py")
TIMED = ("images_per_second", "data_wait_share", "peak_memory_gb")


def program(processes: int = 1, **given: Any) -> "subprocess.CompletedProcess[str]":
    return start(PROGRAM, json.dumps(given), processes=processes)


def rows(folder: str) -> list[dict[str, Any]]:
    read = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMED} for row in read]


def saved(folder: str) -> Result:
    (file,) = (Path(folder) / "results").glob("*.json")
    return Result.load(file)


def assert_same_end(one: str, two: str) -> None:
    first, second = (
        load_checkpoint(list_checkpoints(Path(folder) / "checkpoints")[-1]) for folder in (one, two)
    )
    for part in ("model", "average"):
        assert first[part].keys() == second[part].keys()
        assert all(torch.equal(v, second[part][k]) for k, v in first[part].items())
    assert first["last"] == second["last"]
    assert rows(one) == rows(two)
    a, b = saved(one), saved(two)
    assert (a.metrics, a.details, a.protocol) == (b.metrics, b.details, b.protocol)


@pytest.fixture
def given(vit: str, pictures: str, tmp_path: Path) -> dict[str, Any]:
    """27 training pictures of 3 colours, batches of 8: 3 steps an epoch."""
    return {
        "backbone": vit, "data": pictures, "out": str(tmp_path / "run"), "batch_size": 8, "epochs": 2,
        "log_every": 1, "pictures": 0,
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
    task = make_task(
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


def test_killed_or_stopped_and_continued_it_ends_the_same(
    given: dict[str, Any], tmp_path: Path
) -> None:
    """kill -9 of a program, then a SIGTERM, then to the end; mixing, drop path, erasing and average are on."""
    given |= {
        "ema_decay": 0.9,
        "drop_path": 0.3,
        "checkpoint_every": 0.34,
        "few_shot": "90%",
        "epochs": 3,
    }
    whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
    run(**{**given, "out": whole, "workers": 1})
    killed = program(**{**given, "out": broken, "kill_at": [9, 3]})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with pytest.raises(Stopped, match="run the same command to continue"):
        run(**{**given, "out": broken, "kill_at": [signal.SIGTERM, 4]})
    steps = [row["step"] for row in rows(broken)]
    assert steps
    assert max(steps) < 9
    run(**{**given, "out": broken})
    assert_same_end(whole, broken)
    again = run(**{**given, "out": broken})  # nothing is left to do
    assert again.metrics == saved(broken).metrics
    with pytest.raises(InputError, match="seed: 0 -> 1"):
        run(**{**given, "out": broken, "seed": 1})


def test_two_processes_find_what_one_finds(given: dict[str, Any], tmp_path: Path) -> None:
    """15 validation pictures, so the processes' shares differ; without what is drawn per process."""
    given |= {"drop_path": 0.0, "mixup": 0.0, "cutmix": 0.0, "blr": 0.02}
    one = run(**given)
    two_out = str(tmp_path / "two")
    done = program(2, **{**given, "out": two_out})
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
        backbone="embedded",
        data=str(data),
        out=str(out),
        preset="quick",
        ema_decay=0.8,
        eval_every=5,
        size=32,
    )
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


def test_few_shot_is_told(given: dict[str, Any], tmp_path: Path) -> None:
    found = {}
    for text in ("4", "50%", None):
        out = str(tmp_path / f"run{text}")
        found[text] = run(
            **{
                **given,
                "few_shot": text,
                "out": out,
                "epochs": 1,
                "frozen_layers": "all",
                "batch_size": 2,
            }
        )
    assert found["4"].protocol["few_shot"]["images"] == found["4"].data["train"] == 12
    assert found["50%"].protocol["few_shot"] == {
        "part": "50%", "images": 12, "drawn": "by the seed",
    }  # fmt: skip
    drawn = {text: result.details["few_shot_images"] for text, result in found.items()}
    assert drawn["4"] == drawn["50%"]
    assert drawn["4"] is not None
    assert drawn[None] is None
    assert found["4"].data["classes"] == 3
    assert found[None].protocol["few_shot"] is None
    assert found["4"].identity() != found[None].identity()
    assert found["4"].identity() != found["50%"].identity()  # the protocols' texts differ


def test_seeds_of_a_few_shot_run_can_be_averaged(given: dict[str, Any], tmp_path: Path) -> None:
    """Other images, the same protocol and data: one mark in ``compare``, with mean and spread."""
    more = {"few_shot": "4", "epochs": 1, "frozen_layers": "all", "batch_size": 2}
    first, second = (
        run(**{**given, **more, "seed": seed, "out": str(tmp_path / f"seed{seed}")})
        for seed in (0, 1)
    )
    assert first.details["few_shot_images"] != second.details["few_shot_images"]
    assert first.protocol == second.protocol
    assert first.data == second.data


def test_grey_images_are_taken_by_a_colour_backbone(given: dict[str, Any], tmp_path: Path) -> None:
    write_grey(tmp_path / "grey")
    result = run(**{**given, "data": str(tmp_path / "grey"), "epochs": 1})
    assert result.data["train"] == 12


def write_grey(root: Path) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for name in ("dark", "light"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (40, 36), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"preset": "best"}, "preset is 'best': give one of"),
        ({"few_shot": "many"}, "neither a share"),
        ({"frozen_layers": 9}, "frozen_layers 9: the backbone has 3 blocks"),
        ({"pool": "max"}, "pool is 'max': give one of mean, cls"),
        ({"rand_augment": "strong"}, "is no RandAugment of timm"),
        ({"micro_batch": 1}, "and 1 is odd"),
        ({"batch_size": 9, "micro_batch": 4}, "cannot be split"),
        ({"epochs": 3, "warmup_epochs": 3.0}, "leaves none of 3 to train"),
        ({"size": 33}, "does not split into patches"),
        ({"backbone": "vit_nothing"}, "no such file"),
        ({"backbone": ""}, "no backbone"),
        ({"data": "/nowhere"}, "/nowhere"),
        ({"out": None}, "give --out"),
        ({"device": "tpu"}, "give one of auto, cpu"),
    ],
)
def test_wrong_settings_cost_one_line_and_leave_nothing(
    given: dict[str, Any], wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        run(**{**given, **wrong})
    assert "\n" not in str(caught.value)
    assert not Path(given["out"]).exists()


def test_data_that_cannot_be_fine_tuned_on(
    given: dict[str, Any], tmp_path: Path, make_pictures: Callable[..., None]
) -> None:
    for case in ("no_val", "other_classes", "no_labels"):
        make_pictures(tmp_path / case / ("train" if case != "no_labels" else "train/x"), 4, seed=0)
    make_pictures(tmp_path / "other_classes" / "val", 2, seed=0, teal=(0, 200, 200))
    for split in ("train", "val"):
        folder = tmp_path / "flat" / split
        folder.mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(folder / "a.png")
    make_pictures(tmp_path / "packs" / "train", 4, seed=0)
    make_pictures(tmp_path / "packs" / "val", 4, seed=1)
    pack(
        PackConfig(
            data=str(tmp_path / "packs"),
            out=str(tmp_path / "packed"),
            size=32,
            channels=1,
            workers=0,
        )
    )
    cases = {"no_val": "val", "other_classes": "teal", "flat": "has no label"}
    for case, message in cases.items():
        with pytest.raises(InputError, match=message):
            run(**{**given, "data": str(tmp_path / case)})
    assert not Path(given["out"]).exists()
    grey = run(**{**given, "data": str(tmp_path / "packed"), "epochs": 1})  # 1 channel becomes 3
    assert grey.data["train"] == 12


def test_labels_beyond_the_list_of_names(given: dict[str, Any], tmp_path: Path) -> None:
    """A parquet file whose label column names two classes and holds a third number."""
    for split in ("train", "val"):
        write_parquet(tmp_path / f"{split}.parquet", [0, 1, 2, 1])
    with pytest.raises(InputError, match=r"has label 2, but there are 2 classes \(0 to 1\)"):
        run(**{**given, "data": str(tmp_path)})


def write_parquet(path: Path, labels: list[int]) -> None:
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Image as ImageColumn

    file = io.BytesIO()
    Image.new("RGB", (40, 40)).save(file, format="PNG")
    pictures = [{"bytes": file.getvalue(), "path": None}] * len(labels)
    plain = Features(
        {"image": {"bytes": Value("binary"), "path": Value("string")}, "label": Value("int64")}
    )
    data = Dataset.from_dict({"image": pictures, "label": labels}, features=plain)
    named = Features({"image": ImageColumn(), "label": ClassLabel(names=["a", "b"])})
    table = data.data.table
    meta = {b"huggingface": json.dumps({"info": {"features": named.to_dict()}}).encode()}
    pyarrow.parquet.write_table(table.replace_schema_metadata(meta), path)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_broken_image_is_named(
    given: dict[str, Any], tmp_path: Path, make_pictures: Callable[..., None], split: str
) -> None:
    for name, seed in (("train", 0), ("val", 1)):
        make_pictures(tmp_path / "d" / name, 4, seed=seed)
    (tmp_path / "d" / split / "green" / "2.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(InputError, match=r"green/2\.png.*(fix|remove)") as caught:
        run(**{**given, "data": str(tmp_path / "d"), "epochs": 1, "batch_size": 12})
    assert "\n" not in str(caught.value)
