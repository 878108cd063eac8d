"""Reading a packed array folder: images.npy (N, S, S, C) uint8, labels.npy, meta.json."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cmt_mae.core.errors import InputError
from cmt_mae.core.text import one_line
from cmt_mae.data.files import open_file, read_file
from cmt_mae.data.source import BadImage, Names, Source

FORMAT = "cmt-mae pack 1"


def read_meta(root: Path) -> dict[str, Any]:
    """meta.json of a packed folder. Raises InputError when it is missing or not ours."""
    try:
        meta = json.loads(read_file(root / "meta.json"))
    except (BadImage, ValueError, RecursionError) as error:
        raise InputError(f"{root}/meta.json: cannot be read ({error}); pack again") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise InputError(f"{root}/meta.json: not written by cmt-mae pack; pack again")
    for key, right in _FIELDS.items():
        if key not in meta or not right(meta[key]):
            raise InputError(f"{root}/meta.json: {key} is missing or no such thing; pack again")
    return meta


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _whole(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**40


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "names": _names,
    "classes": lambda value: value is None or _names(value),
    "count": _whole,
    "size": _whole,
    "channels": _whole,
    "source": lambda value: isinstance(value, str),
    "source_fingerprint": lambda value: isinstance(value, str),
    "bad": lambda value: isinstance(value, list),
}


def open_packed(root: str | Path) -> Source:
    """The images of a folder made by `cmt-mae pack`, memory-mapped; read(i): (S, S, C) uint8.

    Raises InputError when arrays and meta.json disagree.
    """
    folder = Path(root).absolute()
    meta = read_meta(folder)
    try:
        names = Names(meta.pop("names"))
    except UnicodeEncodeError:  # half a character, which JSON can hold
        raise InputError(f"{folder}/meta.json: a name is no text; pack again") from None
    reader = Mapped(folder, meta)
    wanted = (len(names), meta["size"], meta["size"], meta["channels"])
    if reader.images.shape != wanted or reader.images.dtype != np.uint8:
        raise InputError(
            f"{folder}/images.npy: holds {reader.images.dtype} {reader.images.shape} but "
            f"meta.json says uint8 {wanted}; pack again"
        )
    labels = np.array(_mapped(folder, "labels.npy", "r"))
    if labels.shape != wanted[:1] or labels.dtype != np.int64:
        raise InputError(
            f"{folder}/labels.npy: holds {labels.dtype} {labels.shape} for {wanted[0]} images; pack again"
        )
    most = len(meta["classes"]) if meta["classes"] is not None else 10**9
    if wanted[0] and not -1 <= labels.min() <= labels.max() < most:
        raise InputError(f"{folder}/labels.npy: a label is out of range; pack again")
    return Source(names, reader, labels, meta["classes"], None, "labels in what was packed")


def _mapped(folder: Path, name: str, mode: Literal["r", "c"]) -> np.ndarray:
    try:
        open_file(folder / name).close()  # reading a pipe would wait for ever
        # mapped: unlike reading, that compares the length with the header's shape first
        array: np.ndarray = np.load(folder / name, mmap_mode=mode, allow_pickle=False)
    except Exception as error:  # NumPy raises all kinds for a broken header
        raise InputError(f"{folder}: damaged pack ({one_line(error)}); pack again") from None
    return array


class Mapped:
    """Images of a pack, by number (`source.Reader`)."""

    encoded = False

    def __init__(self, root: Path, meta: dict[str, Any]) -> None:
        self.root, self._meta = root, meta
        self._open()

    def _open(self) -> None:
        # "c": private pages, so the array counts as writable for torch; the file never changes.
        # A plain ndarray: indexing a memmap object is slower.
        self.images = np.asarray(_mapped(self.root, "images.npy", "c"))

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["images"]  # mapped again where it is unpickled, not copied
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def read(self, index: int) -> np.ndarray:
        """(S, S, C) uint8, a view of the mapped file."""
        image: np.ndarray = self.images[index]
        return image

    def piece(self, index: int, start: int, length: int) -> bytes:
        """Some of its pixels."""
        return self.images[index].reshape(-1)[start : start + length].tobytes()

    def sizes(self) -> list[int]:
        """Of the pixels."""
        return [int(np.prod(self.images.shape[1:]))] * len(self.images)

    def names_fingerprint(self) -> str:
        """sha256 over the packed source's fingerprint of names and sizes, count, size and channels."""
        keys = ("source_fingerprint", "count", "size", "channels")
        text = json.dumps([self._meta[key] for key in keys])
        return hashlib.sha256(text.encode()).hexdigest()
