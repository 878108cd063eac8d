"""`cmt-mae pack`: images of any source as one memory-mapped uint8 array, for small sizes."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from cmt_mae.core.errors import InputError
from cmt_mae.data.crops import center_crop
from cmt_mae.data.decode import BadImage
from cmt_mae.data.loader import load_image
from cmt_mae.data.packed import FORMAT, read_meta
from cmt_mae.data.sources import Source, has_splits, open_source, open_split
from cmt_mae.data.workers import TIMEOUT_S, few, iterate

_CHUNK = 32


@dataclass
class PackConfig:
    """Settings of `cmt-mae pack`."""

    data: str
    """Images: folder, tar shards, parquet files or Hugging Face data set."""
    out: str
    """Folder to make; with train/ and val/ inside when the data have them."""
    size: int = 128
    """Side of the packed square images in pixels."""
    channels: int = 3
    """Channels of the packed images."""
    workers: int = 2
    """Processes that decode."""
    timeout_s: float = TIMEOUT_S
    """A loader process that gives no answer for so many seconds counts as hung; 0: wait for ever."""


def pack(config: PackConfig) -> dict[str, Any]:
    """Centre-crop the shorter side of every image, resize to size x size (bicubic, antialiased) and
    write images.npy (N, S, S, C) uint8, labels.npy (N,) int64 (-1: none) and meta.json.

    A folder appears whole or not at all. Broken images are left out, counted and named. Packing the
    same data into the same folder again does nothing. Returns, by split ("train" and "val", or
    "all"), path, count, bad (name, reason) and whether it was there already. Raises InputError:
    bad data, an out folder that holds something else, a disk that is full.
    """
    if config.size < 1 or config.channels < 1:
        raise InputError(
            f"pack: size {config.size} and channels {config.channels} must be positive"
        )
    out = Path(config.out).expanduser().absolute()
    splits: dict[str, tuple[Source, Path]] = {}
    if has_splits(config.data):
        splits["train"] = (open_split(config.data, "train"), out / "train")
        splits["val"] = (open_split(config.data, "val"), out / "val")
    else:
        splits["all"] = (open_source(config.data), out)
    prints = {name: source.fingerprint() for name, (source, _) in splits.items()}
    # Every refusal before any work.
    present = {name: _present(target, prints[name], config) for name, (_, target) in splits.items()}
    result: dict[str, Any] = {}
    for name, (source, target) in splits.items():
        if present[name] is not None:
            result[name] = present[name]
        else:
            result[name] = _pack_one(source, target, prints[name], config)
    return result


def _present(target: Path, fingerprint: str, config: PackConfig) -> dict[str, Any] | None:
    """The result of an equal earlier pack in `target`, None when the place is free."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return None
    if not (target / "images.npy").exists():
        raise InputError(f"{target}: exists and is not a pack; choose another --out")
    meta = read_meta(target)
    same = (meta["source_fingerprint"], meta["size"], meta["channels"])
    if same != (fingerprint, config.size, config.channels):
        raise InputError(
            f"{target}: holds another pack ({meta['count']} images of {meta['source']} at "
            f"{meta['size']} px); choose another --out or remove it"
        )
    return {"path": str(target), "count": meta["count"], "bad": meta["bad"], "existed": True}


class _Squares:
    """Item: for each image of a chunk its packed form, or why there is none."""

    def __init__(self, source: Source, size: int, channels: int) -> None:
        self.source, self.size, self.channels = source, size, channels

    def describe(self, key: range) -> str:
        return few([self.source.name(index) for index in key[:4]])

    def __getitem__(self, chunk: range) -> list[np.ndarray | BadImage] | InputError:
        items: list[np.ndarray | BadImage] = []
        for index in chunk:
            try:
                image = load_image(self.source, index, self.channels)
                items.append(center_crop(image, (self.size, self.size), resize_ratio=1.0))
            except BadImage as error:
                items.append(error)
            except InputError as error:
                return error
        return items


def _squares(source: Source, config: PackConfig) -> Iterator[tuple[int, np.ndarray | BadImage]]:
    """(index, packed image or the reason against it), in order."""
    count = len(source)
    chunks = [range(i, min(i + _CHUNK, count)) for i in range(0, count, _CHUNK)]
    squares = _Squares(source, config.size, config.channels)
    found = iterate(squares, lambda done: chunks[done:], config.workers, timeout_s=config.timeout_s)
    for chunk, items in zip(chunks, found, strict=True):
        yield from zip(chunk, items, strict=True)


def _pack_one(source: Source, target: Path, fingerprint: str, config: PackConfig) -> dict[str, Any]:
    aside = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(aside, ignore_errors=True)  # what a killed pack left
        aside.mkdir(parents=True)
        result = _write(source, aside, fingerprint, config)
        os.replace(aside, target)
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return {"path": str(target), **result, "existed": False}


def _write(source: Source, folder: Path, fingerprint: str, config: PackConfig) -> dict[str, Any]:
    """Write the three files into `folder`, each flushed to the disk."""
    names: list[str] = []
    labels: list[int] = []
    bad: list[tuple[str, str]] = []
    shape = (config.size, config.size, config.channels)
    with open(folder / "images.npy", "wb") as file:
        _header(file, (len(source), *shape))
        start = file.tell()
        items = _squares(source, config)
        for index, item in track(items, f"pack {config.data}", total=len(source)):
            if isinstance(item, BadImage):
                bad.append((source.name(index), str(item)))
                continue
            file.write(np.ascontiguousarray(item).data)
            names.append(source.name(index))
            label = source.label(index)
            labels.append(-1 if label is None else label)
        if not names:
            raise InputError(f"{config.data}: none of {len(source)} images can be read")
        file.seek(0)
        _header(file, (len(names), *shape))
        assert file.tell() == start, "NumPy pads headers so that the count may change"
        file.flush()
        os.fsync(file.fileno())
    with open(folder / "labels.npy", "wb") as file:
        np.save(file, np.array(labels, dtype=np.int64))
        file.flush()
        os.fsync(file.fileno())
    meta = {
        "format": FORMAT,
        "source": config.data,
        "source_fingerprint": fingerprint,
        "count": len(names),
        "size": config.size,
        "channels": config.channels,
        "classes": source.classes,
        "bad": bad,
        "names": names,
    }
    with open(folder / "meta.json", "w", encoding="utf-8") as text:
        json.dump(meta, text)
        text.flush()
        os.fsync(text.fileno())
    return {"count": len(names), "bad": bad}


def _header(file: Any, shape: tuple[int, ...]) -> None:
    fields = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, fields)
