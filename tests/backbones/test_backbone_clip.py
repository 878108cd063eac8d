"""CLIP towers against open_clip, transformers and a hand-written OpenAI-like archive."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from backbone_nets import DEPTH, PATCH, SIZE, WIDTH, image, randomise, saved, tokens, told
from torch import Tensor, nn

from cmt_mae.backbones import Backbone, load_backbone
from cmt_mae.backbones.backbone import CLIP_MEAN, CLIP_STD
from cmt_mae.backbones.clip import check_tower, quickgelu_name
from cmt_mae.backbones.save import save_backbone
from cmt_mae.core.errors import InputError

EMBED = 24


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class ResidualAttentionBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(width, 4 * width),
                gelu=QuickGELU(),
                c_proj=nn.Linear(4 * width, width),
            )
        )
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(
            *[ResidualAttentionBlock(width, heads) for _ in range(DEPTH)]
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.resblocks(x)


class Visual(nn.Module):
    """OpenAI's tower as its paper and released names describe it; returns all projected tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(WIDTH))
        self.positional_embedding = nn.Parameter(torch.zeros((SIZE // PATCH) ** 2 + 1, WIDTH))
        self.ln_pre = nn.LayerNorm(WIDTH)
        self.transformer = Transformer(WIDTH, WIDTH // 64)
        self.ln_post = nn.LayerNorm(WIDTH)
        self.proj = nn.Parameter(torch.zeros(WIDTH, EMBED))

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv1(image).flatten(2).transpose(1, 2)
        cls = self.class_embedding.expand(x.shape[0], 1, -1)
        x = self.ln_pre(torch.cat([cls, x], dim=1) + self.positional_embedding)
        x = self.transformer(x.transpose(0, 1)).transpose(0, 1)
        return self.ln_post(x) @ self.proj


class CLIP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = Visual()
        self.transformer = Transformer(64, 1)
        self.token_embedding = nn.Embedding(10, 64)
        self.positional_embedding = nn.Parameter(torch.zeros(8, 64))
        self.ln_final = nn.LayerNorm(64)
        self.text_projection = nn.Parameter(torch.zeros(64, EMBED))
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.input_resolution: Tensor
        for name, value in {
            "input_resolution": SIZE,
            "context_length": 8,
            "vocab_size": 10,
        }.items():
            self.register_buffer(name, torch.tensor(value))

    def forward(self, image: Tensor) -> Tensor:
        return self.visual(image)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, CLIP]:
    """An archive as OpenAI publishes: scripted, weights in fp16; and the same network in fp32."""
    model = CLIP()
    randomise(model)
    for module in model.modules():
        if not isinstance(module, nn.LayerNorm):
            for p in module.parameters(recurse=False):
                p.data = p.data.half()
    path = str(tmp_path_factory.mktemp("clip") / "ViT-B-16.pt")
    torch.jit.save(torch.jit.script(model), path)
    return path, model.float()


def projected(b: Backbone) -> Tensor:
    assert b.proj is not None
    return tokens(b.model, image()) @ b.proj.T


def check_facts(b: Backbone, activation: str) -> None:
    assert (b.mean, b.std, b.has_cls, b.prefix_tokens) == (CLIP_MEAN, CLIP_STD, True, 1)
    assert b.proj is not None
    assert b.proj.shape == (EMBED, WIDTH)
    assert type(b.model.blocks[0].mlp.act).__name__ == activation
    assert {m.eps for m in b.model.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    assert all(p.dtype == torch.float32 for p in b.model.parameters())


def test_openai_archive_is_read_without_running_it(
    archive: tuple[str, CLIP], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, model = archive

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the archive must not be compiled or unpickled by torch")

    monkeypatch.setattr(torch.jit, "load", never)
    monkeypatch.setattr(torch, "load", never)
    b = load_backbone(path)
    with torch.no_grad():
        torch.testing.assert_close(projected(b), model(image()), atol=1e-5, rtol=1e-5)
    check_facts(b, "QuickGELU")
    assert "OpenAI" in b.source
    assert b.licence == "not stated; if these are the published weights: MIT"
    assert b.architecture == "vit_base_patch16_clip_quickgelu_224"


def test_state_dict_of_openai_and_gelu_would_be_wrong(
    archive: tuple[str, CLIP], tmp_path: Path
) -> None:
    path, model = archive
    b = load_backbone(saved(tmp_path / "state.pt", model.state_dict()))
    assert b.digest == load_backbone(path).digest
    check_facts(b, "QuickGELU")
    gelu = timm.create_model("vit_base_patch16_clip_224", num_classes=0, **b.kwargs).eval()
    gelu.load_state_dict(b.model.state_dict())
    assert (tokens(gelu, image()) - tokens(b.model, image())).abs().max() > 1e-2


def rewritten(source: str, target: Path, **entries: bytes) -> str:
    """The archive with some of its entries replaced."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            end = info.filename.split("/", 1)[1].replace("/", "_").replace(".", "_")
            new.writestr(info.filename, entries.get(end, old.read(info)))
    return str(target)


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.target}",)


def test_hostile_or_damaged_archive_is_refused(archive: tuple[str, CLIP], tmp_path: Path) -> None:
    path, _ = archive
    bad = tmp_path / "created"
    evil = rewritten(path, tmp_path / "evil.pt", data_pkl=pickle.dumps(Payload(bad), protocol=2))
    with pytest.raises(InputError, match=r"refused, the archive needs '.*system'"):
        load_backbone(evil)
    assert not bad.exists()
    short = rewritten(path, tmp_path / "short.pt", data_0=b"12")
    with pytest.raises(InputError, match="bytes instead of"):
        load_backbone(short)
    whole = Path(path).read_bytes()
    for share in (0.3, 0.9, 0.999):
        cut = tmp_path / "cut.pt"
        cut.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(InputError, match="damaged"):
            load_backbone(str(cut))
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF  # inside a storage: the zip's checksum tells
    (tmp_path / "flip.pt").write_bytes(flipped)
    with pytest.raises(InputError, match="damaged"):
        load_backbone(str(tmp_path / "flip.pt"))


@pytest.mark.parametrize("quick", [True, False])
def test_open_clip_file(tmp_path: Path, quick: bool) -> None:
    open_clip = pytest.importorskip("open_clip")
    model = open_clip.CLIP(
        embed_dim=EMBED,
        vision_cfg={
            "image_size": SIZE, "layers": DEPTH, "width": WIDTH, "patch_size": PATCH,
            "head_width": 32,
        },
        text_cfg={"context_length": 8, "vocab_size": 50, "width": 64, "heads": 1, "layers": 1},
        quick_gelu=quick,
    )  # fmt: skip
    randomise(model)
    model.visual.output_tokens = True
    with torch.no_grad():
        pooled, patches = model.visual(image())
    settings = {
        "model_cfg": {
            "quick_gelu": quick,
            "vision_cfg": {"image_size": SIZE, "head_width": 32, "width": WIDTH},
        },
        "preprocess_cfg": {"mean": list(CLIP_MEAN), "std": list(CLIP_STD)},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(settings))
    state = {f"module.{k}": v for k, v in model.state_dict().items()}
    saved(tmp_path / "open_clip_pytorch_model.bin", {"epoch": 3, "state_dict": state})
    b = load_backbone(str(tmp_path))
    check_facts(b, "QuickGELU" if quick else "GELU")
    assert b.kwargs["num_heads"] == 2
    torch.testing.assert_close(projected(b)[:, 0], pooled, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tokens(b.model, image())[:, 1:], patches, atol=1e-5, rtol=1e-5)


def test_open_clip_without_config_is_asked_for_its_activation(
    archive: tuple[str, CLIP], tmp_path: Path
) -> None:
    names = ("input_resolution", "context_length", "vocab_size")
    state = {k: v for k, v in archive[1].state_dict().items() if k not in names}
    for name in ("laion2b", "metaclip_400m"):  # a file's name says nothing
        path = saved(tmp_path / f"vit_b_16-{name}.pt", state)
        with pytest.raises(InputError, match=r"GELU or QuickGELU.*open_clip_config"):
            load_backbone(path)
    clip = {"mean": list(CLIP_MEAN), "std": list(CLIP_STD)}
    for name, activation in (("clip_quickgelu", "QuickGELU"), ("clip", "GELU")):
        b = load_backbone(path, facts=told(f"vit_base_patch16_{name}_224", **clip))
        check_facts(b, activation)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("whole", [False, True])
def test_hf_clip(tmp_path: Path, act: str, whole: bool) -> None:
    transformers = pytest.importorskip("transformers")
    vision = {
        "hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 2,
        "intermediate_size": 2 * WIDTH, "image_size": SIZE, "patch_size": PATCH,
        "projection_dim": EMBED, "hidden_act": act,
    }  # fmt: skip
    if whole:
        text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
        text |= {"intermediate_size": 32, "vocab_size": 9, "max_position_embeddings": 5}
        model = transformers.CLIPModel(
            transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=EMBED)
        )
    else:
        model = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**vision))
    randomise(model)
    model.save_pretrained(tmp_path)
    b = load_backbone(str(tmp_path))
    check_facts(b, "QuickGELU" if act == "quick_gelu" else "GELU")
    with torch.no_grad():
        out = model.vision_model(pixel_values=image())
        expected = model.visual_projection(model.vision_model.post_layernorm(out.last_hidden_state))
    torch.testing.assert_close(projected(b), expected, atol=1e-5, rtol=1e-5)
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json"):
        load_backbone(str(tmp_path))


def test_projection_survives_our_own_file_and_a_bare_timm(
    archive: tuple[str, CLIP], tmp_path: Path
) -> None:
    b = load_backbone(archive[0])
    path = tmp_path / "clip.safetensors"
    digest = save_backbone(
        path, b.model, architecture=b.architecture, kwargs=b.kwargs, mean=b.mean, std=b.std,
        img_size=b.img_size, licence=b.licence, source=b.source, proj=b.proj,
    )  # fmt: skip
    again = load_backbone(str(path))
    assert digest == b.digest == again.digest
    check_facts(again, "QuickGELU")
    bare = timm.create_model(
        b.architecture, num_classes=EMBED, checkpoint_path=str(path), **b.kwargs
    ).eval()
    with torch.no_grad():
        torch.testing.assert_close(bare(image()), projected(b)[:, 0])
    # the same tensors without our header: nothing says which activation, so they are refused
    torch.save(bare.state_dict(), tmp_path / "bare.pth")
    with pytest.raises(InputError, match="GELU or QuickGELU"):
        load_backbone(str(tmp_path / "bare.pth"))


def test_timm_names_with_the_wrong_activation_are_refused() -> None:
    right = "vit_base_patch16_clip_quickgelu_224.openai"
    with pytest.raises(InputError, match=right):
        load_backbone("vit_base_patch16_clip_224.openai")
    assert quickgelu_name("vit_base_patch16_clip_224.laion2b") is None
    assert quickgelu_name(right) is None
    assert quickgelu_name("deit_tiny_patch16_224") is None


def test_self_check_of_a_tower_fails_loudly(archive: tuple[str, CLIP]) -> None:
    b = load_backbone(archive[0])
    check_tower(b.model, b.architecture, "x")
    b.model.blocks[1].mlp.act = nn.GELU()
    with pytest.raises(InputError, match="QuickGELU"):
        check_tower(b.model, b.architecture, "x")
    wrong = timm.create_model("vit_base_patch16_224", num_classes=0, **b.kwargs)
    with pytest.raises(InputError, match="eps"):
        check_tower(wrong, "vit_base_patch16_clip_224", "x")
