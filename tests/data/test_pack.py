"""Packing: the round trip, twice, into an occupied place, and damaged packs."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import v2

from cmt_mae.core.errors import InputError
from cmt_mae.data.centre import load_image
from cmt_mae.data.pack import PackConfig, pack
from cmt_mae.data.sources import open_source, open_split


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for split, count in [("train", 5), ("val", 2)]:
        for name in ("ant", "bee"):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                small = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
                Image.fromarray(small).resize((50 + i, 40), 2).save(folder / f"{i}.png")
    return tmp_path / "data"


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def test_round_trip(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = pack(PackConfig(str(data), str(out), size=16, workers=0))
    assert {k: (v["count"], v["existed"]) for k, v in result.items()} == {
        "train": (10, False),
        "val": (4, False),
    }
    transform = v2.Compose(
        [v2.Resize(16, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(16)]
    )
    for split in ("train", "val"):
        source = open_split(str(data), split)  # type: ignore[arg-type]
        packed = open_split(str(out), split)  # type: ignore[arg-type]
        assert len(packed) == len(source)
        assert packed.classes == source.classes == ["ant", "bee"]
        for i in range(len(source)):
            assert (packed.name(i), packed.label(i)) == (source.name(i), source.label(i))
            image = packed.read(i)
            assert isinstance(image, np.ndarray)
            with Image.open(data / split / source.name(i)) as file:
                expected = np.asarray(transform(file)).astype(int)
            assert np.abs(image - expected).max() <= 2
    again = pickle.loads(pickle.dumps(packed))
    assert np.array_equal(again.read(1), packed.read(1))
    assert again.fingerprint() == packed.fingerprint()
    assert not list(tmp_path.glob("out/.*"))


def test_again_is_nothing_and_another_is_refused(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = PackConfig(str(data), str(out), size=16, workers=0)
    pack(config)
    before = content(out)
    assert all(part["existed"] for part in pack(config).values())
    for other in (
        PackConfig(str(data), str(out), size=24, workers=0),
        PackConfig(str(data), str(out), size=16, channels=1, workers=0),
        PackConfig(str(data / "train"), str(out / "train"), size=8, workers=0),
    ):
        with pytest.raises(InputError, match="another pack"):
            pack(other)
    (data / "train" / "ant" / "0.png").unlink()
    with pytest.raises(InputError, match="another pack"):
        pack(config)
    assert content(out) == before


def test_an_occupied_place_is_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match="not a pack"):
        pack(PackConfig(str(data / "val"), str(tmp_path / "out"), size=8))
    with pytest.raises(InputError, match="cannot be written"):
        pack(PackConfig(str(data / "val"), str(tmp_path / "out/thesis.txt/x"), size=8, workers=0))
    (tmp_path / "empty").mkdir()
    result = pack(PackConfig(str(data / "val"), str(tmp_path / "empty"), size=8, workers=0))
    assert result["all"]["count"] == 4


def test_broken_images_are_left_out_and_named(data: Path, tmp_path: Path) -> None:
    (data / "val" / "ant" / "0.png").write_text("a text")
    (data / "val" / "bee" / "1.png").write_bytes(b"")
    out = tmp_path / "out"
    result = pack(PackConfig(str(data / "val"), str(out), size=8, workers=2))["all"]
    assert result["count"] == 2
    assert [name for name, _ in result["bad"]] == ["ant/0.png", "bee/1.png"]
    source = open_source(str(out))
    assert [source.name(i) for i in range(2)] == ["ant/1.png", "bee/0.png"]
    assert [source.label(i) for i in range(2)] == [0, 1]
    assert os.path.getsize(out / "images.npy") == 128 + 2 * 8 * 8 * 3
    for file in (data / "val").rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(InputError, match="none of 4 images"):
        pack(PackConfig(str(data / "val"), str(tmp_path / "none"), size=8, workers=0))
    assert not (tmp_path / "none").exists()


def test_workers_change_nothing(data: Path, tmp_path: Path) -> None:
    for workers in (0, 2):
        pack(PackConfig(str(data / "train"), str(tmp_path / str(workers)), 8, workers=workers))
    for name in ("images.npy", "labels.npy", "meta.json"):
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_what_a_killed_pack_left_is_swept_away(data: Path, tmp_path: Path) -> None:
    left = tmp_path / ".out.partial"
    left.mkdir()
    (left / "images.npy").write_bytes(b"half")
    pack(PackConfig(str(data / "val"), str(tmp_path / "out"), size=8, workers=0))
    assert not left.exists()
    assert len(open_source(str(tmp_path / "out"))) == 4


def test_damaged_packs(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(PackConfig(str(data / "val"), str(out), size=8, workers=0))
    saved = {p: p.read_bytes() for p in out.iterdir()}
    meta = json.loads(saved[out / "meta.json"])

    def with_(**changes: object) -> bytes:
        return json.dumps({**meta, **changes}).encode()

    damages: list[tuple[str, bytes, str]] = [
        ("images.npy", saved[out / "images.npy"][:-1], "pack again"),
        ("images.npy", b"", "pack again"),
        ("labels.npy", saved[out / "labels.npy"][:-8], "pack again"),
        ("meta.json", b"{", "pack again"),
        ("meta.json", b"[]", "pack again"),
        ("meta.json", b"[" * 100_000, "cannot be read"),
        ("meta.json", with_(size=9), "pack again"),
        ("meta.json", with_(names=meta["names"][:3]), "pack again"),
        ("meta.json", with_(names=[1, 2, 3]), "names is missing or no such thing"),
        ("meta.json", with_(names=["\ud800"] * 4), "a name is no text"),
        ("meta.json", with_(size="16"), "size is missing or no such thing"),
        ("meta.json", with_(size=2**70), "size is missing or no such thing"),
        ("meta.json", with_(classes={}), "classes is missing or no such thing"),
        ("meta.json", with_(source_fingerprint=3), "source_fingerprint is missing or no such thing"),
    ]
    for key in ("names", "classes", "size", "count"):
        without = {name: value for name, value in meta.items() if name != key}
        damages.append(("meta.json", json.dumps(without).encode(), f"{key} is missing"))
    for name, damage, words in damages:
        (out / name).write_bytes(damage)
        with pytest.raises(InputError, match=words) as info:
            open_source(str(out))
        assert "\n" not in str(info.value)
        (out / name).write_bytes(saved[out / name])
    (out / "labels.npy").unlink()
    with pytest.raises(InputError, match="pack again"):
        open_source(str(out))


def test_channels_of_a_pack(data: Path, tmp_path: Path) -> None:
    pack(PackConfig(str(data / "val"), str(tmp_path / "grey"), 8, channels=1, workers=0))
    grey = open_source(str(tmp_path / "grey"))
    assert load_image(grey, 0, 1).shape == (8, 8, 1)
    assert np.ptp(load_image(grey, 0, 3), axis=2).max() == 0
    with pytest.raises(InputError, match="--channels 4"):
        load_image(grey, 0, 4)


def test_labels_that_make_no_sense(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(PackConfig(str(data / "train"), str(out), size=8, workers=0))
    path, n = out / "labels.npy", 10
    wrong = [np.full(n, np.nan), np.array(["a"] * n), np.array(5), np.arange(n), np.full(n, -2)]
    for labels in wrong:  # arange: more classes than the names
        np.save(path, labels)
        with pytest.raises(InputError, match=r"labels\.npy"):
            open_source(str(out))
    with open(path, "wb") as file:  # 73 TiB, says the header
        fields = {"descr": "<i8", "fortran_order": False, "shape": (10**13,)}
        np.lib.format.write_array_header_1_0(file, fields)
    with pytest.raises(InputError, match="damaged pack"):
        open_source(str(out))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InputError, match="not a regular file"):
        open_source(str(out))
