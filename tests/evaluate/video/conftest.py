"""Small DAVIS folders and small backbones of several kinds."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmt_mae.data.davis import palette_bytes
from tiny import IMAGENET, tiny_vit

KINDS = {
    "plain": ("vit_tiny_patch16_224", {}),
    "no_class_token": (
        "vit_tiny_patch16_224",
        {"class_token": False, "global_pool": "avg", "fc_norm": False},
    ),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 3}),
    "beit": ("beit_base_patch16_224", {}),
    "dinov3": ("vit_small_patch16_dinov3", {}),
    "patch14": ("vit_tiny_patch16_224", {"patch_size": 14, "img_size": (28, 28)}),
}


def write_kind(path: Path, kind: str = "plain", seed: int = 0) -> str:
    """A ViT of width 48 with random weights, patch 8 (or 14), as a file of ours."""
    architecture, more = KINDS[kind]
    imagenet = {"mean": IMAGENET[0], "std": IMAGENET[1]}
    return tiny_vit(path, architecture, seed=seed, noise=0.1, depth=2, **imagenet, **more)


def save_indexed(path: Path, mask: np.ndarray) -> None:
    image = Image.fromarray(mask.astype(np.uint8))
    image.putpalette(palette_bytes())
    image.save(path)


def write_square_video(
    root: Path, name: str, frames: int = 5, size: tuple[int, int] = (64, 96)
) -> None:
    """Two coloured squares that move a little over noise, with their masks, added to val.txt."""
    rng = np.random.default_rng(sum(map(ord, name)))
    ground = rng.integers(0, 90, (*size, 3), dtype=np.uint8)
    pictures, truth = root / "JPEGImages/480p" / name, root / "Annotations/480p" / name
    pictures.mkdir(parents=True)
    truth.mkdir(parents=True)
    for number in range(frames):
        image, mask = ground.copy(), np.zeros(size, np.uint8)
        for i, (top, left, colour) in enumerate(((8, 8, (220, 40, 30)), (32, 60, (30, 60, 230)))):
            place = np.s_[top : top + 24, left + 2 * number : left + 2 * number + 24]
            image[place], mask[place] = colour, i + 1
        Image.fromarray(image).save(pictures / f"{number:05d}.jpg", quality=95)
        save_indexed(truth / f"{number:05d}.png", mask)
    listing = root / "ImageSets/2017/val.txt"
    listing.parent.mkdir(parents=True, exist_ok=True)
    before = listing.read_text() if listing.exists() else ""
    listing.write_text(before + name + "\n")


@pytest.fixture(scope="session")
def make_kind() -> Callable[..., str]:
    return write_kind


@pytest.fixture
def davis(tmp_path: Path) -> Path:
    """Two videos of 64 x 96 pixels: ``one`` with 5 frames and ``two`` with 4, two objects each."""
    root = tmp_path / "davis"
    write_square_video(root, "one")
    write_square_video(root, "two", frames=4)
    return root


@pytest.fixture(scope="session")
def plain_vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_kind(tmp_path_factory.mktemp("plain") / "plain.safetensors")
