"""Reading a packed array folder: images.npy (N, S, S, C) uint8, labels.npy, meta.json."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from cmt_mae.data.folder import Names
from cmt_mae.errors import InputError

FORMAT = "cmt-mae pack 1"


def read_meta(root: Path) -> dict[str, Any]:
    """meta.json of a packed folder. Raises InputError when it is missing or not ours."""
    try:
        meta = json.loads((root / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{root}/meta.json: cannot be read ({error}); pack again") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise InputError(f"{root}/meta.json: not written by cmt-mae pack; pack again")
    return meta


class PackedSource:
    """The images of a folder made by `cmt-mae pack`, memory-mapped. read(i): (S, S, C) uint8.

    Raises InputError when arrays and meta.json disagree.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).absolute()
        self._meta = read_meta(self.root)
        names = self._meta.pop("names")
        self._names = Names(names)
        self.classes: list[str] | None = self._meta["classes"]
        self._open()
        size, channels = self._meta["size"], self._meta["channels"]
        wanted = (len(self._names), size, size, channels)
        if self._images.shape != wanted or self._images.dtype != np.uint8:
            raise InputError(
                f"{self.root}/images.npy: holds {self._images.dtype} {self._images.shape} but "
                f"meta.json says uint8 {wanted}; pack again"
            )
        if self._labels.shape != wanted[:1]:
            raise InputError(
                f"{self.root}/labels.npy: {self._labels.shape[0]} labels for "
                f"{wanted[0]} images; pack again"
            )

    def _open(self) -> None:
        try:
            # "c": private pages, so the array counts as writable for torch; the file never changes.
            mapped = np.load(self.root / "images.npy", mmap_mode="c", allow_pickle=False)
            self._labels = np.load(self.root / "labels.npy", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{self.root}: damaged pack ({error}); pack again") from None
        self._images = np.asarray(mapped)  # plain ndarray: indexing a memmap object is slower

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
