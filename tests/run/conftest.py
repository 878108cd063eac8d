"""Tiny runs: 40 packed scenes of 40 px, a student of width 16, a teacher with random weights."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cmt_mae.data.pack import PackConfig, pack
from cmt_mae.data.sample import write_imagefolder
from cmt_mae.pretraining.settings import PretrainConfig
from random_teacher import write_teacher

Make = Callable[..., PretrainConfig]


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed, labelled data set with train (40) and val (20)."""
    folder = tmp_path_factory.mktemp("images")
    write_imagefolder(folder / "scenes", 40, 20, 40)
    pack(PackConfig(data=str(folder / "scenes"), out=str(folder / "packed"), size=40, workers=0))
    return folder / "packed"


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A frozen ViT with random weights: 48 px, patch 12, so its grid is the student's 4 x 4."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    return write_teacher(path, heads=2)


@pytest.fixture
def make(images: Path, teacher_file: Path, tmp_path: Path) -> Make:
    """Settings of a run of 10 steps (5 + 5) of 8 images; keywords with __ reach into sections."""

    def build(out: str = "run", **changes: object) -> PretrainConfig:
        config = PretrainConfig(out=str(tmp_path / out), epochs=2, batch_size=8, precision="fp32")
        config.data.path, config.data.workers = str(images), 0
        config.student.img_size, config.student.patch_size = [32], 8
        config.student.preset, config.student.width = "micro", 16
        config.student.depth, config.student.heads = 2, 2
        config.teacher.name = str(teacher_file)
        config.decoder.width, config.decoder.depth, config.decoder.heads = 16, 1, 2
        config.optim.blr, config.optim.warmup_epochs = 0.03, 0.5
        config.runtime.device, config.runtime.progress, config.runtime.log_every = "cpu", False, 1
        for name, value in changes.items():
            target: object = config
            *sections, last = name.split("__")
            for section in sections:
                target = getattr(target, section)
            assert hasattr(target, last), name
            setattr(target, last, value)
        return config

    return build


def as_words(config: PretrainConfig) -> list[str]:
    """The command line that gives these settings."""
    from cmt_mae.core.parsing import as_word, flatten
    from cmt_mae.core.runs import plain

    return [f"--{k}={as_word(v)}" for k, v in flatten(plain(config)).items() if v is not None]


def start(words: list[str], processes: int = 1) -> "subprocess.Popen[str]":
    """The command line in a process of its own (or under torchrun)."""
    launch = ["-m", "cmt_mae"]
    if processes > 1:
        launch = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={processes}",
            *launch,
        ]
    return subprocess.Popen(
        [sys.executable, *launch, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def rows(run: Path) -> list[dict[str, float]]:
    """metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def final_state(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor and number of the newest checkpoint, by a flat name; not whose it is (run, settings)."""
    path = sorted((run / "checkpoints").glob("step_*.pt"))[-1]
    flat: dict[str, torch.Tensor] = {}

    def walk(prefix: str, value: object) -> None:
        if isinstance(value, torch.Tensor):
            flat[prefix] = value
        elif isinstance(value, dict):
            for key, part in value.items():
                walk(f"{prefix}/{key}", part)
        elif isinstance(value, list | tuple):
            for key, part in enumerate(value):
                walk(f"{prefix}/{key}", part)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[prefix] = torch.tensor(value)

    state = torch.load(path, weights_only=True)
    walk("", {name: part for name, part in state.items() if name not in ("run", "settings")})
    return flat


def assert_same_state(first: Path, second: Path) -> None:
    """Bit for bit: student, momentum student, optimizer, position, meters."""
    one, two = final_state(first), final_state(second)
    assert one.keys() == two.keys()
    different = [name for name in one if not torch.equal(one[name], two[name])]
    assert not different, different
    assert len(one) > 50
