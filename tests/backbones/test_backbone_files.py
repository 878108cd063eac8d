"""Published kinds of files: each loads into a network with the reference's features."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from backbone_nets import (
    DEPTH,
    PATCH,
    SIZE,
    WIDTH,
    headless,
    image,
    prefixed,
    randomise,
    saved,
    tiny,
    tokens,
)
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from cmt_mae.backbones import Backbone, load_backbone
from cmt_mae.backbones.backbone import HALF, IMAGENET_MEAN
from cmt_mae.backbones.shapes import infer_beit, infer_vit
from cmt_mae.core.errors import InputError


def same(backbone: Backbone, reference: nn.Module, atol: float = 1e-5) -> None:
    x = image(backbone.img_size)
    torch.testing.assert_close(
        tokens(backbone.model, x), tokens(reference, x), atol=atol, rtol=1e-5
    )


def test_deit_of_the_shared_folder_is_timms_own(shared: Path) -> None:
    path = shared / "teachers" / "deit_tiny_patch16_224.safetensors"
    b = load_backbone(str(path))
    reference = timm.create_model("deit_tiny_patch16_224", checkpoint_path=str(path)).eval()
    x = image(224)[:1]
    assert torch.equal(tokens(b.model, x), tokens(reference, x))
    assert (b.architecture, b.img_size, b.has_cls, b.prefix_tokens, b.proj) == (
        "deit_tiny_patch16_224", (224, 224), True, 1, None,
    )  # fmt: skip
    assert b.mean == IMAGENET_MEAN
    assert b.licence == "apache-2.0"
    assert tokens(load_backbone(str(path), img_size=128).model, image(128)[:1]).shape == (
        1,
        65,
        192,
    )


def test_mae_with_and_without_decoder(tmp_path: Path) -> None:
    reference = tiny()
    decoder = {
        "mask_token": torch.zeros(1, 1, 32),
        "decoder_pos_embed": torch.zeros(1, 17, 32),
        "decoder_embed.weight": torch.zeros(32, WIDTH),
        "decoder_blocks.0.norm1.weight": torch.zeros(32),
        "decoder_norm.bias": torch.zeros(32),
        "decoder_pred.weight": torch.zeros(192, 32),
    }
    args = argparse.Namespace(lr=1e-3, output_dir=Path("/x"), device="cuda")
    full = {"model": headless(reference) | decoder, "epoch": 3, "args": args, "optimizer": {}}
    b = load_backbone(saved(tmp_path / "mae_full.pth", full))
    same(b, reference)
    assert "MAE" in b.source
    b = load_backbone(saved(tmp_path / "mae.pth", {"model": headless(reference)}))
    same(b, reference)
    assert b.kwargs["img_size"] == (SIZE, SIZE)
    assert (b.kwargs["depth"], b.kwargs["num_heads"]) == (DEPTH, 1)


def test_mae_fine_tuned_on_pooled_tokens_has_its_norm_after_pooling(tmp_path: Path) -> None:
    reference = tiny(global_pool="avg")
    assert "fc_norm.weight" in headless(reference)
    b = load_backbone(saved(tmp_path / "ft.pth", {"model": reference.state_dict()}))
    same(b, reference)
    x = image()
    with torch.no_grad():
        assert torch.allclose(b.model(x), reference.forward_head(tokens(reference, x), True))


def test_dino_and_ibot_take_the_teacher_and_key_the_student(tmp_path: Path) -> None:
    teacher, student = tiny(seed=1), tiny(seed=2)
    head = {"head.mlp.0.weight": torch.zeros(4, 4), "head.last_layer.weight_v": torch.zeros(4, 4)}
    tree = {
        "teacher": prefixed(headless(teacher), "backbone.")
        | {"backbone.masked_embed": torch.zeros(1, WIDTH)}
        | head,
        "student": prefixed(prefixed(headless(student), "backbone.") | head, "module."),
        "epoch": np.int64(7),
        "args": argparse.Namespace(arch="vit_small"),
        "dino_loss": {"center": torch.zeros(1, 4)},
    }
    path = saved(tmp_path / "checkpoint.pth", tree)
    same(load_backbone(path), teacher)
    same(load_backbone(path, key="student"), student)
    assert "teacher" in load_backbone(path).source
    with pytest.raises(InputError, match=r"no entry 'ema'.*student.*teacher"):
        load_backbone(path, key="ema")
    same(load_backbone(saved(tmp_path / "raw.pth", headless(teacher))), teacher)
    only = {"state_dict": headless(teacher) | {"masked_embed": torch.zeros(1, WIDTH)}}
    same(load_backbone(saved(tmp_path / "ibot.pth", only)), teacher)


def moco_table(width: int, side: int) -> Tensor:
    """MoCo v3's table written from its definition: first half of the channels encodes the row."""
    omega = 1 / 10000 ** (torch.arange(width // 4) / (width // 4))
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    a, b = row.flatten()[:, None] * omega, column.flatten()[:, None] * omega
    grid = torch.cat([a.sin(), a.cos(), b.sin(), b.cos()], dim=1)
    return torch.cat([torch.zeros(1, width), grid])[None]


def test_moco_v3_vit_s_has_twelve_heads(tmp_path: Path) -> None:
    reference = tiny(embed_dim=384, depth=1, num_heads=12, mlp_ratio=1.0)
    other = tiny(embed_dim=384, depth=1, num_heads=12, mlp_ratio=1.0, seed=3)
    with torch.no_grad():
        reference.pos_embed.copy_(moco_table(384, SIZE // PATCH))
    head = {"head.0.weight": torch.zeros(4, 4), "head.1.running_mean": torch.zeros(4)}
    state = (
        prefixed(headless(reference) | head, "module.base_encoder.")
        | prefixed(headless(other) | head, "module.momentum_encoder.")
        | {"module.predictor.0.weight": torch.zeros(4, 4)}
    )
    path = saved(tmp_path / "vit-s.pth.tar", {"arch": "vit_small", "state_dict": state})
    b = load_backbone(path)
    same(b, reference)
    assert b.kwargs["num_heads"] == 12
    wrong = tiny(embed_dim=384, depth=1, num_heads=6, mlp_ratio=1.0)
    wrong.load_state_dict(reference.state_dict())
    assert not torch.allclose(tokens(wrong, image()), tokens(b.model, image()), atol=1e-2)
    # converted to DeiT's layout, only the table of positions still tells MoCo's ViT-S from DINO's
    converted = load_backbone(saved(tmp_path / "deit.pth", {"model": headless(reference)}))
    same(converted, reference)
    with torch.no_grad():
        reference.pos_embed.normal_()
    learned = load_backbone(saved(tmp_path / "dino.pth", {"model": headless(reference)}))
    assert learned.kwargs["num_heads"] == 6
    momentum = load_backbone(path, key="momentum_encoder")
    assert torch.equal(momentum.model.state_dict()["norm.bias"], other.state_dict()["norm.bias"])


def test_ijepa_takes_the_target_encoder_and_has_no_class_token(tmp_path: Path) -> None:
    options: dict[str, Any] = {"class_token": False, "global_pool": "avg", "fc_norm": False}
    target, encoder = tiny(seed=1, **options), tiny(seed=2, **options)
    tree = {
        "encoder": prefixed(headless(encoder), "module."),
        "target_encoder": prefixed(headless(target), "module."),
        "predictor": {"module.predictor_embed.weight": torch.zeros(4, 4)},
        "opt": {},
        "epoch": 1,
    }
    path = saved(tmp_path / "IN1K-vit.h.14-300e.pth.tar", tree)
    b = load_backbone(path)
    same(b, target)
    assert (b.has_cls, b.prefix_tokens, b.model.norm.eps) == (False, 0, 1e-6)
    assert tokens(b.model, image()).shape == (2, (SIZE // PATCH) ** 2, WIDTH)
    same(load_backbone(path, key="encoder"), encoder)


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_official_file(tmp_path: Path, registers: int) -> None:
    reference = tiny(init_values=1e-5, reg_tokens=registers, no_embed_class=registers > 0)
    official = headless(reference) | {"mask_token": torch.zeros(1, WIDTH)}
    if registers:
        official["register_tokens"] = official.pop("reg_token")
        cls_row = torch.randn(1, 1, WIDTH)
        official["cls_token"] = official["cls_token"] - cls_row
        official["pos_embed"] = torch.cat([cls_row, official["pos_embed"]], dim=1)
    b = load_backbone(saved(tmp_path / "dinov2.pth", dict(official)))
    same(b, reference)
    assert b.prefix_tokens == 1 + registers
    by_timm = checkpoint_filter_fn(dict(official), reference)
    mine = b.model.state_dict()
    assert all(torch.allclose(v, mine[k]) for k, v in by_timm.items())


# --- BEiT's family -------------------------------------------------------------------------------

BEIT = {"use_abs_pos_emb": False, "init_values": 0.1, "num_heads": 2, "global_pool": "token"}


def transformers_beit(timm_beit: nn.Module) -> nn.Module:
    """The same weights in transformers' BeitModel, whose forward others wrote."""
    from transformers import BeitConfig, BeitModel

    config = BeitConfig(
        hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=2, image_size=SIZE,
        intermediate_size=2 * WIDTH, patch_size=PATCH, use_relative_position_bias=True,
        use_mean_pooling=False, layer_norm_eps=1e-6,
    )  # fmt: skip
    model = BeitModel(config, add_pooling_layer=False).eval()
    names = {
        "cls_token": "embeddings.cls_token",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "gamma_": "lambda_",
        "attn.proj": "attention.o_proj",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.relative": "relative_position_bias.relative",
        "attn.q_bias": "attention.q_proj.bias",
        "attn.v_bias": "attention.v_proj.bias",
    }
    state = {}
    for name, tensor in headless(timm_beit).items():
        name = re.sub(r"^blocks\.", "layers.", re.sub(r"^norm\.", "layernorm.", name))
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if name.endswith("attn.qkv.weight"):
            for letter, rows in zip("qkv", tensor.chunk(3), strict=True):
                state[name.replace("attn.qkv", f"attention.{letter}_proj")] = rows
        else:
            state[name] = tensor
    model.load_state_dict(state)
    return model


def test_beit_has_relative_positions_and_layer_scale_in_its_forward(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    reference = tiny("beit_base_patch16_224", use_rel_pos_bias=True, **BEIT)
    state = headless(reference) | {
        "mask_token": torch.zeros(1, 1, WIDTH),
        "lm_head.weight": torch.zeros(8192, WIDTH),
        "blocks.0.attn.relative_position_index": torch.zeros(17, 17, dtype=torch.long),
    }
    path = saved(tmp_path / "beit_base_patch16_224_pt22k.pth", {"module": state})
    b = load_backbone(path)
    same(b, reference)
    with torch.no_grad():
        others = transformers_beit(reference)(image()).last_hidden_state
    torch.testing.assert_close(tokens(b.model, image()), others, atol=1e-5, rtol=1e-5)
    assert (b.kwargs["num_heads"], b.mean, b.has_cls, b.prefix_tokens) == (2, HALF, True, 1)
    larger = load_backbone(path, img_size=48)
    assert tokens(larger.model, image(48)).shape == (2, 37, WIDTH)


def test_beit_fine_tuned_and_data2vec_with_a_shared_table(tmp_path: Path) -> None:
    fine = tiny("beit_base_patch16_224", use_rel_pos_bias=True, **(BEIT | {"global_pool": "avg"}))
    b = load_backbone(saved(tmp_path / "ft.pth", {"model": fine.state_dict()}))
    same(b, fine)
    reference = tiny("beit_base_patch16_224", use_shared_rel_pos_bias=True, **BEIT)
    extra = {"mask_token": torch.zeros(1, 1, WIDTH), "lm_head.weight": torch.zeros(WIDTH, WIDTH)}
    extra["rel_pos_bias.relative_position_index"] = torch.zeros(17, 17, dtype=torch.long)
    tree = {"model": headless(reference) | extra, "model_ema": headless(fine)}
    b = load_backbone(saved(tmp_path / "checkpoint-799.pth", tree))
    same(b, reference)
    assert b.mean == IMAGENET_MEAN
    assert "data2vec" in b.source


def test_data2vec_of_fairseq(tmp_path: Path) -> None:
    reference = tiny("beit_base_patch16_224", use_shared_rel_pos_bias=True, **BEIT)
    for module in reference.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5  # fairseq's default; ours is 1e-6, see the note in its source line
    names = {
        "cls_token": "cls_emb",
        "patch_embed.proj": "patch_embed.conv",
        ".mlp.fc1.": ".mlp.0.",
        ".mlp.fc2.": ".mlp.2.",
    }
    state: dict[str, Any] = {}
    for name, tensor in headless(reference).items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        outside = name.startswith(("cls_emb", "patch_embed"))
        state[name if outside else f"encoder.{name}"] = tensor
    state |= {"mask_emb": torch.zeros(1, 1, WIDTH), "final_proj.weight": torch.zeros(WIDTH, WIDTH)}
    state["encoder.rel_pos_bias.relative_position_index"] = torch.zeros(17, 17, dtype=torch.long)
    state["_ema"] = {"blocks.0.norm1.weight": torch.zeros(WIDTH)}
    b = load_backbone(saved(tmp_path / "d2v.pt", {"model": state, "cfg": {"x": 1}, "args": None}))
    same(b, reference, atol=2e-4)
    assert "eps" in b.source


# --- Hugging Face --------------------------------------------------------------------------------

HF = {
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 2,
    "intermediate_size": 2 * WIDTH,
    "image_size": SIZE,
    "patch_size": PATCH,
}


@pytest.mark.parametrize("whole", [False, True])
def test_hf_vit_mae(tmp_path: Path, whole: bool) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTMAEConfig(
        **HF, layer_norm_eps=1e-6, mask_ratio=0.0, decoder_hidden_size=32,
        decoder_num_hidden_layers=1, decoder_num_attention_heads=1,
    )  # fmt: skip
    kind = transformers.ViTMAEForPreTraining if whole else transformers.ViTMAEModel
    reference = randomise(kind(config))
    reference.save_pretrained(tmp_path)
    b = load_backbone(str(tmp_path))
    vit = reference.vit if whole else reference
    with torch.no_grad():  # noise in rising order: mask_ratio 0 leaves the patches where they are
        noise = torch.arange(16.0).repeat(2, 1)
        expected = vit(image(), noise=noise).last_hidden_state
    torch.testing.assert_close(tokens(b.model, image()), expected, atol=1e-5, rtol=1e-5)
    assert b.kwargs["num_heads"] == 2  # from its config.json; 64 wide alone would mean one
    assert b.mean == IMAGENET_MEAN


def test_hf_vit_with_its_processor_and_in_memory_names(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(**HF, layer_norm_eps=1e-6)
    reference = randomise(transformers.ViTForImageClassification(config))
    reference.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}'
    )
    with torch.no_grad():
        expected = reference.vit(image()).last_hidden_state
    b = load_backbone(str(tmp_path))
    torch.testing.assert_close(tokens(b.model, image()), expected, atol=1e-5, rtol=1e-5)
    assert (b.mean, b.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    b = load_backbone(saved(tmp_path / "pytorch_model.bin", reference.state_dict()))
    torch.testing.assert_close(tokens(b.model, image()), expected, atol=1e-5, rtol=1e-5)


# --- files that name their timm model ------------------------------------------------------------


def test_timm_folder_and_file_name(tmp_path: Path) -> None:
    reference = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=64).eval()
    save_file(reference.state_dict(), tmp_path / "vit_tiny_patch16_224.augreg_in21k.safetensors")
    b = load_backbone(str(tmp_path / "vit_tiny_patch16_224.augreg_in21k.safetensors"))
    assert b.mean == HALF  # augreg's, known by its name alone
    assert b.licence == "apache-2.0"
    assert b.architecture == "vit_tiny_patch16_224"
    save_file(reference.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        '{"architecture": "vit_tiny_patch16_224", "num_classes": 5, "model_args": {"img_size": 64},'
        '"pretrained_cfg": {"input_size": [3, 64, 64], "mean": [0.1, 0.1, 0.1],'
        '"std": [0.2, 0.2, 0.2], "license": "mit"}}'
    )
    b = load_backbone(str(tmp_path))
    same(b, reference)
    assert (b.mean, b.licence, b.img_size) == ((0.1,) * 3, "mit", (64, 64))


def test_eva_with_rotary_positions_by_config(tmp_path: Path) -> None:
    options: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2}
    options |= {"num_heads": 2, "num_classes": 0}
    reference = timm.create_model("vit_small_patch16_dinov3", **options).eval()
    state = reference.state_dict()
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"config\.json"):
        load_backbone(str(tmp_path))
    (tmp_path / "config.json").write_text(
        '{"architecture": "vit_small_patch16_dinov3", "model_args": {"patch_size": 8,'
        ' "embed_dim": 48, "depth": 2, "num_heads": 2},'
        ' "pretrained_cfg": {"input_size": [3, 32, 32]}}'
    )
    b = load_backbone(str(tmp_path))
    same(b, reference)
    assert b.prefix_tokens == 5  # class token and four registers
    assert tokens(load_backbone(str(tmp_path), img_size=48).model, image(48)).shape == (2, 41, 48)


def test_siglip_tower_of_open_clip_has_no_class_token(tmp_path: Path) -> None:
    reference = tiny(class_token=False, global_pool="map", num_classes=0)
    state = prefixed(headless(reference), "visual.trunk.") | {
        "text.transformer.resblocks.0.ln_1.weight": torch.zeros(4),
        "logit_scale": torch.zeros(()),
        "logit_bias": torch.zeros(()),
    }
    b = load_backbone(saved(tmp_path / "open_clip_pytorch_model.bin", state))
    same(b, reference)
    assert (b.has_cls, b.prefix_tokens, b.mean) == (False, 0, HALF)


# --- real sizes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("vit_small_patch8_224", None),
        ("vit_base_patch16_clip_quickgelu_224", 85_799_424),  # spec 12.1, without projection
        ("vit_large_patch14_clip_quickgelu_336", None),
        ("vit_huge_patch14_clip_224", None),
        ("vit_giant_patch14_reg4_dinov2", None),
        ("vit_huge_patch14_gap_224", None),
        ("deit_base_distilled_patch16_224", None),
        ("beit_large_patch16_384", None),
    ],
)
def test_published_sizes_are_inferred_from_shapes_alone(name: str, parameters: int | None) -> None:
    with torch.device("meta"):  # shapes only: no memory, no numbers
        published = timm.create_model(name, num_classes=0)
    state = {k: v for k, v in published.state_dict().items() if not k.startswith("head")}
    if name.startswith("beit"):
        architecture, kwargs = infer_beit(state, name)
    else:
        kind = re.search(r"_(clip(_quickgelu)?)_", name)
        architecture, kwargs = infer_vit(state, name, clip=kind[1] if kind else None)
    with torch.device("meta"):
        built = timm.create_model(architecture, num_classes=0, **kwargs)
    assert {k: v.shape for k, v in built.state_dict().items()} == {
        k: v.shape for k, v in state.items()
    }
    ours, theirs = built.blocks[0], published.blocks[0]
    assert ours.attn.num_heads == theirs.attn.num_heads
    assert ours.norm1.eps == theirs.norm1.eps
    assert type(ours.mlp.act) is type(theirs.mlp.act)
    if parameters is not None:
        assert sum(p.numel() for p in built.parameters()) == parameters
