"""A network rebuilt with another activation, epsilon or normalisation is refused loudly."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cmt_mae.backbones import load_backbone
from cmt_mae.backbones.save import save_backbone
from cmt_mae.core.errors import InputError

KWARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}


def write(path: Path, architecture: str, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=0, **KWARGS)
    for parameter in model.parameters():  # weights of a size at which activations matter
        torch.nn.init.normal_(parameter, std=0.3)
    save_backbone(
        path, model, architecture=architecture, kwargs=KWARGS, mean=(0.5,) * 3, std=(0.25,) * 3,
        img_size=32, licence=None, source="test", dtype=dtype,
    )  # fmt: skip
    return path


def with_header(path: Path, change: dict[str, Any]) -> Path:
    """The same weights and checksum under a header that describes another network."""
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["cmt_mae"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    assert any(header[key] != value for key, value in change.items())
    save_file(tensors, path, {"format": "pt", "cmt_mae": json.dumps({**header, **change})})
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_same_network_passes(tmp_path: Path, dtype: torch.dtype) -> None:
    assert load_backbone(
        str(write(tmp_path / "a.safetensors", "vit_tiny_patch16_224", dtype))
    ).has_cls


@pytest.mark.parametrize(
    "change",
    [
        {"mean": [0.485, 0.456, 0.406]},
        {"std": [0.5, 0.5, 0.5]},
    ],
)
def test_another_network_around_the_same_weights_is_refused(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    path = with_header(write(tmp_path / "a.safetensors", "vit_tiny_patch16_224"), change)
    with pytest.raises(InputError, match="self-check failed"):
        load_backbone(str(path))


def test_saving_leaves_the_mode_of_the_model_alone(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **KWARGS).train()
    save_backbone(
        tmp_path / "b.safetensors", model, architecture="vit_tiny_patch16_224", kwargs=KWARGS,
        mean=(0.5,) * 3, std=(0.25,) * 3, img_size=32, licence=None, source="test",
    )  # fmt: skip
    assert model.training
    assert model.blocks[0].training


def test_the_embedded_teacher_is_small_and_checked() -> None:
    backbone = load_backbone("embedded")
    path = (
        Path(load_backbone.__code__.co_filename).parent.parent / "teachers" / "embedded.safetensors"
    )
    assert path.stat().st_size <= 3 * 2**20
    with safe_open(path, "pt") as file:
        assert len(json.loads(file.metadata()["cmt_mae"])["self_check"]) == 16
    assert backbone.img_size == (64, 64)
