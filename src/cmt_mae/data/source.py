"""A set of images by number, wherever they lie."""

import copy
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from cmt_mae.core.errors import InputError
from cmt_mae.core.text import printable

SHARE_SEED = 0
"""Of the held-out share: the same images in every command and run."""
SAMPLED = 2000
"""Images whose content counts in a fingerprint, evenly over the set."""
PIECE = 1024
"""Bytes of such an image at its beginning, middle and end each."""
Limits = tuple[float, float]
"""Pixel values that become 0 and 255, for images of more than 8 bits."""
MAX_PIXELS = 178_956_970
"""What Pillow refuses by itself (twice its MAX_IMAGE_PIXELS): one limit, and no global is changed."""


class BadImage(Exception):
    """One image cannot be read; str() is the reason. The run goes on without it."""


class Names:
    """A list of file names in two flat buffers.

    A list of a million str objects would be copied page by page into every forked loader worker as
    soon as reference counts change; two buffers stay shared.
    """

    def __init__(self, names: Iterable[str]) -> None:
        parts = [os.fsencode(name) for name in names]
        self._blob = b"".join(parts)
        self._ends = np.cumsum([len(part) for part in parts], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def raw(self, index: int) -> bytes:
        """The name as the file system has it."""
        start = int(self._ends[index - 1]) if index else 0
        return self._blob[start : int(self._ends[index])]

    def __getitem__(self, index: int) -> str:
        """The name for people, on one line: what is not UTF-8 or cannot be printed is escaped."""
        return shown(self.raw(index))


def shown(name: str | bytes) -> str:
    """A file's name as it can be printed."""
    return printable(os.fsencode(name).decode("utf-8", "backslashreplace"))


class Reader(Protocol):
    """How the images of one kind of place are read; picklable."""

    encoded: bool
    """Whether they are files of some format; False: pixels."""

    def read(self, index: int) -> bytes | np.ndarray:
        """The encoded file, or pixels (H, W, C) uint8 from a pack. Raises BadImage."""
        ...

    def piece(self, index: int, start: int, length: int) -> bytes:
        """Some bytes of it; fewer or none where they cannot be had."""
        ...

    def sizes(self) -> Iterable[int]:
        """Bytes of each image, -1 where it is gone. Reads no pixels."""
        ...


class Source:
    """A map-style set of images: picklable, cheap to fork, in an order that never changes."""

    def __init__(
        self,
        names: Names,
        reader: Reader,
        labels: np.ndarray | None = None,
        classes: Sequence[str] | None = None,
        left_out: Counter[str] | None = None,
        looked_for: str = "",
    ) -> None:
        """labels: int64 (n,), -1: none. left_out: files that are no images, by suffix. looked_for: where
        labels would have been found, for messages."""
        self._names, self._reader = names, reader
        self._labels = np.full(len(names), -1, dtype=np.int64) if labels is None else labels
        self._chosen: np.ndarray | None = None
        self.parent: Source | None = None
        """The set that this one is a part of."""
        self.classes = None if classes is None else list(classes)
        """Class names by label number; None when there are none."""
        self.left_out = left_out if left_out is not None else Counter()
        self.looked_for = looked_for
        self.limits: Limits | None = None
        """Values of black and white in images of more than 8 bits; None: all that the format can hold."""

    @property
    def encoded(self) -> bool:
        """Whether ``read`` gives files; False: pixels."""
        return self._reader.encoded

    def __len__(self) -> int:
        return len(self._names) if self._chosen is None else len(self._chosen)

    def _at(self, index: int) -> int:
        return index if self._chosen is None else int(self._chosen[index])

    def name(self, index: int) -> str:
        """What to call the image in messages; printable."""
        return self._names[self._at(index)]

    def label(self, index: int) -> int | None:
        """Class number, None when the image has no label."""
        label = int(self._labels[self._at(index)])
        return label if label >= 0 else None

    def labels(self) -> np.ndarray:
        """All of them, int64 (n,), -1: none."""
        return self._labels if self._chosen is None else self._labels[self._chosen]

    def read(self, index: int) -> bytes | np.ndarray:
        """The encoded file, or pixels (H, W, C) uint8 from a pack. Raises BadImage."""
        return self._reader.read(self._at(index))

    def subset(self, indexes: Sequence[int] | np.ndarray) -> "Source":
        """Some of the images, as a source of their own with the same classes."""
        part = copy.copy(self)
        part.parent = self
        part._chosen = np.asarray([self._at(int(i)) for i in indexes], dtype=np.int64)
        return part

    def identity(self) -> str:
        """Ten hex digits over the numbers of a subset's images."""
        numbers = np.arange(len(self)) if self._chosen is None else self._chosen
        return hashlib.sha256(numbers.astype("<i8").tobytes()).hexdigest()[:10]

    def fingerprint(self) -> str:
        """Same data, same text: 32 hex digits over count, names and sizes of all images, a dash, 31 over what
        some of them hold (all of small sets)."""
        return f"{self.names_fingerprint()[:32]}-{self.content()[:31]}"

    def names_fingerprint(self) -> str:
        """sha256 over count, names and sizes alone, which older runs recorded."""
        named: Any = getattr(self._reader, "names_fingerprint", None)
        if named is not None:  # of a pack: of what was packed
            whole = str(named())
        else:
            digest = hashlib.sha256(f"{len(self._names)}\n".encode())
            for index, size in enumerate(self._reader.sizes()):
                digest.update(self._names.raw(index) + f"\0{size}\n".encode())
            whole = digest.hexdigest()
        if self._chosen is None:
            return whole
        return hashlib.sha256(f"{whole} {self.identity()}".encode()).hexdigest()

    def content(self) -> str:
        """sha256 over some bytes of some of the images, evenly over the set."""
        digest, sizes = hashlib.sha256(), list(self._reader.sizes())
        for index in even(len(self), SAMPLED):
            size = sizes[self._at(index)]
            for start in dict.fromkeys((0, max(0, size // 2), max(0, size - PIECE))):
                digest.update(self._reader.piece(self._at(index), start, PIECE))
        return digest.hexdigest()


def even(count: int, most: int) -> list[int]:
    """At most so many numbers of 0 .. count - 1, evenly."""
    if not count:
        return []
    numbers: list[int] = np.unique(np.linspace(0, count - 1, min(count, most)).astype(int)).tolist()
    return numbers


def joined_fingerprint(train: Source, val: Source) -> str:
    """Of both splits. Its first half is that of the sha256 over both that older results recorded."""
    parts = (train.fingerprint(), val.fingerprint())
    names = f"{train.names_fingerprint()} {val.names_fingerprint()}"
    content = " ".join(part.partition("-")[2] for part in parts)
    first, second = (hashlib.sha256(text.encode()).hexdigest() for text in (names, content))
    return f"{first[:32]}-{second[:31]}"


def held_out(source: Source, split: Literal["train", "val"], share: float) -> Source:
    """A share of each class (of all images where there are none), drawn by seed: val; or the others: train."""
    labels = source.labels()
    held = np.zeros(len(source), dtype=bool)
    for label in np.unique(labels).tolist():
        members = np.flatnonzero(labels == label)
        order = np.random.default_rng([SHARE_SEED, label + 1]).permutation(members)
        held[order[: max(1, round(share * len(members)))]] = True
    chosen = np.flatnonzero(held if split == "val" else ~held)
    if not len(chosen):
        raise InputError(f"val_share {share:g} leaves no image for {split}")
    return source.subset(chosen)
