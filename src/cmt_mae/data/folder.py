"""Images as files under a folder."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from cmt_mae.core.errors import InputError
from cmt_mae.data.decode import IMAGE_SUFFIXES
from cmt_mae.data.files import SPLIT_NAMES, is_litter, open_file, read_file
from cmt_mae.data.source import BadImage, Names, Source, shown


def open_folder(root: str | Path, classes: list[str] | None = None) -> Source:
    """Every image under `root`, in sorted order, with labels when the folder is an ImageFolder.

    Labels are given when every image lies in a class folder one level down (root/class/x.jpg) and
    those folders are not named like splits. `classes` fixes the list of class names (so that val/ counts as
    train/ does). Raises InputError: no image, unknown class.
    """
    top = os.path.abspath(root)
    found, left_out = _walk(top)
    if not found:
        raise InputError(
            f"{root}: no image found{left_out_of(0, left_out)} (suffixes {' '.join(sorted(IMAGE_SUFFIXES))}); "
            "give a folder of images, tar or parquet files, or a folder made by cmt-mae pack"
        )
    names = Names(found)
    labels, known = _labels(root, found, classes)
    looked_for = "one folder a class, directly below it, with every image in one"
    return Source(names, Files(top, names), labels, known, left_out, looked_for)


def _labels(
    root: str | Path, found: list[str], classes: list[str] | None
) -> tuple[np.ndarray | None, list[str] | None]:
    """Of an ImageFolder; else None."""
    split_up = [name.split("/") for name in found]
    folders = sorted({parts[0] for parts in split_up})
    if any(len(parts) != 2 for parts in split_up) or SPLIT_NAMES.issuperset(folders):
        return None, None
    present = [shown(name) for name in folders]
    known = classes if classes is not None else present
    unknown = sorted(set(present) - set(known))
    if unknown:
        raise InputError(
            f"{root}: class folder {unknown[0]!r} has no images in the training split; both splits need "
            "the same class names"
        )
    number = {name: i for i, name in enumerate(known)}
    numbers = {name: number[shown(name)] for name in folders}
    return np.array([numbers[parts[0]] for parts in split_up], dtype=np.int64), known


def left_out_of(images: int, left_out: Counter[str]) -> str:
    """ ": 90 of 100 files left out: 90 .heic (...)", empty where there are none."""
    count = left_out.total()
    if not count:
        return ""
    hints = {
        ".heic": "pip install pillow-heif to read them",
        ".heif": "pip install pillow-heif to read them",
        ".jxl": "pip install pillow-jxl-plugin to read them",
        ".dcm": "pip install pydicom to read them",
    }
    kinds = []
    for kind, number in left_out.most_common(4):
        kinds.append(f"{number} {kind}" + (f" ({hints[kind]})" if kind in hints else ""))
    rest = count - sum(number for _, number in left_out.most_common(4))
    kinds += [f"{rest} others"] if rest else []
    return f": {count} of {images + count} files left out: {', '.join(kinds)}"


class Files:
    """Files below a folder, by number (`source.Reader`)."""

    encoded = True

    def __init__(self, root: str, names: Names) -> None:
        self.root, self.names = os.fsencode(root), names

    def path(self, index: int) -> bytes:
        """As the file system has it."""
        return os.path.join(self.root, self.names.raw(index))

    def read(self, index: int) -> bytes:
        """The file's bytes. Raises BadImage when it is gone, unreadable or far too large."""
        return read_file(self.path(index))

    def piece(self, index: int, start: int, length: int) -> bytes:
        """Some of them."""
        try:
            with open_file(self.path(index)) as file:
                return os.pread(file.fileno(), length, start)
        except (BadImage, OSError):
            return b""

    def sizes(self) -> Iterator[int]:
        """Of the files."""
        for index in range(len(self.names)):
            try:
                yield os.stat(self.path(index)).st_size
            except OSError:
                yield -1


def with_content(names: str, files: Sequence[str | Path]) -> str:
    """A fingerprint of ``files`` as `Source.fingerprint` has it. names: sha256 over their names and sizes."""
    listed = Names(str(file) for file in files)
    return f"{names[:32]}-{Source(listed, Files('', listed)).content()[:31]}"


def _walk(root: str) -> tuple[list[str], Counter[str]]:
    """Relative paths of all image files under `root`, sorted, and how many other files there are, by suffix.

    Links are followed, each real folder is visited once, so a loop of links ends.
    """
    found: list[str] = []
    left_out: Counter[str] = Counter()
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
                f"{shown(folder)}: {error.strerror}; change its permissions or remove it"
            ) from None
        folders = []
        for entry in entries:
            if is_litter(entry.name):
                continue
            path = below + "/" + entry.name if below else entry.name
            if _is_folder(entry):
                folders.append(path)
            elif _is_file(entry):
                suffix = os.path.splitext(entry.name)[1].lower()
                if suffix in IMAGE_SUFFIXES:
                    found.append(path)
                else:
                    left_out[shown(suffix)[:16] or "without suffix"] += 1
        pending.extend(reversed(folders))
    return sorted(found), left_out


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
