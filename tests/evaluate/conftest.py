"""Tiny ViTs, three classes of tiny pictures that even random features tell apart, and short trainings."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from trainings import run

from cmt_mae.data.sample import write_coco
from tiny import tiny_vit, write_pictures


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_vit(tmp_path_factory.mktemp("vit") / "vit.safetensors", noise=0.15)


@pytest.fixture(scope="session")
def deep_vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four blocks, so that there are four taps for pyramids."""
    path = tmp_path_factory.mktemp("vit") / "deep.safetensors"
    return tiny_vit(path, embed_dim=24, depth=4, num_heads=2)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("pictures")
    write_pictures(root / "train", 9, seed=0)
    write_pictures(root / "val", 5, seed=1)
    return str(root)


def write_segmentation(root: Path) -> str:
    """Boxes of three colours on each other; sizes differ, some images are grey, some masks have a palette."""
    rng = np.random.default_rng(0)
    colours = rng.integers(40, 250, (3, 3))
    for split, count in (("training", 9), ("validation", 5)):
        for part in ("images", "annotations"):
            (root / part / split).mkdir(parents=True)
        for i in range(count):
            height, width = 30 + 4 * (i % 3), 44 - 7 * (i % 2)
            mask = np.ones((height, width), dtype=np.uint8)
            mask[i % 5 + 4 : i % 5 + 24, 5:25], mask[:, 30:] = 2, 3
            mask[:3], mask[-2:] = 0, 255
            noise = rng.normal(0, 9, (*mask.shape, 3))
            pixels = colours[np.clip(mask.astype(int), 1, 3) - 1] + noise
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.convert("L" if i == 3 else "RGB").save(root / "images" / split / f"{i:02}.png")
            labels = Image.fromarray(mask, "P" if i == 2 else None)
            if i == 2:
                labels.putpalette([9, 9, 9, 200, 0, 0])
            labels.save(root / "annotations" / split / f"{i:02}.png")
    (root / "objectInfo.txt").write_text("Name\nground\nbox\nwall\nnever there\n")
    return str(root)


@pytest.fixture(scope="session")
def trainings(
    vit: str, deep_vit: str, pictures: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """Settings of a training of 6 steps of each kind, a checkpoint at least every second step."""
    root = tmp_path_factory.mktemp("trainings")
    write_coco(root / "coco", 12, 5)
    return {
        "finetune": {
            "backbone": vit, "data": pictures, "batch_size": 8, "epochs": 2, "log_every": 1,
            "checkpoint_every": 0.34, "ema_decay": 0.9, "drop_path": 0.3, "few_shot": "90%",
        },
        "ade20k": {
            "backbone": deep_vit, "data": write_segmentation(root / "ade20k"), "zero_label": "ignored",
            "preset": "quick", "batch_size": 4, "iterations": 6, "crop_size": 32, "channels": 8,
            "log_every": 1, "eval_every": 1.0, "pictures": 2,
        },
        "coco": {
            "backbone": deep_vit, "data": str(root / "coco"), "batch_size": 4, "micro_batch": 2,
            "checkpoint_every": 0.34, "eval_every": 1.0,
        },
    }  # fmt: skip


@pytest.fixture(scope="session")
def undisturbed(
    trainings: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The run directory of such a training from start to end; it is only read."""
    done: dict[str, Path] = {}

    def whole(name: str) -> Path:
        if name not in done:
            done[name] = tmp_path_factory.mktemp("undisturbed") / name
            run(name, out=str(done[name]), **trainings[name])
        return done[name]

    return whole
