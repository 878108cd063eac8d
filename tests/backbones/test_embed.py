"""`embed` against the evaluations' own features and timm; one file a folder, continued after a stop."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

import cmt_mae
from cmt_mae.core.errors import InputError
from cmt_mae.core.lock import only_one
from cmt_mae.data.sources import open_source
from cmt_mae.evaluate.features import extract
from cmt_mae.tools import embed as embedding


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(7):
        size = (80 + 10 * i, 90, 3)
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(path / f"{i}.png")
    (path / "3b.png").write_bytes(b"no image")
    return path


def settings(folder: Path, out: Path, **changes: Any) -> cmt_mae.EmbedConfig:
    known = {"backbone": "embedded", "device": "cpu", "progress": False, "batch_size": 3}
    return cmt_mae.EmbedConfig(images=str(folder), out=str(out), **(known | changes))


def test_features_are_the_evaluations_and_the_transform_makes_their_input(folder: Path) -> None:
    backbone = cmt_mae.load_backbone("embedded")
    paths = sorted(p for p in folder.iterdir() if p.name != "3b.png")
    found = cmt_mae.embed(backbone, paths)
    (folder / "good").mkdir(exist_ok=True)
    photos = [Image.open(p) for p in paths]
    x = torch.stack([backbone.transform(photo) for photo in photos])
    direct = backbone(x)
    again = cmt_mae.embed("embedded", [photos[0], *map(np.asarray, photos[1:])], batch_size=2)
    for one, two, three in zip(found, direct, again, strict=True):
        torch.testing.assert_close(one, two)
        torch.testing.assert_close(one, three)
    tokens = backbone.model.forward_features(x)  # type: ignore[operator]
    torch.testing.assert_close(found.patches, tokens[:, 1:])
    torch.testing.assert_close(found.cls, tokens[:, 0])
    for bad, says in (([], "no images"), ([folder / "3b.png"], r"3b\.png: cannot be read"),
                      ([np.zeros((4, 4))], "uint8"), ([folder / "none.png"], "cannot be read")):  # fmt: skip
        with pytest.raises(InputError, match=says):
            cmt_mae.embed(backbone, bad)
    # timm's own transform for the model differs by Pillow's rounding alone
    theirs = create_transform(**resolve_model_data_config(backbone.model))
    assert (theirs(photos[0]) - x[0]).abs().max() < 0.05


@pytest.mark.parametrize("suffix", ["npz", "csv", "parquet"])
def test_one_file_a_folder_bad_images_named(
    folder: Path, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / f"features.{suffix}"
    told = cmt_mae.embed_images(settings(folder, out))
    assert (told["images"], list(told["bad"])) == (7, ["3b.png"])
    err = capsys.readouterr().err
    assert "left out: 3b.png" in err
    assert "7 images in" in err
    if suffix == "npz":
        stored = np.load(out)
        names, cls, mean = stored["name"].tolist(), stored["cls"], stored["mean"]
        assert json.loads(str(stored["about"]))["facts"]["heads"] > 0
    elif suffix == "csv":
        rows = list(csv.reader(out.open()))
        names = [row[0] for row in rows[1:]]
        numbers = np.array([row[1:] for row in rows[1:]], dtype=np.float32)
        cls, mean = np.split(numbers, 2, axis=1)
        assert rows[0][1] == "cls_0"
    else:
        pq = pytest.importorskip("pyarrow.parquet")
        table = pq.read_table(out)
        names = table["name"].to_pylist()
        cls, mean = (np.array(table[k].to_pylist(), dtype=np.float32) for k in ("cls", "mean"))
    assert names == [f"{i}.png" for i in range(7)]
    wanted = cmt_mae.embed("embedded", [folder / name for name in names])
    np.testing.assert_allclose(cls, wanted.cls, atol=1e-6)  # type: ignore[arg-type]
    np.testing.assert_allclose(mean, wanted.mean, atol=1e-6)
    assert not out.with_name(f"{out.name}.parts").exists()


def test_a_stopped_run_goes_on_and_another_setting_starts_anew(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "KEEP_EVERY", 2)
    whole, out = tmp_path / "whole.npz", tmp_path / "f.npz"
    cmt_mae.embed_images(settings(folder, whole, patches=True))
    real, read = embedding.load_image, []

    def stops(source: Any, index: int, channels: int) -> Any:
        read.append(index)
        if index == 5 and len(read) < 8:
            raise KeyboardInterrupt
        return real(source, index, channels)

    monkeypatch.setattr(embedding, "load_image", stops)
    with pytest.raises(KeyboardInterrupt):
        cmt_mae.embed_images(settings(folder, out, patches=True, workers=1))
    assert not out.exists()
    before = len(read)
    told = cmt_mae.embed_images(settings(folder, out, patches=True, workers=1))
    assert 0 not in read[before:]  # the first images were kept
    assert told["bad"].keys() == {"3b.png"}
    one, two = np.load(whole), np.load(out)
    assert one["patches"].shape == (7, 64, one["cls"].shape[1])
    for name in ("name", "cls", "mean", "patches"):
        np.testing.assert_array_equal(one[name], two[name])


def test_what_is_no_input_of_a_backbone_is_refused_in_one_line() -> None:
    """Deep images would be near black, integers are not normalised: features of neither mean anything."""
    backbone = cmt_mae.load_backbone("embedded")
    deep = np.full((64, 64), 900, np.uint16)
    for image in (deep, Image.fromarray(deep), np.zeros((64, 64, 3)), torch.zeros(3, 64, 64)):
        with pytest.raises(InputError, match="give one of 8 bits"):
            backbone.transform(image)
    plain = np.zeros((64, 64, 3), np.uint8)
    for fine in (plain, Image.fromarray(plain), Image.fromarray(plain).convert("P")):
        assert backbone.transform(fine).shape == (3, 64, 64)
    for images in (plain, torch.zeros(3, 64, 64), torch.zeros(1, 4, 64, 64)):
        with pytest.raises(InputError, match=r"give a tensor \(B, 3, H, W\)"):
            backbone(images)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"torch\.uint8, not normalised"):
        backbone(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


def test_an_image_of_more_than_8_bits_in_memory_is_refused() -> None:
    deep = Image.fromarray(np.full((64, 64), 900, np.uint16))
    with pytest.raises(InputError, match=r"more than 8 bits \(mode I;16\): give its path"):
        cmt_mae.embed("embedded", [deep])


def test_a_second_process_loses_nothing_of_the_first(folder: Path, tmp_path: Path) -> None:
    """When it ended it would take away the parts of the first, whose file would then lack images."""
    config = embedding.EmbedConfig(
        backbone="embedded", images=str(folder), out=str(tmp_path / "f.npz")
    )
    with (
        only_one(tmp_path / "f.npz.parts", "embed.lock"),
        pytest.raises(InputError, match="in use by pid"),
    ):
        embedding.embed_images(config)
    embedding.embed_images(config)
    assert [path.name for path in tmp_path.glob("f.npz*")] == ["f.npz"]


def test_what_cannot_be_written_is_said_first(folder: Path, tmp_path: Path) -> None:
    for changes, says in (
        ({"out": "x.txt"}, "npz"),
        ({"out": "x.csv", "patches": True}, "patches"),
    ):
        config = settings(folder, tmp_path / str(changes["out"]), patches="patches" in changes)
        with pytest.raises(InputError, match=says):
            cmt_mae.embed_images(config)


def test_embed_agrees_with_the_features_of_evaluations(folder: Path, tmp_path: Path) -> None:
    good = tmp_path / "good"
    good.mkdir()
    for path in folder.glob("[0-9].png"):
        (good / path.name).write_bytes(path.read_bytes())
    backbone = cmt_mae.load_backbone("embedded")
    theirs = extract(
        backbone, open_source(str(good)), device=torch.device("cpu"), pools=("cls", "mean")
    )
    ours = cmt_mae.embed(backbone, good)
    torch.testing.assert_close(ours.cls, theirs.pools["cls"])
    torch.testing.assert_close(ours.mean, theirs.pools["mean"])
