"""Reading a packed array folder: images.npy (N, S, S, C) uint8, labels.npy, meta.json."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cmt_mae.core.errors import InputError
from cmt_mae.core.text import one_line
from cmt_mae.data.decode import BadImage
from cmt_mae.data.folder import Names, open_file, read_file

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


class PackedSource:
    """The images of a folder made by `cmt-mae pack`, memory-mapped. read(i): (S, S, C) uint8.

    Raises InputError when arrays and meta.json disagree.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).absolute()
        self._meta = read_meta(self.root)
        names = self._meta.pop("names")
        try:
            self._names = Names(names)
        except UnicodeEncodeError:  # half a character, which JSON can hold
            raise InputError(f"{self.root}/meta.json: a name is no text; pack again") from None
        self.classes: list[str] | None = self._meta["classes"]
        self._open()
        size, channels = self._meta["size"], self._meta["channels"]
        wanted = (len(self._names), size, size, channels)
        if self._images.shape != wanted or self._images.dtype != np.uint8:
            raise InputError(
                f"{self.root}/images.npy: holds {self._images.dtype} {self._images.shape} but "
                f"meta.json says uint8 {wanted}; pack again"
            )
        if self._labels.shape != wanted[:1] or self._labels.dtype != np.int64:
            raise InputError(
                f"{self.root}/labels.npy: holds {self._labels.dtype} {self._labels.shape} for "
                f"{wanted[0]} images; pack again"
            )
        most = len(self.classes) if self.classes is not None else 10**9
        if wanted[0] and not -1 <= self._labels.min() <= self._labels.max() < most:
            raise InputError(f"{self.root}/labels.npy: a label is out of range; pack again")

    def _open(self) -> None:
        try:
            for name in ("images.npy", "labels.npy"):
                open_file(self.root / name).close()  # reading a pipe would wait for ever
            # "c": private pages, so the array counts as writable for torch; the file never changes.
            mapped = np.load(self.root / "images.npy", mmap_mode="c", allow_pickle=False)
            # mapped too: unlike reading, that compares the length with the header's shape first
            labels = np.load(self.root / "labels.npy", mmap_mode="r", allow_pickle=False)
        except Exception as error:  # NumPy raises all kinds for a broken header
            reason = one_line(error)
            raise InputError(f"{self.root}: damaged pack ({reason}); pack again") from None
        self._images = np.asarray(mapped)  # plain ndarray: indexing a memmap object is slower
        self._labels = np.array(labels)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_images"], state["_labels"]  # mapped again where it is unpickled, not copied
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """Name that the image had in the source that was packed."""
        return self._names[index]

    def label(self, index: int) -> int | None:
        """Class number, None when the image has none."""
        label = int(self._labels[index])
        return label if label >= 0 else None

    def read(self, index: int) -> np.ndarray:
        """(S, S, C) uint8, a view of the mapped file."""
        image: np.ndarray = self._images[index]
        return image

    def fingerprint(self) -> str:
        """sha256 over the packed source's fingerprint, count, size and channels."""
        keys = ("source_fingerprint", "count", "size", "channels")
        text = json.dumps([self._meta[key] for key in keys])
        return hashlib.sha256(text.encode()).hexdigest()
