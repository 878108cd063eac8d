"""Files that are whole or not there."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cmt_mae.errors import InputError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """``write`` fills a file aside, which is flushed to disk and renamed to ``path``.

    Raises InputError where the disk is full or the folder cannot be written.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(aside)
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException as error:
        with contextlib.suppress(OSError):  # where the folder itself is the trouble
            aside.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise InputError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another --out, then run "
            "the same command again"
        ) from error


def write_json(path: Path, content: Any) -> None:
    """Indented JSON, atomically."""
    text = json.dumps(content, indent=1, sort_keys=False, default=str) + "\n"
    write_atomically(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
