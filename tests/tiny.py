"""Tiny networks, pictures and runs: students of width 16 and random weights, 44 x 40 pixels, 10 steps."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image

import cmt_mae
from cmt_mae.backbones.save import save_backbone
from cmt_mae.core.parsing import as_word, flatten
from cmt_mae.core.runs import plain
from cmt_mae.pretraining.settings import PretrainConfig
from programs import Running

Make = Callable[..., PretrainConfig]
EVERY: dict[str, Any] = {
    "target__centre": True, "mask__other_image": True, "momentum__zero_head": True, "momentum__half_lives": 3.0,
    "mask__student_map": "column_mean", "mask__student_block": -2, "teacher__attention_block": -2,
    "target__tokens": "masked+cls",
}  # fmt: skip
"""Settings of the method that are off by default, by their names in tiny_run."""
COLOURS = {"blue": (40, 60, 200), "green": (50, 180, 60), "red": (210, 50, 40)}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def tiny_vit(
    path: Path,
    architecture: str = "vit_tiny_patch16_224",
    *,
    seed: int = 0,
    noise: float = 0.0,
    mean: tuple[float, ...] = (0.5, 0.4, 0.3),
    std: tuple[float, ...] = (0.2, 0.25, 0.3),
    licence: str | None = "Apache-2.0",
    **kwargs: Any,
) -> str:
    """A ViT of timm with random weights as a file of ours: 32 px, patch 8, width 48, 3 blocks and heads.

    noise: spread of what is added to every weight; timm starts biases at 0 and the class token at 1e-6.
    """
    torch.manual_seed(seed)
    sizes = {"img_size": (32, 32), "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
    kwargs = sizes | kwargs
    model = timm.create_model(architecture, num_classes=0, **kwargs)
    with torch.no_grad():
        for parameter in model.parameters() if noise else ():
            parameter.add_(noise * torch.randn_like(parameter))
    save_backbone(
        path, model, architecture=architecture, kwargs=kwargs, mean=mean, std=std,
        img_size=kwargs["img_size"], licence=licence, source="a test",
    )  # fmt: skip
    return str(path)


def write_teacher(path: Path, heads: int = 3, noise: float = 0.3) -> Path:
    """A frozen ViT of 48 px and patch 12: a grid of 4 x 4; without noise its map is flat."""
    kwargs = {"img_size": 48, "patch_size": 12, "embed_dim": 24, "depth": 2, "num_heads": heads}
    tiny_vit(path, seed=5, noise=noise, mean=IMAGENET[0], std=IMAGENET[1], licence="none", **kwargs)
    return path


def write_pictures(root: Path, count: int, seed: int, **more: tuple[int, int, int]) -> None:
    """``count`` noisy pictures of each colour, and of ``more`` colours, 44 x 40 pixels."""
    rng = np.random.default_rng(seed)
    for name, colour in (COLOURS | more).items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.normal(colour, 25, (40, 44, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")


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


def start(words: list[str], processes: int = 1) -> Running:
    """The command line in processes of its own."""
    return Running(Path(str(cmt_mae.__file__)).with_name("__main__.py"), words, processes)


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
