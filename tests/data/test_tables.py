"""Parquet and Hugging Face data sets against the `datasets` library."""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cmt_mae.core.errors import InputError
from cmt_mae.data.centre import load_image
from cmt_mae.data.source import BadImage
from cmt_mae.data.sources import has_splits, open_source, open_split

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (7, 5), (value, 2, 3)).save(file, "PNG")
    return file.getvalue()


def make(count: int = 6) -> Any:
    features = datasets.Features(
        {
            "coarse": datasets.ClassLabel(names=["x", "y"]),
            "label": datasets.ClassLabel(names=["a", "b", "c"]),
            "image": datasets.Image(),
            "caption": datasets.Value("string"),
        }
    )
    rows = {
        "coarse": [0] * count,
        "label": [i % 3 for i in range(count)],
        "image": [{"bytes": png(i), "path": f"{i}.png"} for i in range(count)],
        "caption": ["text"] * count,
    }
    return datasets.Dataset.from_dict(rows, features=features)


def check(source: Any, data: Any) -> None:
    assert len(source) == len(data)
    assert source.classes == ["a", "b", "c"]
    for i in range(len(data)):
        row = data[i]
        assert source.label(i) == row["label"]
        assert np.array_equal(load_image(source, i, 3), np.asarray(row["image"].convert("RGB")))


def test_parquet_and_saved_folder(tmp_path: Path) -> None:
    data = make()
    (tmp_path / "p").mkdir()
    data.to_parquet(tmp_path / "p" / "one.parquet")
    data.save_to_disk(tmp_path / "saved")
    prints = set()
    for path in (tmp_path / "p" / "one.parquet", tmp_path / "p", tmp_path / "saved"):
        source = open_source(str(path))
        check(source, data)
        assert source.name(2) == "2.png"
        prints.add(source.fingerprint())
        assert pickle.loads(pickle.dumps(source)).read(1) == source.read(1)
    assert len(prints) == 1


def test_rows_in_another_order(tmp_path: Path) -> None:
    shuffled = make().shuffle(seed=3)
    shuffled.save_to_disk(tmp_path / "s")
    source = open_source(str(tmp_path / "s"))
    check(source, shuffled)
    assert source.fingerprint() != ""


def test_several_files_and_splits(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for i in range(2):
        make(3 + i).to_parquet(tmp_path / "data" / f"train-0000{i}-of-00002.parquet")
    make(2).to_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet")
    assert has_splits(str(tmp_path))
    assert len(open_split(str(tmp_path), "train")) == 7
    assert len(open_split(str(tmp_path), "val")) == 2
    datasets.DatasetDict(train=make(4), test=make(2)).save_to_disk(tmp_path / "dict")
    assert len(open_split(str(tmp_path / "dict"), "train")) == 4
    assert len(open_split(str(tmp_path / "dict"), "val")) == 2
    with pytest.raises(InputError, match="holds splits"):
        open_source(str(tmp_path / "dict"))


def test_plain_parquet_without_features(tmp_path: Path) -> None:
    cells = [{"bytes": png(i), "path": None} for i in range(3)]
    struct = pa.table({"id": [1, 2, 3], "img": cells, "label": pa.array([2, None, 0], pa.int8())})
    pq.write_table(struct, tmp_path / "struct.parquet")
    source = open_source(str(tmp_path / "struct.parquet"))
    assert [source.label(i) for i in range(3)] == [2, None, 0]
    assert source.classes is None
    assert source.read(1) == png(1)
    assert source.name(1) == "row 1"
    binary = pa.table({"mask": [b"-"] * 3, "image": [png(i) for i in range(3)]})
    pq.write_table(binary, tmp_path / "binary.parquet")
    plain = open_source(str(tmp_path / "binary.parquet"))
    assert [plain.read(i) for i in range(3)] == [png(i) for i in range(3)]
    assert plain.label(0) is None
    assert len({plain.fingerprint(), source.fingerprint()}) == 1  # same names, same sizes


def test_empty_cells_and_missing_files(tmp_path: Path) -> None:
    cells = [{"bytes": None, "path": None}, {"bytes": None, "path": "gone.png"}, None]
    table = pa.table({"image": pa.array(cells, pa.struct({"bytes": "binary", "path": "string"}))})
    pq.write_table(table, tmp_path / "a.parquet")
    source = open_source(str(tmp_path / "a.parquet"))
    assert len(source.fingerprint()) == 64
    for i in range(3):
        with pytest.raises(BadImage):
            source.read(i)
        assert source.name(i)


def test_refusals(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [1], "text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="no image column among x, text"):
        open_source(str(tmp_path / "a.parquet"))
    good = tmp_path / "good"
    good.mkdir()
    make().to_parquet(good / "0.parquet")
    whole = (good / "0.parquet").read_bytes()
    (good / "1.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"1\.parquet: broken or not a parquet"):
        open_source(str(good))
    (good / "1.parquet").write_bytes((tmp_path / "a.parquet").read_bytes())
    with pytest.raises(InputError, match=r"1\.parquet: other columns"):
        open_source(str(good))
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "none.parquet")
    with pytest.raises(InputError, match="no rows"):
        open_source(str(tmp_path / "none.parquet"))
    make().save_to_disk(tmp_path / "saved")
    for file in (tmp_path / "saved").glob("*.arrow"):
        file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(InputError, match="cannot be read") as info:
        open_source(str(tmp_path / "saved"))
    assert "\n" not in str(info.value)


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network is cut off: the library's answer stands in for the hub."""

    def load(name: str, split: str | None = None) -> Any:
        if name != "own/flowers":
            raise ConnectionError("no\nnetwork")
        both = datasets.DatasetDict(train=make(5), test=make(3))
        return both if split is None else both[split]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(open_split("hf://own/flowers", "train")) == 5
    assert len(open_split("hf://own/flowers", "val")) == 3
    assert len(open_source("hf://own/flowers:test")) == 3
    with pytest.raises(InputError, match="splits train, test"):
        open_source("hf://own/flowers")
    with pytest.raises(InputError, match="ConnectionError: no network"):
        open_source("hf://own/other")


def test_labels_that_are_no_class_numbers(tmp_path: Path) -> None:
    columns = {"image": [png(1)] * 3, "label": pa.array([2**64 - 1] * 3, pa.uint64())}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="column label holds no class numbers") as info:
        open_source(str(tmp_path / "a.parquet"))
    assert "\n" not in str(info.value)
