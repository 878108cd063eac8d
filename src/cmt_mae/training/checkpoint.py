"""Checkpoints that are complete or invisible.

``checkpoints/step_00001234.pt`` counts only together with ``step_00001234.sha256``, which is written after
it and holds its checksum. Both are written aside, flushed and renamed.
"""

import os
import re
import sys
from pathlib import Path
from typing import Any

import torch

from cmt_mae.errors import InputError
from cmt_mae.training.files import sha256, write_atomically

NAME = re.compile(r"step_(\d{8})\.pt")


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write the state (tensors and plain values only) of ``step``. Raises InputError on a full disk."""
    path = folder / f"step_{step:08d}.pt"

    def write(aside: Path) -> None:
        path.with_suffix(".sha256").unlink(missing_ok=True)  # of an earlier writing of this step
        try:
            torch.save(state, aside)
        except RuntimeError as error:  # torch's writer reports a full disk this way
            raise OSError(None, str(error).splitlines()[0]) from error

    write_atomically(path, write)
    write_atomically(
        path.with_suffix(".sha256"), lambda aside: aside.write_text(sha256(path)) and None
    )
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first (their checksum file exists; it is verified at loading)."""
    found = [p for p in folder.glob("step_*.pt") if NAME.fullmatch(p.name)]
    return sorted(p for p in found if p.with_suffix(".sha256").exists())


def load_last(folder: Path) -> dict[str, Any] | None:
    """State of the newest whole checkpoint, or None. A damaged one is passed over with a warning."""
    for path in reversed(list_checkpoints(folder)):
        try:
            return load_checkpoint(path)
        except InputError as error:
            print(f"warning: {error}; falling back to the one before", file=sys.stderr)
    return None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read one checkpoint; never runs code. Raises InputError where it is damaged."""
    wanted = path.with_suffix(".sha256")
    if wanted.exists() and wanted.read_text().strip() != sha256(path):
        raise InputError(f"checkpoint {path} is damaged (its checksum differs): delete it")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(
            f"checkpoint {path} cannot be read ({type(error).__name__}): delete it"
        ) from error
    return state


def rotate(folder: Path, keep_last: int, keep: set[int]) -> None:
    """Delete all but the newest ``keep_last`` checkpoints and the steps in ``keep``."""
    for path in list_checkpoints(folder)[:-keep_last]:
        step = int(path.stem.split("_")[1])
        if step not in keep:
            path.with_suffix(".sha256").unlink(missing_ok=True)
            path.unlink(missing_ok=True)


def mark_best(checkpoint: Path) -> None:
    """``best.pt`` and its checksum become further names of this checkpoint (hard links)."""
    for suffix in (".pt", ".sha256"):
        best = checkpoint.with_name(f"best{suffix}")
        aside = checkpoint.with_name(f".best{suffix}.tmp")
        aside.unlink(missing_ok=True)
        os.link(checkpoint.with_suffix(suffix), aside)
        os.replace(aside, best)
