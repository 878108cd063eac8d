"""Images as files under a folder, and the compact list of names that the other sources share."""

import hashlib
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from cmt_mae.core.errors import InputError
from cmt_mae.core.text import printable
from cmt_mae.data.decode import IMAGE_SUFFIXES, BadImage

# An image file above this is not an image: memory stays bounded whatever lies in the folder.
MAX_BYTES = 2**30
SPLIT_NAMES = frozenset(("train", "training", "val", "valid", "validation", "test"))


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


def fingerprint_of(names: Names, sizes: Iterable[int]) -> str:
    """sha256 over the count and, image by image, name and size in bytes. Reads no pixels."""
    digest = hashlib.sha256(f"{len(names)}\n".encode())
    for index, size in enumerate(sizes):
        digest.update(names.raw(index) + f"\0{size}\n".encode())
    return digest.hexdigest()


class FolderSource:
    """Every image under `root`, in sorted order, with labels when the folder is an ImageFolder.

    Labels are given when every image lies in a class folder one level down (root/class/x.jpg) and
    those folders are not named like splits; otherwise label(i) is None. `classes` fixes the list of
    class names (so that val/ counts as train/ does). Raises InputError: no image, unknown class.
    """

    def __init__(self, root: str | Path, classes: list[str] | None = None) -> None:
        self.root = os.path.abspath(root)
        found = _walk(self.root)
        if not found:
            raise InputError(
                f"{root}: no image found (suffixes {' '.join(sorted(IMAGE_SUFFIXES))}); give a "
                "folder of images, tar or parquet files, or a folder made by cmt-mae pack"
            )
        self._names = Names(found)
        self.classes: list[str] | None = None
        self._labels = np.full(len(found), -1, dtype=np.int64)
        split_up = [name.split("/") for name in found]
        if all(len(parts) == 2 for parts in split_up):
            present = sorted({parts[0] for parts in split_up})
            if not SPLIT_NAMES.issuperset(present):
                known = classes if classes is not None else present
                unknown = sorted(set(present) - set(known))
                if unknown:
                    raise InputError(
                        f"{root}: class folder {shown(unknown[0])!r} is not in the training split; "
                        "both splits need the same class names"
                    )
                self.classes = [shown(name) for name in known]
                number = {name: i for i, name in enumerate(known)}
                self._labels[:] = [number[parts[0]] for parts in split_up]

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """Path below the root."""
        return self._names[index]

    def label(self, index: int) -> int | None:
        """Class number, None without labels."""
        return int(self._labels[index]) if self.classes is not None else None

    def read(self, index: int) -> bytes:
        """The file's bytes. Raises BadImage when it is gone, unreadable or far too large."""
        return read_file(os.path.join(os.fsencode(self.root), self._names.raw(index)))

    def fingerprint(self) -> str:
        """sha256 over count, names below the root and file sizes (-1 where a file is gone)."""
        root = os.fsencode(self.root)
        paths = (os.path.join(root, self._names.raw(i)) for i in range(len(self)))
        return fingerprint_of(self._names, map(_size, paths))


def open_file(path: str | bytes | Path) -> BinaryIO:
    """A regular file, open for reading. Raises BadImage: gone, unreadable, a pipe or device."""
    try:
        # O_NONBLOCK: opening a pipe that nobody writes to would wait for ever.
        file = os.open(os.fsencode(path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise BadImage("not a regular file")
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise BadImage(getattr(error, "strerror", None) or str(error)) from None
    return open(file, "rb", buffering=2**16)


def read_file(path: str | bytes | Path, limit: int = MAX_BYTES) -> bytes:
    """A whole regular file. Raises BadImage as `open_file`, and where it is larger than `limit` bytes."""
    with open_file(path) as file:
        try:
            if os.fstat(file.fileno()).st_size > limit:
                raise BadImage(f"file larger than {limit / 2**20:g} MiB")
            return file.read()
        except OSError as error:
            raise BadImage(error.strerror or type(error).__name__) from None


def _size(path: bytes) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def class_folders(root: str | Path) -> list[str]:
    """Names of the visible folders directly under `root`, sorted."""
    return sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith("."))


def _walk(root: str) -> list[str]:
    """Relative paths of all image files under `root`, sorted; links are followed, each real folder
    is visited once, so a loop of links ends. Hidden files and folders are left out."""
    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    pending = [""]
    while pending:
        below = pending.pop()
        folder = os.path.join(root, below)
        try:
            about = os.stat(folder)
            if (about.st_dev, about.st_ino) in seen:
                continue
            seen.add((about.st_dev, about.st_ino))
            entries = sorted(os.scandir(folder), key=lambda e: e.name)
        except OSError as error:
            raise InputError(
                f"{shown(folder)}: {error.strerror}; mend its permissions or remove it"
            ) from None
        folders = []
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = below + "/" + entry.name if below else entry.name
            if _is_folder(entry):
                folders.append(path)
            elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES and _is_file(entry):
                found.append(path)
        pending.extend(reversed(folders))
    return sorted(found)


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that points at itself
        return False


def _is_file(entry: "os.DirEntry[str]") -> bool:
    """A file, or a link to nothing (listed, so that it is named as broken). No pipes or devices."""
    try:
        return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:
        return True
