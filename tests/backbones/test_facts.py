"""What a file does not say is asked for, told where it is from, and never guessed."""

from __future__ import annotations

import hashlib
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from backbone_nets import image, load, same, saved, tiny, tokens, told
from safetensors.torch import save_file

from cmt_mae.backbones import facts as asking
from cmt_mae.backbones import load_backbone
from cmt_mae.backbones.backbone import HALF, IMAGENET_MEAN
from cmt_mae.backbones.save import save_backbone
from cmt_mae.backbones.shapes import fitting, native_grid
from cmt_mae.core.backbone_facts import BackboneFacts, NoFacts
from cmt_mae.core.cli import main
from cmt_mae.core.errors import InputError

NORMAL = {"mean": [0.5] * 3, "std": [0.5] * 3}


def bare(path: Path, name: str, **kwargs: Any) -> tuple[Path, torch.nn.Module]:
    """A file with a timm network's names and nothing else, and the network."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **kwargs).eval()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    return path, model


@pytest.mark.parametrize(
    ("name", "kwargs", "given", "heads"),
    [
        ("test_vit", {}, {}, 2),
        ("test_vit2", {}, {}, 2),
        ("vit_tiny_patch16_224", {}, {}, 3),
        ("vit_tiny_patch16_224", {"img_size": 64}, {"grid": [4, 4]}, 3),
        ("vit_tiny_patch16_224", {"img_size": (32, 128)}, {"grid": [2, 8]}, 3),
        ("vit_tiny_patch16_224", {"in_chans": 4}, {"mean": [0.5] * 4, "std": [0.5] * 4}, 3),
        ("vit_tiny_patch16_224", {"embed_dim": 128, "depth": 2, "num_heads": 8, "img_size": 32},
         {"arch": "vit_tiny_patch16_224", "heads": 8, "grid": [2, 2]}, 8),
        ("vit_pe_core_tiny_patch16_384", {}, {}, 3),
        ("eva02_tiny_patch14_224", {}, {}, 3),
        ("vit_xsmall_patch16_clip_224", {}, {}, 4),
    ],
)  # fmt: skip
def test_a_bare_file_is_the_network_that_wrote_it(
    tmp_path: Path, name: str, kwargs: dict[str, Any], given: dict[str, Any], heads: int
) -> None:
    path, model = bare(tmp_path / "weights.safetensors", name, **kwargs)
    b = load(path, BackboneFacts(**(NORMAL | given)))
    same(b, model, atol=1e-5)
    assert b.facts["heads"] == heads
    for missing in given:  # each of them is needed, and asked for by name
        kept = {k: v for k, v in (NORMAL | given).items() if k != missing}
        kept = {
            k: v
            for k, v in kept.items()
            if missing not in ("mean", "std") or k not in ("mean", "std")
        }
        with pytest.raises(InputError, match=f"--{missing}"):
            load(path, BackboneFacts(**kept))
    assert b.known_from["normalisation"] == "--mean and --std"


@pytest.mark.parametrize("name", ["vit_base_patch16_rpn_224", "vit_giantopt_patch16_siglip_256",
                                  "vit_giant_patch14_reg4_dinov2", "vit_huge_patch14_gap_224"])  # fmt: skip
def test_shapes_of_large_networks_belong_to_one_kind_of_timm(name: str) -> None:
    """Post-norm blocks, 16 heads at width 1536, SwiGLU: what width // 64 and pre-norm would get wrong."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    patch = model.patch_embed.patch_size
    fits = fitting(model.state_dict(), patch)
    assert name in fits
    assert len({repr(asking.behaviour(n)) for n in fits}) == 1
    assert native_grid(fits[0], patch) == model.patch_embed.grid_size


def test_clip_towers_are_asked_for_their_activation(tmp_path: Path) -> None:
    path, model = bare(tmp_path / "b.safetensors", "vit_base_patch32_clip_quickgelu_224", depth=12)
    with pytest.raises(InputError, match=r"GELU or QuickGELU.*add --arch NAME"):
        load(path, BackboneFacts(**NORMAL))  # type: ignore[arg-type]
    b = load(path, BackboneFacts(arch="vit_base_patch32_clip_quickgelu_224"))
    same(b, model, atol=1e-4)
    assert b.facts["activation"] == "QuickGELU"


def test_normalisation_is_not_told_by_a_files_name(tmp_path: Path) -> None:
    for name in ("vit_tiny_patch16_224.augreg_in21k", "deit_tiny_patch16_224", "anything"):
        path, _ = bare(tmp_path / f"{name}.safetensors", "vit_tiny_patch16_224")
        with pytest.raises(
            InputError, match=r"mean and std.*--mean=\[R,G,B\] --std=.*augreg"
        ) as told_off:
            load(path)
        assert "\n" not in str(told_off.value)
    named = load(path, BackboneFacts(arch="vit_tiny_patch16_224.augreg_in21k"))
    assert (named.mean, "augreg_in21k (--arch)" in named.known_from["normalisation"]) == (
        HALF,
        True,
    )
    assert named.licence == "not stated; if these are the published weights: apache-2.0"
    assert load(path, BackboneFacts(arch="deit_tiny_patch16_224")).mean == IMAGENET_MEAN
    with pytest.raises(InputError, match="together"):
        load(path, BackboneFacts(mean=[0.5] * 3))
    with pytest.raises(InputError, match="has no model"):
        load(path, BackboneFacts(arch="vit_tinyy"))
    # several weights of one architecture with different mean and std: its name alone does not say which
    small, _ = bare(tmp_path / "s.safetensors", "vit_small_patch16_224", img_size=32)
    with pytest.raises(InputError, match="mean and std"):
        load(small, BackboneFacts(arch="vit_small_patch16_224", grid=[2, 2]))


def test_published_files_are_known_by_the_hash_in_their_name(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = timm.create_model("deit_tiny_patch16_224").eval()
    path = Path(saved(tmp_path / "x.pth", {"model": model.state_dict()}))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    right = path.rename(tmp_path / f"deit_tiny_patch16_224-{digest}.pth")
    assert load(right).mean == IMAGENET_MEAN
    with pytest.raises(InputError, match="mean and std"):
        load(right.rename(tmp_path / "deit_tiny_patch16_224-00000000.pth"))


def test_the_line_on_stderr_and_what_results_carry(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(tmp_path / "m.pth", tiny(num_classes=0).state_dict())
    b = load(path, told(mean=[0.1, 0.2, 0.3]))
    load(path, told(mean=[0.1, 0.2, 0.3]))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1  # once a process
    assert "1 heads, GELU, eps 1e-06 from --arch vit_base_patch16_224" in lines[0]
    assert "mean 0.1/0.2/0.3, std 0.5/0.5/0.5 from --mean and --std" in lines[0]
    assert json.loads(json.dumps(b.facts)) == b.facts == {
        "mean": [0.1, 0.2, 0.3], "std": [0.5] * 3, "heads": 1, "eps": 1e-6, "activation": "GELU",
    }  # fmt: skip


def test_what_is_given_must_agree_with_what_a_file_says(tmp_path: Path) -> None:
    model = tiny(num_classes=0)
    kwargs = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 64,
        "depth": 2,
        "num_heads": 1,
        "mlp_ratio": 2.0,
    }
    save_backbone(
        tmp_path / "ours.safetensors", model, architecture="vit_base_patch16_224", kwargs=kwargs,
        mean=(0.5,) * 3, std=(0.5,) * 3, img_size=32, licence=None, source="x",
    )  # fmt: skip
    assert load(tmp_path / "ours.safetensors", told()).known_from["network"] == "its header"
    for wrong in ({"heads": 2}, {"mean": [0.1] * 3}, {"grid": [2, 8]}):
        name = next(iter(wrong))
        with pytest.raises(InputError, match=f"--{name} .*its header says"):
            load(tmp_path / "ours.safetensors", told(**wrong))
    with pytest.raises(InputError, match="says"):
        load_backbone("vit_tiny_patch16_224", pretrained=False, facts=BackboneFacts(heads=4))
    with pytest.raises(InputError, match="another number of patches"):
        load(saved(tmp_path / "m.pth", model.state_dict()), told(grid=[3, 4]))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
def test_a_folder_of_timms_hub_says_everything(tmp_path: Path, name: str) -> None:
    sizes: dict[str, Any] = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2}
    path, model = bare(tmp_path / "model.safetensors", name, img_size=32, **sizes)
    with pytest.raises(InputError, match="--arch NAME"):
        load(tmp_path)
    cfg: dict[str, Any] = {"input_size": [3, 32, 32], "license": "mit"}
    config = {"architecture": name, "num_classes": 0, "model_args": sizes, "pretrained_cfg": cfg}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        InputError, match="mean and std"
    ):  # an architecture without a tag does not say them
        load(tmp_path)
    cfg |= {"mean": [0.1] * 3, "std": [0.2] * 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    b = load(tmp_path)
    same(b, model)
    assert (b.mean, b.licence, b.img_size, b.facts["heads"]) == ((0.1,) * 3, "mit", (32, 32), 2)
    assert b.known_from["normalisation"] == "config.json"
    assert tokens(load_backbone(str(tmp_path), img_size=48).model, image(48)).shape[0] == 2
    assert path.is_file()


def test_a_config_of_another_file_in_the_folder_is_not_believed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two networks of equal shapes in one folder of downloads: config.json is about model.safetensors."""
    bare(tmp_path / "model.safetensors", "vit_tiny_patch16_224")
    config = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {"mean": [0.1] * 3, "std": [0.2] * 3}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load(tmp_path).mean == load(tmp_path / "model.safetensors").mean == (0.1,) * 3
    mine, _ = bare(tmp_path / "mine.safetensors", "vit_tiny_patch16_224")
    with pytest.raises(InputError, match="does not say the mean and std"):
        load(mine)
    assert "mine.safetensors: the config.json beside it is not used" in caplog.text
    (tmp_path / "model.safetensors").unlink()
    assert load(mine).mean == (0.1,) * 3


def test_where_no_facts_can_be_given_the_way_out_is_an_export(tmp_path: Path) -> None:
    """explain's teacher, the second backbone of DAVIS and the app have no such settings."""
    path, model = bare(tmp_path / "weights.safetensors", "vit_tiny_patch16_224", img_size=64)
    with pytest.raises(InputError) as refused:
        load_backbone(str(path), facts=NoFacts())
    way = str(refused.value).split("give that: ")[1].split(";")[0]
    assert way.startswith(f"cmt-mae export --backbone {path} --out FOLDER --")
    words = shlex.split(way.replace("FOLDER", str(tmp_path / "said")).replace("[R,G,B]", "[.5,.5,.5]"))
    assert main([word.replace("[ROWS,COLUMNS]", "[4,4]") for word in words[1:]]) == 0
    same(load_backbone(str(tmp_path / "said"), facts=NoFacts()), model, atol=1e-5)
