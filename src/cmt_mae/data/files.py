"""Regular files below a data set: opened without hanging, read without filling the memory."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from cmt_mae.data.source import BadImage

# An image file above this is not an image: memory stays bounded whatever lies in the folder.
MAX_BYTES = 2**30
SPLIT_NAMES = frozenset(("train", "training", "val", "valid", "validation", "test"))
_LITTER = frozenset(("__macosx", "@eadir", "lost+found", "thumbs.db", "desktop.ini"))


def is_litter(name: str) -> bool:
    """Whether a file or folder of this name is left out everywhere: hidden ones (.ipynb_checkpoints, the
    ._NAME that a Mac puts beside each file) and what systems and archives leave behind."""
    return (name.startswith(".") and name not in (".", "..")) or name.lower() in _LITTER


def open_file(path: str | bytes | Path) -> BinaryIO:
    """A regular file, open for reading. Raises BadImage: gone, unreadable, a pipe or device."""
    try:
        # O_NONBLOCK: opening a pipe without a writer would wait for ever.
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
