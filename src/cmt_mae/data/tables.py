"""Parquet files and Hugging Face data sets, read through the `datasets` library (extra `hf`)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cmt_mae.core.errors import InputError
from cmt_mae.data.files import read_file
from cmt_mae.data.source import BadImage, Names, Source, shown

_IMAGE_NAMES = ("image", "img", "jpg", "png", "picture")
_LABEL_NAMES = ("label", "labels", "fine_label", "cls", "class", "target")
_ROWS = 1024
MOST_TEXTS = 100
"""Different texts in a label column that are taken for classes even where few rows share them."""


def table_source(data: Any, where: str, classes: list[str] | None = None) -> Source:
    """Rows of a `datasets.Dataset` with an image column, encoded bytes left as they are.

    Image column: an Image feature, else a {bytes, path} struct, else a binary column (a usual name
    first). Label column: a ClassLabel (label or fine_label first), else an integer or text column with a
    usual name; different texts are the classes, sorted, or `classes`. Raises InputError when there is no image
    column, and for a text that is not among `classes`.
    """
    import datasets

    image = _image_column(data.features)
    if image is None:
        raise InputError(
            f"{where}: no image column among {', '.join(data.column_names)}; it needs an Image "
            "feature, a struct {bytes, path} or a binary column"
        )
    if len(data) == 0:
        raise InputError(f"{where}: no rows; give a data set with images")
    label = _label_column(data.features)
    labels = None
    if label is not None:
        feature = data.features[label]
        try:
            if _is_text(feature):
                labels, classes = _numbered(
                    _texts(data, label), classes, f"{where}: column {label}"
                )
            else:
                named = isinstance(feature, datasets.ClassLabel)
                classes = list(feature.names) if named else None
                labels = np.concatenate([_integers(t[label]) for t in _tables(data, label)])
        except InputError:
            raise
        except Exception as error:  # pyarrow has many
            raise InputError(
                f"{where}: column {label} holds no class numbers ({_line(error)})"
            ) from None
    rows = data.select_columns([image])
    if isinstance(data.features[image], datasets.Image):
        rows = rows.cast_column(image, datasets.Image(decode=False))
    looked_for = f"a ClassLabel, or numbers or texts in a column named {', '.join(_LABEL_NAMES)}"
    reader = Rows(rows.with_format(None), image)
    return Source(Names(reader.names()), reader, labels, classes, None, looked_for)


class Rows:
    """Rows of a table with one image column, by number (`source.Reader`)."""

    encoded = True

    def __init__(self, rows: Any, column: str) -> None:
        self._rows, self._column = rows, column

    def read(self, index: int) -> bytes:
        """The encoded image. Raises BadImage for an empty cell or a missing file."""
        cell = self._rows[index][self._column]
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if data is not None:
            return bytes(data)
        path = cell.get("path") if isinstance(cell, dict) else None
        if not path:
            raise BadImage("the row has no image")
        return read_file(str(path).encode("utf-8", "surrogateescape"))

    def piece(self, index: int, start: int, length: int) -> bytes:
        """Some of its bytes."""
        try:
            return self.read(index)[start : start + length]
        except BadImage:
            return b""

    def names(self) -> list[str]:
        """The path that each row carries, or its number."""
        import pyarrow as pa
        import pyarrow.compute as pc

        names: list[str] = []
        for table in _tables(self._rows, self._column):
            column = table[self._column].combine_chunks()
            paths: list[str | None] = [None] * len(column)
            if pa.types.is_struct(column.type) and column.type.get_field_index("path") >= 0:
                paths = pc.struct_field(column, "path").to_pylist()
            names += [path or f"row {len(names) + i}" for i, path in enumerate(paths)]
        return names

    def sizes(self) -> list[int]:
        """Of the encoded images; reads offsets, no pixels."""
        import pyarrow as pa
        import pyarrow.compute as pc

        sizes: list[int] = []
        for table in _tables(self._rows, self._column):
            column = table[self._column].combine_chunks()
            if pa.types.is_struct(column.type):
                column = pc.struct_field(column, "bytes")
            sizes += pc.fill_null(pc.binary_length(column), -1).to_pylist()
        return sizes


def _texts(data: Any, column: str) -> list[str | None]:
    return [text for table in _tables(data, column) for text in table[column].to_pylist()]


def _numbered(
    texts: list[str | None], classes: list[str] | None, where: str
) -> tuple[np.ndarray | None, list[str] | None]:
    """Text labels as numbers, -1 for none, and their names; None for captions, which hardly two rows share."""
    present = sorted({text for text in texts if text is not None})
    if len(present) > max(MOST_TEXTS, len(texts) // 2):
        return None, None
    known = classes if classes is not None else present
    unknown = sorted(set(present) - set(known))
    if unknown:
        raise InputError(f"{where}: class {shown(unknown[0])!r} is not in the training split")
    number = {name: i for i, name in enumerate(known)}
    labels = [-1 if text is None else number[text] for text in texts]
    return np.array(labels, dtype=np.int64), list(known)


def _tables(data: Any, column: str) -> Iterator[Any]:
    """The column as pyarrow tables of some rows each; memory-mapped, not copied."""
    yield from data.select_columns([column]).with_format("arrow").iter(batch_size=_ROWS)


def _integers(column: Any) -> np.ndarray:
    import pyarrow as pa
    import pyarrow.compute as pc

    values: np.ndarray = pc.fill_null(pc.cast(column, pa.int64()), -1).to_numpy()
    return values


def _first(names: list[str], preferred: tuple[str, ...]) -> str | None:
    """The most usual of the names, else the first, None of none."""
    usual = [name for name in preferred if name in names]
    return (usual + names)[0] if names else None


def _image_column(features: Any) -> str | None:
    import datasets

    kinds: tuple[list[str], list[str], list[str]] = ([], [], [])
    for name, feature in features.items():
        if isinstance(feature, datasets.Image):
            kinds[0].append(name)
        elif isinstance(feature, dict) and _is_binary(feature.get("bytes")):
            kinds[1].append(name)
        elif _is_binary(feature):
            kinds[2].append(name)
    return next((_first(names, _IMAGE_NAMES) for names in kinds if names), None)


def _is_binary(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def _label_column(features: Any) -> str | None:
    import datasets

    named = [name for name, f in features.items() if isinstance(f, datasets.ClassLabel)]
    if named:
        return _first(named, _LABEL_NAMES)
    for right in (lambda f: "int" in str(getattr(f, "dtype", "")), _is_text):
        for name in _LABEL_NAMES:
            if name in features and right(features[name]):
                return name
    return None


def _is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


def open_parquet(files: list[Path], classes: list[str] | None = None) -> Source:
    """Parquet files of one schema, as one set of rows in the order given."""
    datasets = _library(str(files[0]))
    import pyarrow.parquet as pq

    first, rows = None, 0
    for file in files:
        try:
            about = pq.read_metadata(file)
            schema = about.schema.to_arrow_schema()
        except Exception as error:  # pyarrow has many
            raise InputError(f"{file}: broken or not a parquet file ({_line(error)})") from None
        rows += about.num_rows
        first = first or schema
        if not schema.equals(first):
            raise InputError(f"{file}: other columns than {files[0]}; give files of one schema")
    if rows == 0:
        raise InputError(f"{files[0]}: no rows; give a data set with images")
    try:
        data = datasets.load_dataset("parquet", data_files=[str(f) for f in files], split="train")
    except Exception as error:
        raise InputError(f"{files[0].parent}: cannot be read ({_line(error)})") from None
    return table_source(data, str(files[0]), classes)


def open_saved(root: Path, classes: list[str] | None = None) -> Source:
    """A folder written by `Dataset.save_to_disk`."""
    datasets = _library(str(root))
    try:
        data = datasets.load_from_disk(str(root))
    except Exception as error:
        raise InputError(f"{root}: cannot be read ({_line(error)}); save it again") from None
    return table_source(data, str(root), classes)


def open_hub(path: str, words: tuple[str, ...] | None, classes: list[str] | None = None) -> Source:
    """hf://owner/name[:split]; `words` are names of the wanted split, tried in order.

    Without both, the data set must have one split only. Never runs a data set's own code.
    """
    datasets = _library(path)
    name, _, split = path.removeprefix("hf://").partition(":")
    try:
        data = datasets.load_dataset(name, split=split or None)
    except Exception as error:
        raise InputError(
            f"{path}: cannot be loaded ({_line(error)}); check name, split and network, or give a "
            "local copy"
        ) from None
    if isinstance(data, dict):
        chosen = [word for word in words or tuple(data) if word in data]
        if not chosen or (words is None and len(chosen) > 1):
            raise InputError(f"{path}: has the splits {', '.join(data)}; add :{next(iter(data))}")
        data = data[chosen[0]]
    return table_source(data, path, classes)


def _library(path: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise InputError(f"{path}: needs the datasets library: pip install datasets") from None
    return datasets


def _line(error: Exception) -> str:
    """The innermost cause on one line."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}"
