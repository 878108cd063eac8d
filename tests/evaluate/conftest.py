"""A tiny ViT and three classes of tiny pictures that even random features tell apart."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from cmt_mae.backbones import save_backbone

VIT = {"img_size": (32, 32), "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
COLOURS = {"blue": (40, 60, 200), "green": (50, 180, 60), "red": (210, 50, 40)}


def write_vit(path: Path, seed: int = 0) -> str:
    """A random ViT as a file of ours."""
    torch.manual_seed(seed)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT)
    with torch.no_grad():  # timm starts the class token at 1e-6 and biases at 0
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    save_backbone(
        path,
        model,
        architecture="vit_tiny_patch16_224",
        kwargs=VIT,
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.25, 0.3),
        img_size=32,
        licence="Apache-2.0",
        source="a test",
    )
    return str(path)


def write_pictures(root: Path, count: int, seed: int, **more: tuple[int, int, int]) -> None:
    """``count`` noisy pictures of each colour, and of ``more`` colours, 44 x 40 pixels."""
    rng = np.random.default_rng(seed)
    for name, colour in (COLOURS | more).items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.normal(colour, 25, (40, 44, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")


@pytest.fixture(scope="session")
def make_vit() -> Callable[..., str]:
    return write_vit


@pytest.fixture(scope="session")
def make_pictures() -> Callable[..., None]:
    return write_pictures


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_vit(tmp_path_factory.mktemp("vit") / "vit.safetensors")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("pictures")
    write_pictures(root / "train", 9, seed=0)
    write_pictures(root / "val", 5, seed=1)
    return str(root)
