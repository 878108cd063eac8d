"""`cmt-mae pack`: images of any source as one memory-mapped uint8 array, for small sizes."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from rich.progress import track

from cmt_mae.core.errors import InputError
from cmt_mae.core.files import flush_folder
from cmt_mae.core.lock import Lock
from cmt_mae.core.settings import TIMEOUT_S, Amount, Count, CountOrNone, check_fields
from cmt_mae.data.centre import center_crop, load_image
from cmt_mae.data.packed import FORMAT, read_meta
from cmt_mae.data.source import BadImage, Source
from cmt_mae.data.sources import has_splits, open_source, open_split
from cmt_mae.data.steps import few, iterate

_CHUNK = 32
FILES = ("images.npy", "labels.npy", "meta.json")


@dataclass
class PackConfig:
    """Settings of `cmt-mae pack`."""

    data: str
    """Images: folder, tar shards, parquet files or Hugging Face data set."""
    out: str
    """Folder to make; with train/ and val/ inside when the data have them."""
    size: Count = 128
    """Side of the packed square images in pixels."""
    channels: Count = 3
    """Channels of the packed images."""
    range: list[float] = field(default_factory=list)
    """Values of black and white in images of more than 8 bits; empty: measured."""
    workers: CountOrNone = 2
    """Processes that decode."""
    timeout_s: Amount = TIMEOUT_S
    """A loader process that gives no answer for so many seconds counts as hung; 0: wait for ever."""


def pack(config: PackConfig) -> dict[str, Any]:
    """Centre-crop the shorter side of every image, resize to size x size (bicubic, antialiased) and
    write images.npy (N, S, S, C) uint8, labels.npy (N,) int64 (-1: none) and meta.json.

    A folder appears whole or not at all; one process makes it. Broken images are left out, counted and
    named. Packing the same data into the same folder again does nothing. Returns, by split ("train" and "val", or
    "all"), path, count, bad (name, reason) and whether it was there already. Raises InputError:
    bad data, an out folder that holds something else, a disk that is full.
    """
    check_fields(config)
    out = Path(config.out).expanduser().absolute()
    splits: dict[str, tuple[Source, Path]] = {}
    if has_splits(config.data):
        splits["train"] = (open_split(config.data, "train", config.range), out / "train")
        splits["val"] = (open_split(config.data, "val", config.range), out / "val")
    else:
        splits["all"] = (open_source(config.data, config.range), out)
    wanted = {name: _wanted(source, config) for name, (source, _) in splits.items()}
    # Every refusal before any work.
    present = {name: _present(target, wanted[name]) for name, (_, target) in splits.items()}
    return {
        name: present[name] or _pack_one(source, target, wanted[name], config)
        for name, (source, target) in splits.items()
    }


def _wanted(source: Source, config: PackConfig) -> dict[str, Any]:
    """What is to be packed, as meta.json says it."""
    return {
        "source_fingerprint": source.names_fingerprint(),
        "source_content": source.fingerprint(),
        "size": config.size,
        "channels": config.channels,
        "range": None if source.limits is None else list(source.limits),
    }


def _present(target: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The result of an equal earlier pack in `target`, None when the place is free."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return None
    if not (target / "images.npy").exists():
        raise InputError(f"{target}: exists and is not a pack; choose another --out")
    meta = read_meta(target)
    # packs of older versions say nothing of content and range
    if any(meta.get(key, value) != value for key, value in wanted.items()):
        raise InputError(
            f"{target}: holds another pack ({meta['count']} images of {meta['source']} at "
            f"{meta['size']} px); choose another --out or remove it"
        )
    return {"path": str(target), "count": meta["count"], "bad": meta["bad"], "existed": True}


class _Squares:
    """Item: for each image of a chunk its packed form, or why there is none."""

    def __init__(self, source: Source, size: int, channels: int) -> None:
        self.source, self.size, self.channels = source, size, channels

    def names_of(self, key: range) -> str:
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


def _pack_one(
    source: Source, target: Path, wanted: dict[str, Any], config: PackConfig
) -> dict[str, Any]:
    """Make one pack aside and give it its name. The folder aside holds the lock until it has the name."""
    aside = target.with_name(f".{target.name}.partial")
    try:
        aside.mkdir(parents=True, exist_ok=True)
        lock = Lock(aside / "pack.lock")
        lock.take()
        try:
            if (
                there := _present(target, wanted)
            ) is not None:  # made while this one waited its turn
                return there
            for name in FILES:  # what a killed pack left
                (aside / name).unlink(missing_ok=True)
            result = _write(source, aside, wanted, config)
            os.replace(aside, target)
            (target / "pack.lock").unlink()
            flush_folder(target.parent)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)  # its lock still keeps others out
            raise
        finally:
            lock.give_back()
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror or error})") from None
    return {"path": str(target), **result, "existed": False}


def _write(
    source: Source, folder: Path, wanted: dict[str, Any], config: PackConfig
) -> dict[str, Any]:
    """Write the three files into `folder`, each flushed to the disk."""
    names: list[str] = []
    labels: list[int] = []
    bad: list[tuple[str, str]] = []
    shape = (config.size, config.size, config.channels)
    with _flushed(folder / "images.npy") as file:
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
    with _flushed(folder / "labels.npy") as file:
        np.save(file, np.array(labels, dtype=np.int64))
    meta = {
        "format": FORMAT, "source": config.data, **wanted, "count": len(names), "classes": source.classes,
        "bad": bad, "left_out": dict(source.left_out), "names": names,
    }  # fmt: skip
    with _flushed(folder / "meta.json") as file:
        file.write(json.dumps(meta).encode())
    return {"count": len(names), "bad": bad}


@contextmanager
def _flushed(path: Path) -> Iterator[BinaryIO]:
    """A new file whose content is on the disk at the end."""
    with open(path, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _header(file: Any, shape: tuple[int, ...]) -> None:
    fields = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, fields)
