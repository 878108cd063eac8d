"""Folders of transformers (version 5) with random weights: equal features to the library's own model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_nets import DEPTH, PATCH, SIZE, WIDTH, image, load, randomise, saved, tokens
from torch import Tensor, nn

from cmt_mae.backbones.backbone import CLIP_MEAN, HALF, IMAGENET_MEAN
from cmt_mae.core.backbone_facts import BackboneFacts
from cmt_mae.core.errors import InputError

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 2, "image_size": SIZE,
    "patch_size": PATCH,
}  # fmt: skip
MLP = {"intermediate_size": 2 * WIDTH}
EPS = {"layer_norm_eps": 1e-6}
MAE = MLP | EPS | {
    "mask_ratio": 0.0, "decoder_hidden_size": 32, "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 1,
}  # fmt: skip
SHARED = {"use_relative_position_bias": False, "use_shared_relative_position_bias": True}
OWN = BackboneFacts(mean=[0.1] * 3, std=[0.2] * 3)
NONE = BackboneFacts()

# model, its configuration, its arguments, what is given besides the folder, mean
ROWS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], BackboneFacts, tuple[float, ...]]] = {
    "vit": ("ViTModel", "ViTConfig", MLP | EPS, {"add_pooling_layer": False}, OWN, (0.1,) * 3),
    "vit relu": (
        "ViTModel", "ViTConfig", MLP | EPS | {"hidden_act": "relu"}, {"add_pooling_layer": False}, OWN, (0.1,) * 3,
    ),
    "deit": ("DeiTModel", "DeiTConfig", MLP, {"add_pooling_layer": False}, OWN, (0.1,) * 3),
    "msn": ("ViTMSNModel", "ViTMSNConfig", MLP | EPS, {}, OWN, (0.1,) * 3),
    "ijepa": ("IJepaModel", "IJepaConfig", MLP | EPS, {}, OWN, (0.1,) * 3),
    "mae": ("ViTMAEModel", "ViTMAEConfig", MAE, {}, NONE, IMAGENET_MEAN),
    "mae with decoder": ("ViTMAEForPreTraining", "ViTMAEConfig", MAE, {}, NONE, IMAGENET_MEAN),
    "dinov2": ("Dinov2Model", "Dinov2Config", {}, {}, NONE, IMAGENET_MEAN),
    "dinov2 swiglu": ("Dinov2Model", "Dinov2Config", {"use_swiglu_ffn": True}, {}, NONE, IMAGENET_MEAN),
    "dinov2 registers": (
        "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", {}, {}, NONE, IMAGENET_MEAN,
    ),
    "dinov3": (
        "DINOv3ViTModel", "DINOv3ViTConfig", MLP | {"num_register_tokens": 4}, {}, OWN, (0.1,) * 3,
    ),
    "dinov3 gated": (
        "DINOv3ViTModel", "DINOv3ViTConfig",
        MLP | {"num_register_tokens": 4, "use_gated_mlp": True, "hidden_act": "silu"}, {}, OWN, (0.1,) * 3,
    ),
    "beit": (
        "BeitModel", "BeitConfig", MLP | EPS | {"use_relative_position_bias": True, "use_mean_pooling": False},
        {"add_pooling_layer": False}, OWN, (0.1,) * 3,
    ),
    "beit shared table": (
        "BeitModel", "BeitConfig", MLP | EPS | SHARED | {"use_mean_pooling": False},
        {"add_pooling_layer": False}, OWN, (0.1,) * 3,
    ),
    "beit pooled": (
        "BeitModel", "BeitConfig", MLP | EPS | {"use_relative_position_bias": True}, {}, OWN, (0.1,) * 3,
    ),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", MLP, {}, NONE, HALF),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", MLP, {}, NONE, CLIP_MEAN),
}  # fmt: skip


@torch.no_grad()
def native(model: nn.Module, row: str, size: int = SIZE) -> Tensor:
    """Tokens after the final norm by the library's own forward."""
    inner: Any = getattr(model, "vit", model)
    noise = {"noise": torch.arange(16.0).repeat(2, 1)} if row.startswith("mae") else {}
    out = inner(image(size), **noise).last_hidden_state
    result: Tensor = inner.post_layernorm(out) if row == "clip" else out
    return result


@pytest.mark.parametrize("row", ROWS)
def test_a_folder_has_the_librarys_features(tmp_path: Path, row: str) -> None:
    kind, config, more, options, given, mean = ROWS[row]
    settings = getattr(transformers, config)(**(SIZES | more))
    model = randomise(getattr(transformers, kind)(settings, **options))
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    expected = native(model, row)
    b = load(tmp_path, given)
    torch.testing.assert_close(tokens(b.model, image()), expected, atol=2e-5, rtol=1e-5)
    assert (b.facts["heads"], b.mean, b.img_size) == (2, mean, (SIZE, SIZE))
    assert b.known_from["network"] == "config.json"
    if (
        given is OWN
    ):  # the folder has no preprocessor_config.json, and its kind comes in several normalisations
        with pytest.raises(
            InputError, match=r"mean and std of its input: add --mean=\[R,G,B\] --std"
        ):
            load(tmp_path)
    processor = {"image_mean": [0.3] * 3, "image_std": [0.4] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    b = load(tmp_path)
    assert (b.mean, b.known_from["normalisation"]) == ((0.3,) * 3, "preprocessor_config.json")
    with pytest.raises(InputError, match=r"--mean \[0\.9.*preprocessor_config\.json says \[0\.3"):
        load(tmp_path, BackboneFacts(mean=[0.9] * 3, std=[0.4] * 3))
    # names as they are in memory
    in_memory = saved(tmp_path / "pytorch_model.bin", model.state_dict())
    torch.testing.assert_close(
        tokens(load(in_memory).model, image()), expected, atol=2e-5, rtol=1e-5
    )
    (tmp_path / "config.json").unlink()
    if row not in ("dinov3", "dinov3 gated"):
        with pytest.raises(InputError, match=r"config\.json|missing|unexpected"):
            load(tmp_path)


def test_activations_and_eps_that_are_not_known_are_refused(tmp_path: Path) -> None:
    for settings, says in (
        ({"hidden_act": "tanh"}, "tanh"),
        ({"layer_norm_eps": 1e-3}, "eps 0.001"),
    ):
        config = transformers.ViTConfig(**(SIZES | MLP | settings))
        transformers.ViTModel(config).save_pretrained(tmp_path)
        with pytest.raises(InputError, match=says):
            load(tmp_path, OWN)
