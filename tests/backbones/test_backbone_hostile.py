"""Damaged and hostile files: one clear line each, nothing is run, nothing else is raised."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_nets import TINY, WIDTH, headless, saved, tiny, told
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from cmt_mae.backbones import load_backbone
from cmt_mae.backbones.save import save_backbone
from cmt_mae.core.backbone_facts import BackboneFacts
from cmt_mae.core.errors import InputError


def refused(path: Path | str, says: str = "", facts: BackboneFacts | None = None) -> str:
    with pytest.raises(InputError, match=says or ".") as caught:
        load_backbone(str(path), facts=facts)
    text = str(caught.value)
    assert "\n" not in text
    assert Path(path).name in text
    assert len(text) < 1000
    return text


def complaint(path: Path) -> str:
    """What is said of a file that may or may not load; any other kind of error fails the test."""
    try:
        load_backbone(str(path), facts=told())
    except InputError as error:
        return str(error)
    return ""


# --- names that do not fit -----------------------------------------------------------------------


def test_missing_and_unexpected_names_are_told(tmp_path: Path) -> None:
    state = headless(tiny())
    lacking = {k: v for k, v in state.items() if k != "blocks.1.attn.proj.bias"}
    refused(saved(tmp_path / "a.pth", lacking), r"1 missing: blocks\.1\.attn\.proj\.bias", told())
    more = state | {"adapter.weight": torch.zeros(2), "adapter.bias": torch.zeros(2)}
    refused(
        saved(tmp_path / "b.pth", more), r"2 unexpected: adapter\.bias, adapter\.weight", told()
    )
    both = lacking | {"adapter.weight": torch.zeros(2)}
    refused(saved(tmp_path / "c.pth", both), r"1 missing: .*1 unexpected: adapter", told())
    wrong = state | {"blocks.1.mlp.fc2.weight": torch.zeros(WIDTH, 7)}
    refused(
        saved(tmp_path / "d.pth", wrong), r"of another shape: blocks\.1\.mlp\.fc2\.weight", told()
    )
    gap = {k: v for k, v in state.items() if not k.startswith("blocks.0.")}
    refused(saved(tmp_path / "e.pth", gap), "blocks are not complete")
    dino = {f"backbone.{k}": v for k, v in state.items()} | {"prototypes.weight": torch.zeros(3)}
    refused(saved(tmp_path / "f.pth", {"teacher": dino}), r"unexpected: prototypes\.weight", told())
    half = {k.replace("attn.qkv", "attention.attention.query"): v for k, v in state.items()}
    hf = {f"vit.{k}".replace("patch_embed.proj", "embeddings.patch_embeddings.projection"): v
          for k, v in half.items()}  # fmt: skip
    refused(saved(tmp_path / "g.pth", hf), r"missing: blocks.*attn\.k\.")


def test_files_that_hold_no_network(tmp_path: Path) -> None:
    refused(saved(tmp_path / "a.pth", {"epoch": 3}), "no weights in it; it holds: epoch")
    refused(saved(tmp_path / "b.pth", [torch.zeros(3)]), "holds a list")
    refused(saved(tmp_path / "c.pth", {"layer1.0.conv1.weight": torch.zeros(3)}), "no patch")
    resnet = {"visual.class_embedding": torch.zeros(4), "visual.layer1.0.x": torch.zeros(3)}
    refused(saved(tmp_path / "d.pth", resnet), "ResNet")
    (tmp_path / "text.pth").write_text("not weights")
    refused(tmp_path / "text.pth", "damaged or no file of weights")
    (tmp_path / "empty.safetensors").touch()
    refused(tmp_path / "empty.safetensors", "empty")
    (tmp_path / "image.jpg").write_bytes(b"\xff\xd8")
    refused(tmp_path / "image.jpg", "no file of weights")
    (tmp_path / "vit.npz").write_bytes(b"x")
    refused(tmp_path / "vit.npz", "npz")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", "no run directory")
    with zipfile.ZipFile(tmp_path / "z.pt", "w") as archive:
        archive.writestr("a/constants.pkl", b"")
    refused(tmp_path / "z.pt", "damaged TorchScript")


# --- code in a pickle ----------------------------------------------------------------------------


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_with_code_is_refused_and_not_run(
    tmp_path: Path, suffix: str, legacy: bool
) -> None:
    bad = tmp_path / "created"
    path = tmp_path / f"model{suffix}"
    tree = {"model": headless(tiny()), "extra": Payload(bad)}
    torch.save(tree, path, _use_new_zipfile_serialization=not legacy)
    refused(path, "refused, it holds more than weights and could run code .*system")
    assert not bad.exists()
    torch.load(path, weights_only=False)  # the payload is real: this is what it would have done
    assert bad.exists()


def test_plain_pickles_with_code_are_not_run(tmp_path: Path) -> None:
    bad = tmp_path / "created"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path = tmp_path / f"p{protocol}.pth"
        path.write_bytes(pickle.dumps(Payload(bad), protocol=protocol))
        refused(path)
        (tmp_path / "model.safetensors").write_bytes(path.read_bytes())
        refused(tmp_path / "model.safetensors", "damaged or no safetensors")
    assert not bad.exists()


def test_a_whole_pickled_module_is_refused(tmp_path: Path) -> None:
    refused(saved(tmp_path / "m.pth", tiny()), "refused, it holds more than weights")


def test_tensors_that_claim_more_than_they_hold(tmp_path: Path) -> None:
    state = headless(tiny())
    state["patch_embed.proj.weight"] = torch.zeros(1).expand(1 << 14, 1 << 8, 1 << 6, 1 << 6)
    refused(saved(tmp_path / "a.pth", state), "claims shape")
    many = {"patch_embed.proj.weight": torch.zeros(4096, 1, 1, 1), "cls_token": torch.zeros(1)}
    many |= {f"blocks.{i}.x": torch.zeros(1) for i in range(200)}
    many |= {"blocks.0.mlp.fc1.weight": torch.zeros(64, 1), "pos_embed": torch.zeros(1, 1, 1)}
    refused(saved(tmp_path / "b.pth", many))


# --- our own header ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kwargs": TINY | {"checkpoint_path": "/etc/passwd"}}, "more than sizes.*checkpoint_path"),
        ({"kwargs": TINY | {"pretrained_cfg": {"file": "/x"}}}, "more than sizes.*pretrained_cfg"),
        ({"kwargs": TINY | {"depth": 10**9}}, "do not fit its tensors"),
        ({"kwargs": TINY | {"embed_dim": 10**6}}, "do not fit its tensors"),
        ({"kwargs": TINY | {"mlp_ratio": 1e300}}, "do not fit its tensors"),
        ({"kwargs": TINY | {"depth": -1}}, "do not fit its tensors"),
        ({"kwargs": TINY | {"num_heads": 0}}, "cannot build"),
        ({"kwargs": TINY | {"num_heads": 7}}, "cannot build"),
        ({"kwargs": TINY | {"depth": 3}}, "missing: blocks.2"),
        ({"kwargs": []}, "header is damaged|missing"),
        ({"img_size": [8000, 8000]}, "do not fit its tensors"),
        ({"img_size": [10**9, 8]}, "image size"),
        ({"img_size": "big"}, "header is damaged"),
        ({"architecture": "hf-hub:some/one"}, "has no model"),
        ({"architecture": "resnet18"}, "plain vision"),
        ({"architecture": None}, "has no model"),
        ({"mean": [0.5]}, "3 channels"),
        ({"mean": ["a", "b", "c"]}, "header is damaged"),
    ],
)
def test_hostile_headers(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    header = {
        "architecture": "vit_tiny_patch16_224", "kwargs": TINY, "mean": [0.5] * 3,
        "std": [0.5] * 3, "img_size": [32, 32], "licence": None, "source": "x",
    }  # fmt: skip
    state = headless(tiny())
    save_file(state, tmp_path / "ok.safetensors", {"cmt_mae": json.dumps(header)})
    assert load_backbone(str(tmp_path / "ok.safetensors")).has_cls
    save_file(state, tmp_path / "bad.safetensors", {"cmt_mae": json.dumps(header | change)})
    refused(tmp_path / "bad.safetensors", says)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "{}", "[" * 100_000])
def test_headers_that_are_no_header(tmp_path: Path, text: str) -> None:
    save_file(headless(tiny()), tmp_path / "bad.safetensors", {"cmt_mae": text})
    refused(tmp_path / "bad.safetensors", "header is damaged")


@pytest.mark.parametrize(
    "config",
    [
        "{", "[1]", '{"architecture": 3}', '{"model_type": "vit", "num_attention_heads": "x"}',
        '{"image_size": {"a": 1}, "num_attention_heads": 0}', '{"layer_norm_eps": "x"}',
        '{"architecture": "vit_tiny_patch16_224", "model_args": {"checkpoint_path": "/x"}}',
        '{"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {"input_size": 3}}',
        '{"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {"mean": "abc"}}',
        '{"hidden_act": ["relu"], "vision_config": 3}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["timm", "vit", "clip"])
def test_hostile_configurations_beside_a_file(tmp_path: Path, config: str, kind: str) -> None:
    state = headless(tiny())
    if kind == "vit":
        state["embeddings.patch_embeddings.projection.weight"] = state["patch_embed.proj.weight"]
    elif kind == "clip":
        state["vision_model.embeddings.class_embedding"] = state["norm.bias"]
    save_file({k: v.clone() for k, v in state.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(config)
    assert "\n" not in complaint(tmp_path)


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    state = headless(tiny())
    state["norm.bias"][3] = float("nan")
    refused(saved(tmp_path / "a.pth", state), r"not finite: norm\.bias", told())


# --- torn and flipped bytes ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """One small file of each kind, as bytes."""
    folder = tmp_path_factory.mktemp("whole")
    model = tiny(num_classes=0, depth=1)
    save_backbone(
        folder / "ours.safetensors", model, architecture="vit_base_patch16_224",
        kwargs=TINY | {"depth": 1}, mean=[0.5] * 3, std=[0.5] * 3, img_size=32, licence=None,
        source="x",
    )  # fmt: skip
    torch.save({"model": model.state_dict()}, folder / "new.pth")
    torch.save(
        {"model": model.state_dict()}, folder / "old.pth", _use_new_zipfile_serialization=False
    )
    (folder / "plain.safetensors").write_bytes(save(headless(model)))
    return {f.name: f.read_bytes() for f in folder.iterdir()}


@pytest.mark.parametrize("name", ["ours.safetensors", "plain.safetensors", "new.pth", "old.pth"])
def test_truncated_at_any_place(tmp_path: Path, whole: dict[str, bytes], name: str) -> None:
    data, path = whole[name], tmp_path / name
    for cut in [1, 5, 8, 9, 100, *range(1000, len(data), len(data) // 12), len(data) - 1]:
        path.write_bytes(data[:cut])
        refused(path, "damaged|no .*file")


def test_one_flipped_bit_of_our_own_weights_is_seen(
    tmp_path: Path, whole: dict[str, bytes]
) -> None:
    data = bytearray(whole["ours.safetensors"])
    data[-1001] ^= 1
    (tmp_path / "ours.safetensors").write_bytes(data)
    refused(tmp_path / "ours.safetensors", "checksum")


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    name=st.sampled_from(["ours.safetensors", "plain.safetensors", "new.pth", "old.pth"]),
    flips=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=8),
    front=st.booleans(),
)
def test_flipped_bytes_load_or_are_refused(
    tmp_path: Path,
    whole: dict[str, bytes],
    name: str,
    flips: list[tuple[float, int]],
    front: bool,
) -> None:
    data = bytearray(whole[name])
    span = 3000 if front else len(data)  # names and shapes stand in front of the numbers
    for place, change in flips:
        data[int(place * (span - 1))] ^= change
    path = tmp_path / name
    path.write_bytes(data)
    assert "\n" not in complaint(path)
