"""Published kinds of files: each loads with the reference's features and asks for no more than it must."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from backbone_nets import (
    ONE_HEAD,
    PATCH,
    SIZE,
    WIDTH,
    headless,
    image,
    load,
    prefixed,
    same,
    saved,
    tiny,
    tokens,
    told,
)
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from cmt_mae.backbones import load_backbone
from cmt_mae.backbones.backbone import HALF, IMAGENET_MEAN
from cmt_mae.backbones.shapes import fixed_positions
from cmt_mae.core.backbone_facts import BackboneFacts
from cmt_mae.core.errors import InputError

BEIT = {"use_abs_pos_emb": False, "init_values": 0.1, "num_heads": 2, "global_pool": "token"}
NO_CLS: dict[str, Any] = {"class_token": False, "global_pool": "avg", "fc_norm": False}
INDEX = torch.zeros(17, 17, dtype=torch.long)
ARGS = argparse.Namespace(lr=1e-3, output_dir=Path("/x"), device="cuda")


def mae(reference: nn.Module, _: nn.Module) -> Any:
    decoder = {
        "mask_token": torch.zeros(1, 1, 32), "decoder_pos_embed": torch.zeros(1, 17, 32),
        "decoder_embed.weight": torch.zeros(32, WIDTH), "decoder_norm.bias": torch.zeros(32),
        "decoder_blocks.0.norm1.weight": torch.zeros(32), "decoder_pred.weight": torch.zeros(192, 32),
    }  # fmt: skip
    return {"model": headless(reference) | decoder, "epoch": 3, "args": ARGS, "optimizer": {}}


def dino(reference: nn.Module, other: nn.Module) -> Any:
    head = {"head.mlp.0.weight": torch.zeros(4, 4), "head.last_layer.weight_v": torch.zeros(4, 4)}
    hidden = {"backbone.masked_embed": torch.zeros(1, WIDTH)}
    return {
        "teacher": prefixed(headless(reference), "backbone.") | hidden | head,
        "student": prefixed(prefixed(headless(other), "backbone.") | head, "module."),
        "epoch": np.int64(7), "args": ARGS, "dino_loss": {"center": torch.zeros(1, 4)},
    }  # fmt: skip


def ibot(reference: nn.Module, _: nn.Module) -> Any:
    return {"state_dict": headless(reference) | {"masked_embed": torch.zeros(1, WIDTH)}}


def ijepa(reference: nn.Module, other: nn.Module) -> Any:
    return {
        "encoder": prefixed(headless(other), "module."),
        "target_encoder": prefixed(headless(reference), "module."),
        "predictor": {"module.predictor_embed.weight": torch.zeros(4, 4)},
        "opt": {}, "epoch": 1,
    }  # fmt: skip


def moco(reference: nn.Module, other: nn.Module) -> Any:
    head = {"head.0.weight": torch.zeros(4, 4), "head.1.running_mean": torch.zeros(4)}
    return {
        "arch": "vit_small",
        "state_dict": prefixed(headless(reference) | head, "module.base_encoder.")
        | prefixed(headless(other) | head, "module.momentum_encoder.")
        | {"module.predictor.0.weight": torch.zeros(4, 4)},
    }


def dinov2(reference: nn.Module, _: nn.Module) -> Any:
    official = headless(reference) | {"mask_token": torch.zeros(1, WIDTH)}
    if "reg_token" in official:  # their class token has a position, timm's does not
        official["register_tokens"] = official.pop("reg_token")
        cls_row = torch.randn(1, 1, WIDTH)
        official["cls_token"] = official["cls_token"] - cls_row
        official["pos_embed"] = torch.cat([cls_row, official["pos_embed"]], dim=1)
    by_timm = checkpoint_filter_fn(dict(official), reference)
    assert all(torch.allclose(v, reference.state_dict()[k]) for k, v in by_timm.items())
    return official


def chunked(state: dict[str, Tensor], chunk: int = 1) -> dict[str, Tensor]:
    """DINOv2's BlockChunk: blocks.CHUNK.BLOCK."""
    return {
        re.sub(r"blocks\.(\d+)\.", lambda m: f"blocks.{int(m[1]) // chunk}.{m[1]}.", k): v
        for k, v in state.items()
    }


def dinov2_training(reference: nn.Module, other: nn.Module) -> Any:
    heads = {f"{who}.dino_head.mlp.0.weight": torch.zeros(4, 4) for who in ("teacher", "student")}
    return {
        "model": prefixed(chunked(dinov2(reference, other)), "teacher.backbone.")
        | prefixed(chunked(dinov2(other, other)), "student.backbone.")
        | heads
        | {"dino_loss.center": torch.zeros(1, 4)},
        "iteration": 9,
    }


def dinov2_teacher(reference: nn.Module, other: nn.Module) -> Any:
    state = prefixed(chunked(dinov2(reference, other)), "backbone.")
    return {"teacher": state | {"dino_head.mlp.0.weight": torch.zeros(4, 4)}}


def beit(reference: nn.Module, _: nn.Module, **more: Tensor) -> Any:
    extra = {"mask_token": torch.zeros(1, 1, WIDTH), "lm_head.weight": torch.zeros(8192, WIDTH)}
    index = {"blocks.0.attn.relative_position_index": INDEX}
    return {"module": headless(reference) | extra | index | more}


def beit_v2(reference: nn.Module, other: nn.Module) -> Any:
    return beit(reference, other, **{"cls_pt_layers.0.norm1.weight": torch.zeros(WIDTH)})


def data2vec(reference: nn.Module, _: nn.Module) -> Any:
    extra = {"mask_token": torch.zeros(1, 1, WIDTH), "lm_head.weight": torch.zeros(WIDTH, WIDTH)}
    return {"model": headless(reference) | extra | {"rel_pos_bias.relative_position_index": INDEX}}


def fairseq(reference: nn.Module, _: nn.Module) -> Any:
    state: dict[str, Any] = {}
    for name, tensor in headless(reference).items():
        name = re.sub(
            r"^cls_token", "cls_emb", name.replace("patch_embed.proj", "patch_embed.conv")
        )
        name = name.replace(".mlp.fc1.", ".mlp.0.").replace(".mlp.fc2.", ".mlp.2.")
        outside = name.startswith(("cls_emb", "patch_embed"))
        state[name if outside else f"encoder.{name}"] = tensor
    state |= {"mask_emb": torch.zeros(1, 1, WIDTH), "final_proj.weight": torch.zeros(WIDTH, WIDTH)}
    state["_ema"] = {"blocks.0.norm1.weight": torch.zeros(WIDTH)}
    return {"model": state, "cfg": {"x": 1}, "args": None}


Write = Callable[[nn.Module, nn.Module], Any]
KINDS: dict[str, tuple[Write, dict[str, Any], str, dict[str, Any]]] = {
    # name: writer, network, the file's name, what is expected besides equal features
    "mae": (mae, {}, "mae_full.pth", {"source": "MAE", "licence": "CC-BY-NC-4.0"}),
    "dino": (dino, {}, "checkpoint.pth", {"source": "teacher", "key": "student"}),
    "ibot": (ibot, {}, "checkpoint_teacher.pth", {"source": "iBOT"}),
    "ijepa": (ijepa, NO_CLS, "IN1K.pth.tar", {"source": "I-JEPA", "key": "encoder", "prefix": 0}),
    "moco": (moco, {}, "vit.pth.tar", {"source": "MoCo", "key": "momentum_encoder"}),
    "dinov2": (dinov2, {"init_values": 1e-5}, "dinov2.pth", {"source": "DINOv2"}),
    "dinov2 registers": (
        dinov2, {"init_values": 1e-5, "reg_tokens": 4, "no_embed_class": True}, "dinov2.pth",
        {"source": "DINOv2", "prefix": 5},
    ),
    "dinov2 training": (
        dinov2_training, {"init_values": 1e-5}, "model_0009.rank_0.pth",
        {"source": "DINOv2", "key": "student.backbone"},
    ),
    "dinov2 teacher": (
        dinov2_teacher, {"init_values": 1e-5}, "teacher_checkpoint.pth", {"source": "DINOv2"}
    ),
    "beit": (
        beit, {"arch": "beit_base_patch16_224", "use_rel_pos_bias": True, **BEIT}, "pt22k.pth",
        {"source": "BEiT", "mean": HALF, "heads": 2, "licence": "MIT"},
    ),
    "beit v2": (
        beit_v2, {"arch": "beit_base_patch16_224", "use_rel_pos_bias": True, **BEIT}, "v2.pth",
        {"source": "BEiT v2", "heads": 2},
    ),
    "data2vec": (
        data2vec, {"arch": "beit_base_patch16_224", "use_shared_rel_pos_bias": True, **BEIT},
        "checkpoint-799.pth", {"source": "data2vec", "heads": 2},
    ),
    "fairseq": (
        fairseq, {"arch": "beit_base_patch16_224", "use_shared_rel_pos_bias": True, **BEIT},
        "d2v.pt", {"source": "eps 1e-5 is 1e-6 here", "heads": 2, "atol": 2e-4},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_published_kind_has_the_references_features(tmp_path: Path, kind: str) -> None:
    write, options, file, wanted = KINDS[kind]
    options = dict(options)
    arch = options.pop("arch", "vit_base_patch16_224")
    reference, other = tiny(arch, seed=1, **options), tiny(arch, seed=2, **options)
    if kind == "fairseq":
        for module in reference.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = (
                    1e-5  # fairseq's default; ours is 1e-6, see the note in its source line
                )
    path = saved(tmp_path / file, write(reference, other))
    heads = wanted.get("heads", 1)
    b = load(path, BackboneFacts(heads=heads))
    same(b, reference, wanted.get("atol", 1e-5))
    assert wanted["source"] in b.source
    assert b.licence is None or b.licence.startswith(
        "not stated; if these are the published weights: "
    )
    assert wanted.get("licence", "") in (b.licence or "")
    assert (b.mean, b.facts["heads"]) == (wanted.get("mean", IMAGENET_MEAN), heads)
    assert (b.prefix_tokens, b.has_cls) == (wanted.get("prefix", 1), kind != "ijepa")
    assert b.img_size == (SIZE, SIZE)
    if "key" in wanted:
        same(load(path, ONE_HEAD, key=wanted["key"]), other)
        with pytest.raises(InputError, match="no entry 'ema'"):
            load(path, ONE_HEAD, key="ema")
    # one's own training of the kind may have another normalisation
    own = load(path, BackboneFacts(heads=heads, mean=[0.1] * 3, std=[0.2] * 3))
    assert (own.mean, own.known_from["normalisation"]) == ((0.1,) * 3, "--mean and --std")
    if heads == 1:
        with pytest.raises(InputError, match=r"does not say its heads \(width 64\): add --heads N"):
            load(path)


def test_deit_of_the_shared_folder_is_timms_own_under_any_name(
    shared: Path, tmp_path: Path
) -> None:
    path = shared / "teachers" / "deit_tiny_patch16_224.safetensors"
    renamed = tmp_path / "vit_tiny_patch16_224.safetensors"
    renamed.symlink_to(path)
    reference = timm.create_model("deit_tiny_patch16_224", checkpoint_path=str(path)).eval()
    x = image(224)[:1]
    for file in (path, renamed):
        b = load(file)
        assert torch.equal(tokens(b.model, x), tokens(reference, x))
        assert (b.architecture, b.img_size, b.has_cls, b.prefix_tokens, b.proj) == (
            "deit_tiny_patch16_224", (224, 224), True, 1, None,
        )  # fmt: skip
        assert b.mean == IMAGENET_MEAN
        assert b.licence == "apache-2.0"
    assert tokens(load_backbone(str(path), img_size=128).model, image(128)[:1]).shape[1] == 65


def moco_table(width: int, side: int) -> Tensor:
    """MoCo v3's table written from its definition: first half of the channels encodes the row."""
    omega = 1 / 10000 ** (torch.arange(width // 4) / (width // 4))
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    a, b = row.flatten()[:, None] * omega, column.flatten()[:, None] * omega
    grid = torch.cat([a.sin(), a.cos(), b.sin(), b.cos()], dim=1)
    return torch.cat([torch.zeros(1, width), grid])[None]


def test_moco_v3_vit_s_has_twelve_heads_by_its_positions_alone(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch16_224", num_classes=0, img_size=32, num_heads=12)
    model = model.to_empty(device="cpu").eval()
    torch.nn.init.normal_(model.cls_token)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)
    with torch.no_grad():
        model.pos_embed.copy_(moco_table(384, 2))
    assert fixed_positions(model.pos_embed) == ("moco", (2, 2))
    b = load(saved(tmp_path / "deit_layout.pth", {"model": model.state_dict()}))
    same(b, model)
    assert b.facts["heads"] == 12
    with torch.no_grad():
        model.pos_embed.normal_()
    learned = {"grid": [2, 2], "mean": [0.5] * 3, "std": [0.5] * 3}
    dino_like = load(saved(tmp_path / "b.pth", model.state_dict()), BackboneFacts(**learned))
    assert dino_like.facts["heads"] == 6


def test_mae_fine_tuned_on_pooled_tokens_has_its_norm_after_pooling(tmp_path: Path) -> None:
    reference = tiny(global_pool="avg")
    b = load(saved(tmp_path / "ft.pth", {"model": reference.state_dict()}), told())
    same(b, reference)
    x = image()
    with torch.no_grad():
        wanted = reference.forward_head(tokens(reference, x), True)  # type: ignore[operator]
        torch.testing.assert_close(b.model(x), wanted)
        torch.testing.assert_close(b(x).mean, wanted)


@pytest.mark.parametrize(("biased", "gated"), [(False, False), (True, False), (True, True)])
def test_metas_own_file_of_dinov3(tmp_path: Path, biased: bool, gated: bool) -> None:
    name = f"vit_small_{'plus_' if gated else ''}patch16_dinov3{'_qkvb' if biased else ''}"
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, depth=2, img_size=64).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    rules = {"reg_token": "storage_tokens", "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma",
             "fc1_g": "w1", "fc1_x": "w2"} | ({"fc2": "w3"} if gated else {})  # fmt: skip
    theirs: dict[str, Tensor] = {
        "mask_token": torch.zeros(1, 384),
        "rope_embed.periods": torch.ones(16),
    }
    for key, value in model.state_dict().items():
        for ours, word in rules.items():
            key = key.replace(ours, word)
        theirs[key] = value
    for i in range(2):
        q, v = (theirs.pop(f"blocks.{i}.attn.{n}_bias", torch.zeros(384)) for n in "qv")
        theirs[f"blocks.{i}.attn.qkv.bias"] = torch.cat([q, torch.zeros(384), v])
        theirs[f"blocks.{i}.attn.qkv.bias_mask"] = torch.ones(3 * 384)
    b = load_backbone(saved(tmp_path / "dinov3_vits16_pretrain.pth", theirs), img_size=64)
    same(b, model)
    assert (b.mean, b.prefix_tokens, b.facts["heads"]) == (IMAGENET_MEAN, 5, 6)


WORDS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
WRAPPED: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "compiled": lambda s: prefixed(s, "_orig_mod."),
    "ddp of compiled": lambda s: prefixed(s, "module._orig_mod."),
    "compiled ddp": lambda s: prefixed(s, "_orig_mod.module."),
    **{
        f"{word} in every block": lambda s, word=word: {  # type: ignore[misc]
            re.sub(r"^(blocks\.\d+\.)", rf"\1{word}.", k): v for k, v in s.items()
        }
        for word in WORDS
    },
    "fsdp all over": lambda s: {
        "_fsdp_wrapped_module."
        + re.sub(r"^(blocks\.\d+\.)", r"\1_fsdp_wrapped_module._orig_mod.", k): v
        for k, v in s.items()
    },
    "chunked blocks": chunked,
}


@pytest.mark.parametrize("how", WRAPPED)
def test_names_of_wrappers_are_taken_off_wherever_they_stand(tmp_path: Path, how: str) -> None:
    reference = tiny()
    same(load(saved(tmp_path / "a.ckpt", WRAPPED[how](headless(reference))), told()), reference)


def test_unknown_prefixes_are_listed_and_taken_by_key(tmp_path: Path) -> None:
    reference, other = headless(tiny(seed=1)), headless(tiny(seed=2))
    both = prefixed(reference, "backbone.vit.") | prefixed(other, "momentum_backbone.")
    path = saved(
        tmp_path / "solo.ckpt", {"state_dict": both | {"classifier.weight": torch.zeros(2)}}
    )
    with pytest.raises(
        InputError, match=r"prefixes: backbone\.vit, momentum_backbone; .*--key backbone"
    ):
        load(path)
    for key, wanted in (("backbone.vit", tiny(seed=1)), ("momentum_backbone", tiny(seed=2))):
        same(load(path, told(), key=key), wanted)
    path = saved(
        tmp_path / "lightning.ckpt", {"state_dict": prefixed(reference, "model._orig_mod.")}
    )
    same(load(path, told(), key="model"), tiny(seed=1))


def test_siglip_tower_of_open_clip_has_no_class_token(tmp_path: Path) -> None:
    reference = tiny(class_token=False, global_pool="map", num_classes=0)
    state = prefixed(headless(reference), "visual.trunk.") | {
        "text.transformer.resblocks.0.ln_1.weight": torch.zeros(4), "logit_bias": torch.zeros(()),
    }  # fmt: skip
    b = load(saved(tmp_path / "open_clip_pytorch_model.bin", state), told())
    same(b, reference)
    assert (b.has_cls, b.prefix_tokens, PATCH) == (False, 0, 8)
