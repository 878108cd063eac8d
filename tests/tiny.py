"""Tiny runs: 40 packed scenes of 40 px, a student of width 16, a teacher with random weights."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import timm
import torch

from cmt_mae.backbones import save_backbone
from cmt_mae.core.parsing import as_word, flatten
from cmt_mae.core.runs import plain
from cmt_mae.pretraining.settings import PretrainConfig

Make = Callable[..., PretrainConfig]


def write_teacher(path: Path, heads: int = 3, spread: float = 0.3) -> Path:
    """A frozen ViT with random weights: 48 px, patch 12, so its grid is that of a 4 x 4 student.

    spread: of what is added to every weight; without it the attention is flat.
    """
    torch.manual_seed(5)
    kwargs = {"img_size": 48, "patch_size": 12, "embed_dim": 24, "depth": 2, "num_heads": heads}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **kwargs)
    with torch.no_grad():
        for parameter in model.parameters() if spread else ():
            parameter.add_(spread * torch.randn(parameter.shape))
    save_backbone(
        path, model, architecture="vit_tiny_patch16_224", kwargs=kwargs, mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225), img_size=48, licence="none", source="random weights of a test",
    )  # fmt: skip
    return path


def tiny_run(out: Path, images: Path, teacher: object, **changes: object) -> PretrainConfig:
    """Settings of a run of 10 steps (5 + 5) of 8 images; keywords with __ reach into sections."""
    config = PretrainConfig(out=str(out), epochs=2, batch_size=8, precision="fp32")
    config.data.path, config.data.workers = str(images), 0
    config.student.img_size, config.student.patch_size = [32], 8
    config.student.preset, config.student.width = "micro", 16
    config.student.depth, config.student.heads = 2, 2
    config.teacher.name = str(teacher)
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


def as_words(config: PretrainConfig) -> list[str]:
    """The command line that gives these settings."""
    return [f"--{k}={as_word(v)}" for k, v in flatten(plain(config)).items() if v is not None]


def start(words: list[str], processes: int = 1) -> "subprocess.Popen[str]":
    """The command line in a process of its own (or under torchrun)."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    launch = [*(torchrun if processes > 1 else ()), "-m", "cmt_mae"]
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
