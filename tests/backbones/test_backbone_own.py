"""Our own files, run directories, timm names, other image sizes, export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from backbone_nets import (
    SIZE,
    TINY,
    WIDTH,
    headless,
    image,
    saved,
    tiny,
    tokens,
    told,
)
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from timm.layers import resample_abs_pos_embed
from torch import nn

from cmt_mae.backbones import load_backbone
from cmt_mae.backbones.build import resize_positions
from cmt_mae.backbones.export import EXPORT_LOCK, ExportConfig, export
from cmt_mae.backbones.save import same_bytes, save_backbone
from cmt_mae.core.errors import InputError
from cmt_mae.core.lock import only_one

ARCH = "vit_base_patch16_224"


def write(path: Path, model: nn.Module, **changes: Any) -> str:
    options: dict[str, Any] = {
        "architecture": ARCH, "kwargs": dict(TINY), "mean": (0.1, 0.2, 0.3), "std": (1, 2, 3),
        "img_size": SIZE, "licence": "Apache-2.0", "source": "a test", "extra": {"method": "cmt"},
    }  # fmt: skip
    return save_backbone(path, model, **(options | changes))


def test_run_directory_round_trip(tmp_path: Path) -> None:
    student, momentum = tiny(num_classes=0, seed=1), tiny(num_classes=0, seed=2)
    (tmp_path / "config.yaml").write_text("x: 1")
    with pytest.raises(InputError, match=r"no backbone\.safetensors yet"):
        load_backbone(str(tmp_path))
    digest = write(tmp_path / "backbone.safetensors", student)
    write(tmp_path / "backbone_momentum.safetensors", momentum)
    b = load_backbone(str(tmp_path))
    assert torch.equal(tokens(b.model, image()), tokens(student, image()))
    assert b.digest == digest
    assert (b.mean, b.std, b.img_size) == ((0.1, 0.2, 0.3), (1, 2, 3), (SIZE, SIZE))
    assert (b.licence, b.source, b.architecture) == ("Apache-2.0", "a test", ARCH)
    assert not b.model.training
    assert load_backbone(str(tmp_path / "backbone.safetensors")).digest == digest
    m = load_backbone(str(tmp_path), key="momentum")
    assert torch.equal(tokens(m.model, image()), tokens(momentum, image()))
    assert m.digest != digest
    rebuilt = timm.create_model(b.architecture, pretrained=False, num_classes=0, **b.kwargs)
    rebuilt.load_state_dict(b.model.state_dict())
    with safe_open(tmp_path / "backbone.safetensors", "pt") as file:
        assert json.loads(file.metadata()["cmt_mae"])["method"] == "cmt"
    assert not list(tmp_path.glob(".*")), "no half-written file is left"
    with pytest.raises(InputError, match="key 'teacher' is unknown"):
        load_backbone(str(tmp_path), key="teacher")


def test_the_same_weights_are_the_same_file(tmp_path: Path) -> None:
    """safetensors orders metadata at random, anew in every process; the library still reads ours."""
    model = tiny(num_classes=0)
    write(tmp_path / "a.safetensors", model)
    content = (tmp_path / "a.safetensors").read_bytes()
    entries = {"format": "pt", "b": "é \\ ü", "a": "1", "c": "2", "d": "3", "e": "4"}
    state = {"w": torch.arange(5.0), "v": torch.zeros(2, 3)}
    written = {same_bytes(to_safetensors(state, entries)) for _ in range(8)}
    assert len(written) == 1
    assert same_bytes(content) == content
    (tmp_path / "c.safetensors").write_bytes(written.pop())
    with safe_open(tmp_path / "c.safetensors", "pt") as file:
        assert file.metadata() == entries
        assert all(torch.equal(file.get_tensor(name), value) for name, value in state.items())


def test_loading_leaves_the_random_numbers_alone(tmp_path: Path) -> None:
    write(tmp_path / "b.safetensors", tiny(num_classes=0))
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    load_backbone(str(tmp_path / "b.safetensors"))
    assert torch.equal(torch.rand(3), expected)


def test_other_channels_and_patches(tmp_path: Path) -> None:
    model = tiny(num_classes=0, in_chans=5, patch_size=(8, 4), img_size=(32, 48), reg_tokens=2)
    kwargs = TINY | {"in_chans": 5, "patch_size": (8, 4), "reg_tokens": 2}
    write(
        tmp_path / "b.safetensors", model, kwargs=kwargs, img_size=(32, 48), mean=[0.5] * 5,
        std=[0.5] * 5,
    )  # fmt: skip
    b = load_backbone(str(tmp_path / "b.safetensors"), img_size=(16, 48))
    assert b.model.forward_features(torch.randn(1, 5, 16, 48)).shape == (1, 3 + 2 * 12, WIDTH)
    assert (b.prefix_tokens, b.img_size) == (3, (16, 48))


# --- positions of another size -------------------------------------------------------------------


def test_positions_are_resized_as_mae_does() -> None:
    table = torch.randn(1, 1 + 16, WIDTH)
    out = resize_positions(table, (4, 4), (6, 3))
    assert torch.equal(out[:, 0], table[:, 0])
    for channel in (0, 7):  # MAE's own lines (util/pos_embed.py), one channel at a time
        grid = table[0, 1:, channel].reshape(1, 1, 4, 4)
        by_hand = F.interpolate(grid, size=(6, 3), mode="bicubic", align_corners=False)
        torch.testing.assert_close(out[0, 1:, channel], by_hand.flatten())
    torch.testing.assert_close(out, resample_abs_pos_embed(table, [6, 3], [4, 4], antialias=False))
    assert torch.equal(resize_positions(table, (4, 4), (4, 4)), table)


def test_relative_positions_are_resized_about_their_centre(tmp_path: Path) -> None:
    options = {"use_abs_pos_emb": False, "use_rel_pos_bias": True, "global_pool": "token"}
    model = tiny("beit_base_patch16_224", **options)
    with torch.no_grad():
        model.blocks[1].attn.relative_position_bias_table.fill_(3.0)
    path = saved(tmp_path / "beit.pth", {"model": headless(model)})
    wider = load_backbone(
        path, img_size=(48, 56), facts=told("beit_base_patch16_224")
    ).model.state_dict()
    old = model.state_dict()["blocks.0.attn.relative_position_bias_table"]
    new = wider["blocks.0.attn.relative_position_bias_table"]
    assert new.shape == (11 * 13 + 3, 1)
    torch.testing.assert_close(new[(11 * 13) // 2], old[(7 * 7) // 2])  # no displacement
    assert torch.equal(new[-3:], old[-3:])  # the class token's
    assert torch.allclose(wider["blocks.1.attn.relative_position_bias_table"], torch.tensor(3.0))


@pytest.mark.parametrize("size", [30, (32, 20), 0, -8, 1 << 20])
def test_impossible_image_size(tmp_path: Path, size: int | tuple[int, int]) -> None:
    write(tmp_path / "b.safetensors", tiny(num_classes=0))
    with pytest.raises(InputError, match="image size"):
        load_backbone(str(tmp_path / "b.safetensors"), img_size=size)
    with pytest.raises(InputError, match="image size"):
        load_backbone("vit_tiny_patch16_224", pretrained=False, img_size=size)


# --- timm names ----------------------------------------------------------------------------------


def test_fresh_weights_by_timm_name_follow_the_seed() -> None:
    torch.manual_seed(3)
    a = load_backbone("vit_tiny_patch16_224", pretrained=False, img_size=(64, 96))
    torch.manual_seed(3)
    b = load_backbone("timm:vit_tiny_patch16_224", pretrained=False, img_size=(64, 96))
    c = load_backbone("vit_tiny_patch16_224", pretrained=False, img_size=(64, 96))
    assert a.digest == b.digest != c.digest
    assert "random" in a.source
    assert a.licence is None
    assert tokens(a.model, image((64, 96))).shape == (2, 25, 192)


def test_published_weights_from_the_local_cache_without_network(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    file = shared / "teachers" / "deit_tiny_patch16_224.safetensors"
    repo = tmp_path / "models--timm--deit_tiny_patch16_224.fb_in1k"
    (repo / "snapshots" / "abc").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    (repo / "snapshots" / "abc" / "model.safetensors").symlink_to(file)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    b = load_backbone("deit_tiny_patch16_224", img_size=128)
    assert b.digest == load_backbone(str(file), img_size=128).digest
    assert b.source == "timm deit_tiny_patch16_224"
    with pytest.raises(InputError, match="go online once, give a file"):
        load_backbone("vit_small_patch16_224.dino")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("vit_base_patch16_22", "near: vit_base_patch16"),
        ("resnet50", "plain vision transformer"),
        ("deit_tiny_patch16_224.nope", "tag"),
        ("/no/such/file.pth", "no such file"),
        ("timm:", "no such file"),
        ("", "no run directory"),
    ],
)
def test_unknown_names(name: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        load_backbone(name)
    assert "\n" not in str(caught.value)


# --- export --------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    model = tiny(num_classes=0, num_heads=2)
    write(tmp_path / "run" / "backbone.safetensors", model, kwargs=TINY | {"num_heads": 2})
    return tmp_path / "run"


def test_export_to_timm_as_a_folder(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "exported"
    said = export(ExportConfig(backbone=str(run), out=str(out)))
    assert said["load"] in capsys.readouterr().err
    b = load_backbone(str(run))
    theirs = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    assert said["load"] == f"timm.create_model('local-dir:{out}', pretrained=True)"
    assert torch.equal(tokens(theirs, image()), tokens(b.model, image()))
    for model in (theirs, b.model, load_backbone(str(out)).model):  # what is known at home, too
        found = timm.data.resolve_model_data_config(model)
        assert found["input_size"] == (3, SIZE, SIZE)
        assert (tuple(found["mean"]), tuple(found["std"])) == ((0.1, 0.2, 0.3), (1, 2, 3))
        assert (found["crop_pct"], found["interpolation"]) == (0.875, "bicubic")
    assert load_backbone(str(out)).digest == b.digest == said["digest"]
    headed = timm.create_model(
        f"local-dir:{out}", pretrained=True, num_classes=5, img_size=48,
        pretrained_cfg_overlay={"input_size": (3, 48, 48)},
    )  # fmt: skip
    assert headed(image(48)).shape == (2, 5)
    assert timm.data.resolve_model_data_config(headed)["input_size"] == (3, 48, 48)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="folder"):
        export(ExportConfig(backbone=str(run), out=str(tmp_path / "file")))


def test_export_writes_down_what_a_bare_file_does_not_say(tmp_path: Path) -> None:
    path = saved(tmp_path / "bare.pth", tiny(num_classes=0, num_heads=2).state_dict())
    known = {"arch": ARCH, "heads": 2, "grid": [4, 4], "mean": [0.1] * 3, "std": [0.2] * 3}
    export(ExportConfig(backbone=path, out=str(tmp_path / "whole.safetensors"), **known))
    b = load_backbone(str(tmp_path / "whole.safetensors"))  # nothing more is asked
    assert (b.facts["heads"], b.mean, b.std) == (2, (0.1,) * 3, (0.2,) * 3)


@pytest.mark.parametrize("form", ["timm", "hf"])
def test_a_folder_takes_one_export_at_a_time(run: Path, tmp_path: Path, form: Any) -> None:
    config = ExportConfig(backbone=str(run), out=str(tmp_path / "x"), format=form)
    with (
        only_one(tmp_path / "x", EXPORT_LOCK),
        pytest.raises(InputError, match=r"x is in use by pid \d+ .*or choose another --out"),
    ):
        export(config)
    assert list((tmp_path / "x").iterdir()) == []
    export(config)
    assert not (tmp_path / "x" / EXPORT_LOCK).exists()


def test_export_to_one_file_for_timm(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    said = export(ExportConfig(backbone=str(run), out=str(out)))
    b = load_backbone(str(run))
    load_file(out)
    assert (said["licence"], said["digest"]) == ("Apache-2.0", b.digest)
    assert torch.equal(tokens(eval(said["load"]).eval(), image()), tokens(b.model, image()))
    assert load_backbone(str(out)).digest == b.digest


@pytest.mark.parametrize("name", ["x.pth", "x.pt"])
def test_export_to_plain_torch(run: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    said = export(ExportConfig(backbone=str(run), out=str(out), format="torch"))
    bare = timm.create_model(said["architecture"], num_classes=0, **said["kwargs"]).eval()
    bare.load_state_dict(torch.load(out, weights_only=True), strict=True)
    assert torch.equal(tokens(bare, image()), tokens(load_backbone(str(run)).model, image()))
    names: dict[str, Any] = {"timm": timm, "torch": torch}
    exec(said["load"], names)
    assert torch.equal(tokens(names["model"].eval(), image()), tokens(bare, image()))
    with pytest.raises(InputError, match=r"ends in \.pth or \.pt$"):
        export(ExportConfig(backbone=str(run), out=str(tmp_path), format="torch"))


def test_export_to_transformers(run: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "hf"
    said = export(ExportConfig(backbone=str(run), out=str(out), format="hf"))
    assert said["licence"] == "Apache-2.0"
    model, info = transformers.ViTModel.from_pretrained(
        out, add_pooling_layer=False, output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    b = load_backbone(str(run))
    with torch.no_grad():
        features = model.eval()(image()).last_hidden_state
    torch.testing.assert_close(features, tokens(b.model, image()), atol=1e-5, rtol=1e-5)
    processor = transformers.ViTImageProcessor.from_pretrained(out)
    assert tuple(processor.image_mean) == (0.1, 0.2, 0.3)
    assert tuple(processor.image_std) == (1.0, 2.0, 3.0)
    back = load_backbone(str(out))
    assert back.digest == b.digest
    assert (back.mean, back.kwargs["num_heads"]) == (b.mean, 2)


@pytest.mark.parametrize(
    ("architecture", "kwargs", "says"),
    [
        (ARCH, {"class_token": False, "global_pool": "avg", "fc_norm": False}, "class token"),
        (ARCH, {"init_values": 0.1}, "layer scale"),
        (ARCH, {"reg_tokens": 2}, "register"),
        ("vit_base_patch16_clip_quickgelu_224", {}, "norm before the blocks.*activation"),
        ("beit_base_patch16_224", {"global_pool": "token"}, "Beit"),
    ],
)
def test_export_to_transformers_refuses_what_it_cannot_say(
    tmp_path: Path, architecture: str, kwargs: dict[str, Any], says: str
) -> None:
    options = TINY | kwargs
    model = timm.create_model(architecture, num_classes=0, **options)
    write(tmp_path / "b.safetensors", model, architecture=architecture, kwargs=options)
    out = tmp_path / "hf"
    with pytest.raises(InputError, match=says):
        export(ExportConfig(backbone=str(tmp_path / "b.safetensors"), out=str(out), format="hf"))
    assert not out.exists()


def test_a_write_that_fails_leaves_the_old_file(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "folder.safetensors"
    out.mkdir()
    with pytest.raises(InputError, match="ends in"):
        export(ExportConfig(backbone=str(run), out=str(out)))
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot write"):
        write(tmp_path / "file" / "b.safetensors", tiny(num_classes=0))
