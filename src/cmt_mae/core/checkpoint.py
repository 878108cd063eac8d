"""Checkpoints that are complete or invisible.

``checkpoints/step_00001234.pt`` counts only together with ``step_00001234.sha256``, its checksum. The content is
written aside, then the checksum is on the disk, then the content takes its name: whatever has a name and a
checksum is whole at any moment. While a step is written a second time, the checksum file has two lines, of the
new content and of the old.
"""

import hashlib
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

import torch

from cmt_mae.core.errors import InputError
from cmt_mae.core.files import sha256, write_atomically, write_text, writing
from cmt_mae.core.text import printable

NAME = re.compile(r"step_(\d{8,})\.pt")


class DamagedError(InputError):
    """A checkpoint whose content is not what was written."""


class _Hashed:
    """A file to write to that keeps the checksum of its content, and the disk's error."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.checksum = file, hashlib.sha256()
        self.refusal: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.refusal = error
            raise
        self.checksum.update(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write the state (tensors and plain values only) of ``step``. Raises InputError on a full disk.

    An earlier writing of this step, and every other checkpoint, stays loadable until the new one is whole.
    """

    def fill(aside: Path) -> str:
        with open(aside, "wb") as file:
            hashed = _Hashed(file)
            try:
                torch.save(state, cast(IO[bytes], hashed))  # it has what torch's writer calls
            except RuntimeError as error:  # torch's writer hides a full disk behind one of its own
                raise hashed.refusal or error from error
        return hashed.checksum.hexdigest()

    path = checkpoint_path(folder, step)
    _place(path, fill)
    return path


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return folder / f"step_{step:08d}.pt"


def _place(path: Path, fill: Callable[[Path], str]) -> None:
    """``fill`` makes the content aside and returns its checksum; it is put down before the content is named."""
    sidecar, checksum = path.with_suffix(".sha256"), ""
    with writing(path):
        before = _known(path) if path.exists() and sidecar.exists() else []

    def write(aside: Path) -> None:
        nonlocal checksum
        checksum = fill(aside)
        write_text(sidecar, "\n".join([checksum, *before]))

    write_atomically(path, write)
    if before:
        write_text(sidecar, checksum)


def _known(path: Path) -> list[str]:
    """Checksums that this checkpoint's content may have."""
    return path.with_suffix(".sha256").read_text(encoding="ascii", errors="replace").split()


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first (their checksum file exists; it is verified at loading)."""
    return [p for p in _named(folder) if p.with_suffix(".sha256").exists()]


def bare_checkpoints(folder: Path) -> list[Path]:
    """Those without a checksum file, oldest first."""
    return [p for p in _named(folder) if not p.with_suffix(".sha256").exists()]


def _named(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob("step_*.pt") if NAME.fullmatch(p.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.stem.split("_")[1])


def load_last(folder: Path) -> dict[str, Any] | None:
    """State of the newest whole checkpoint; None where there is none at all.

    A damaged one, or one without its checksum file, is skipped with a warning. Raises InputError where all
    are damaged, as a run would silently begin again, and where one cannot be read for another reason (permission).
    """
    whole = list_checkpoints(folder)
    for path in reversed(bare_checkpoints(folder)):
        if whole and step_of(path) > step_of(whole[-1]):
            print(
                f"warning: {printable(str(path))} has no {path.stem}.sha256 beside it, so it may not be "
                f"whole; falling back to step {step_of(whole[-1])}",
                file=sys.stderr,
            )
    for path in reversed(whole):
        try:
            return load_checkpoint(path)
        except DamagedError as error:
            print(
                f"warning: {printable(str(error))}; falling back to the one before", file=sys.stderr
            )
    if _named(folder):
        raise InputError(
            f"no checkpoint in {folder} is whole with its .sha256 file beside it: bring one back from a copy, or "
            "delete that folder to start over"
        )
    return None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read one checkpoint; never runs code.

    Raises DamagedError where it is not what was written, InputError where it cannot be read otherwise.
    """
    try:
        if sha256(path) not in _known(path):
            raise DamagedError(f"checkpoint {path} is damaged (its checksum differs)")
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except DamagedError:
        raise
    except pickle.UnpicklingError as error:  # what was written, but not by us
        raise InputError(
            f"checkpoint {path} is refused, it holds more than tensors and plain values and could run code: "
            "delete it to go back to the one before"
        ) from error
    except Exception as error:
        # whole, but not permitted, too large for the memory, or no state at all
        said = getattr(error, "strerror", None) or type(error).__name__
        raise InputError(
            f"checkpoint {path} cannot be read ({said}): fix that, or delete it to go back to the one before"
        ) from error
    return state


def forget_after(folder: Path, step: int) -> None:
    """Delete checkpoints after ``step``: damaged ones that a run which goes on from there has skipped.

    Were one of them readable again later, the lines of metrics up to it would be missing.
    """
    for path in list_checkpoints(folder):
        if step_of(path) > step:
            delete(path)


def rotate(folder: Path, keep_last: int, keeps: Callable[[int], bool]) -> None:
    """Delete all but the newest ``keep_last`` checkpoints and the steps that ``keeps``, and lone checksums."""
    for path in list_checkpoints(folder)[:-keep_last]:
        if not keeps(step_of(path)):
            delete(path)
    for sidecar in folder.glob("step_*.sha256"):  # of a kill between checksum and name
        if not sidecar.with_suffix(".pt").exists():
            delete(sidecar.with_suffix(".pt"))


def delete(path: Path) -> None:
    """The checkpoint, then its checksum."""
    with writing(path):
        path.unlink(missing_ok=True)
        path.with_suffix(".sha256").unlink(missing_ok=True)


def mark_best(checkpoint: Path) -> None:
    """``best.pt`` and its checksum become further names of this checkpoint (a hard link, or a copy)."""

    def fill(aside: Path) -> str:
        aside.unlink(missing_ok=True)
        try:
            os.link(checkpoint, aside)
        except OSError:  # the file system has no links
            shutil.copyfile(checkpoint, aside)
        return _known(checkpoint)[0]

    best = checkpoint.with_name("best.pt")
    with writing(best):
        marked = (
            best.exists() and best.samefile(checkpoint) and best.with_suffix(".sha256").exists()
        )
    if not marked:  # between two names of one file a rename would do nothing, and leave both
        _place(best, fill)
