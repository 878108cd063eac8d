"""Files that are whole or not there, and folders whose entries are on the disk."""

import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cmt_mae.core.errors import InputError

ASIDE = re.compile(r"\..+\.(\d+)\.tmp")
"""Name of a file being written, with the number of the process that writes it."""
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_PLACE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """An OSError (disk full, read-only, missing) becomes one clear line: InputError about ``path``."""
    try:
        yield
    except OSError as error:
        fix = how_to_fix(error)
        raise InputError(
            f"cannot write {path}: {error.strerror or error}; {fix} or choose another --out, then run the "
            "same command again"
        ) from error


def how_to_fix(error: OSError) -> str:
    """What to do about a place that cannot be written."""
    if error.errno in READ_ONLY:
        return "make it writable"
    if error.errno in FULL:
        return "free space"
    if error.errno in NO_PLACE:
        return "check that its folder can be created"
    return "check the disk"


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """``write`` fills a file aside, which is flushed to disk and renamed to ``path``.

    Raises InputError where the disk is full or the folder cannot be written. What a kill leaves aside is
    taken away by ``sweep``.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            make_folder(path.parent)
            write(aside)
            with open(aside, "rb") as file:
                flush(file.fileno())
            os.replace(aside, path)
            flush_folder(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):  # where the folder itself is the trouble
                aside.unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    """UTF-8, atomically."""
    write_atomically(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Indented JSON, atomically."""
    write_text(path, json.dumps(content, indent=1, sort_keys=False, default=str) + "\n")


def make_folder(folder: Path) -> None:
    """Make it with its parents, each one's entry flushed to disk. Raises OSError."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for one in missing:
        flush_folder(one.parent)


def flush_folder(folder: Path) -> None:
    """Names made, changed and deleted in it so far survive a power cut. Raises OSError."""
    number = os.open(folder, os.O_RDONLY)
    try:
        flush(number)
    finally:
        os.close(number)


def flush(number: int) -> None:
    """An open file's content to the disk, where its file system can do that. Raises OSError."""
    try:
        os.fsync(number)
    except OSError as error:
        # folders of some network file systems, devices
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def sweep(folder: Path) -> None:
    """Delete what killed processes of this machine were writing aside in ``folder``. Raises OSError."""
    for path in folder.glob(".*.tmp"):
        match = ASIDE.fullmatch(path.name)
        if match and (int(match[1]) == os.getpid() or not is_alive(int(match[1]))):
            path.unlink(missing_ok=True)


def is_alive(process: int) -> bool:
    """Whether a process of this machine has this number."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


def same_fingerprint(one: str, other: str) -> bool:
    """Whether two recorded fingerprints can be of the same data: those of older versions (without a dash) know
    names and sizes alone; the first half of a newer one is that older fingerprint."""
    if ("-" in one) != ("-" in other):
        return one[:32] == other[:32]
    return one == other


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
