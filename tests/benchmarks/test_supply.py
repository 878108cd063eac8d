"""Pins, checksums and licences agree with each other and with what is installed."""

import hashlib
import re
from pathlib import Path

import pytest
import timm
from packaging.requirements import Requirement

from benchmarks import supply
from cmt_mae.backbones.export import ExportConfig, export, licence_lines
from cmt_mae.backbones.licences import NOT_STATED, licence_of, needed_libraries


def test_every_pin_has_a_checksum_and_nothing_else_has() -> None:
    text = re.sub(r"(?m)^#.*\n", "", supply.HASHED.read_text())
    entries = re.findall(r"^(\S+)==(\S+) \\\n    --hash=sha256:([0-9a-f]{64})$", text, re.MULTILINE)
    assert len(entries) == text.count("==") == text.count("sha256:")
    assert {name: version for name, version, _ in entries} == supply.pinned()
    assert len({checksum for *_, checksum in entries}) == len(entries)


def test_what_the_package_needs_is_pinned_within_its_bounds() -> None:
    pins = {supply.canonical(name): version for name, version in supply.pinned().items()}
    text = (supply.REPOSITORY / "pyproject.toml").read_text()
    needed = [
        Requirement(one) for one in re.findall(r'^  "([\w\[\].>=-]+)",?$', text, re.MULTILINE)
    ]
    assert len(needed) > 25
    optional = {"gradio", "wandb"}  # extras that no test runs
    for one in needed:
        if one.name not in optional and supply.canonical(one.name) in pins:
            assert one.specifier.contains(pins[supply.canonical(one.name)]), one
    assert {supply.canonical(name) for name in needed_libraries()} <= pins.keys()
    assert {"setuptools", "hatchling"} <= pins.keys()


def test_the_page_of_licences_is_current() -> None:
    """Every package and teacher; the licence itself where the pinned version is installed."""
    page = supply.LICENCES.read_text()
    rows = {
        row[0]: row[1:] for row in re.findall(r"^\| (\S+) \| (\S+) \| (.+) \|$", page, re.MULTILINE)
    }
    compared = 0
    for name, version in supply.pinned().items():
        assert rows[name][0] == version
        if supply.installed(name) == version:
            assert rows[name][1] == licence_of(name)
            compared += 1
    assert compared > 20
    for name, licence in supply.teachers().items():
        assert f"| {name} |" in page
        if timm.__version__ == supply.pinned()["timm"]:
            assert f"| {name} | {licence} |" in page
    assert set(rows) - {"package", "---"} == set(supply.pinned())


def test_the_inlined_library_is_what_its_note_says() -> None:
    """The checksums of the note, the licence's text beside it, its line on the page."""
    note = supply.ORIGIN.read_text()
    sums = re.findall(r"^([0-9a-f]{64})  (\S+)", note, re.MULTILINE)
    assert [name for _, name in sums] == ["uplot.min.js", "uplot.min.css"]
    for checksum, name in sums:
        content = supply.ORIGIN.with_name(name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == checksum
    version = re.search(r"uPlot ([\d.]+), licence MIT", note)
    assert version
    assert f"(v{version[1]})".encode() in supply.ORIGIN.with_name("uplot.min.js").read_bytes()[:200]
    assert (
        "Permission is hereby granted" in supply.ORIGIN.with_name("uplot.LICENSE.txt").read_text()
    )
    assert supply.inlined() in supply.LICENCES.read_text()


def test_licences_by_the_metadata() -> None:
    """Against what the packages' own files say."""
    assert licence_of("timm") == "Apache-2.0"
    assert "BSD" in licence_of("torch")
    assert licence_of("pillow") == "MIT-CMU"
    assert all(licence_of(name) != NOT_STATED for name in ("numpy", "safetensors", "rich"))
    assert {"torch", "timm", "safetensors"} <= set(needed_libraries())
    assert not {"pytest", "datasets", "wandb"} & set(needed_libraries())


def test_export_prints_the_licences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = export(ExportConfig(backbone="embedded", out=str(tmp_path / "x.safetensors")))
    *facts, first, second, third, fourth = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in facts] in ([], ["embedded"])
    assert first.startswith(f"licence of the weights: {said['licence']} (")
    assert "Imagenette" in first
    assert second.startswith("taught by weights 087d1a23b631, licence of its weights: not stated")
    assert third.startswith("libraries: ")
    assert "timm" in third
    assert said["libraries"] in third
    assert fourth == f"load it with: {said['load']}"


def test_the_teacher_of_a_run_goes_with_its_backbone(tmp_path: Path) -> None:
    from cmt_mae.backbones import load_backbone
    from cmt_mae.backbones.save import save_backbone

    teacher = {
        "name": "some\x1bteacher",
        "licence": "cc-by-nc-4.0",
        "source": "x",
        "digest": "d" * 64,
    }
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **kwargs)
    save_backbone(
        tmp_path / "a.safetensors", model, architecture="vit_tiny_patch16_224", kwargs=kwargs,
        mean=[0.5] * 3, std=[0.5] * 3, img_size=32, licence=None, source="x", extra={"teacher": teacher},
    )  # fmt: skip
    export(
        ExportConfig(backbone=str(tmp_path / "a.safetensors"), out=str(tmp_path / "b.safetensors"))
    )
    twice = load_backbone(str(tmp_path / "b.safetensors"))
    assert twice.teacher["licence"] == "cc-by-nc-4.0"
    line = licence_lines(twice)[1]
    assert (
        line
        == r"taught by some\x1bteacher, licence of its weights: cc-by-nc-4.0; it may bind these too"
    )
