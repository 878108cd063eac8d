"""Which data sets lie under a folder, told by their public layouts."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from cmt_mae.core.errors import InputError
from cmt_mae.data.files import is_litter
from cmt_mae.data.sources import has_splits
from cmt_mae.evaluate.features import open_labelled
from cmt_mae.evaluate.tasks import Layout


@dataclass
class Found:
    """A data set."""

    layout: Layout
    """Its kind."""
    path: Path
    """Its folder."""


def find_data(root: Path, wanted: set[Layout]) -> tuple[list[Found], list[str]]:
    """Data sets at ``root`` or in the folders directly in it, and a line for each folder of no use.

    Raises:
        InputError: ``root`` is no folder.
    """
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; --data-root wants one with data sets in it")
    layout = layout_of(root)
    if layout is not None:
        folders = [root]
    else:
        folders = sorted(p for p in root.iterdir() if p.is_dir() and not is_litter(p.name))
    found, notes = [], []
    for folder in folders:
        layout = layout_of(folder)
        if layout is None:
            notes.append(
                f"{folder}: no train and val split, no annotations/instances_*.json (COCO), no "
                "images/training with annotations/training (ADE20K), no JPEGImages with Annotations "
                "(DAVIS)"
            )
        elif layout not in wanted:
            notes.append(f"{folder}: {layout} data, which no wanted task needs")
        elif layout == "labelled" and (trouble := trouble_of(folder)):
            notes.append(f"{folder}: {trouble}")
        else:
            found.append(Found(layout, folder))
    return found, notes


def layout_of(folder: Path) -> Layout | None:
    """Which public layout a folder has."""
    if any(folder.glob("annotations/instances_*.json")):
        return "coco"
    if (folder / "images/training").is_dir() and (folder / "annotations/training").is_dir():
        return "ade20k"
    if (folder / "JPEGImages").is_dir() and (folder / "Annotations").is_dir():
        return "davis"
    return "labelled" if has_splits(str(folder)) else None


def trouble_of(folder: Path) -> str | None:
    """Why the splits cannot be used, e.g. they have no labels."""
    try:
        open_labelled(str(folder))
    except InputError as error:
        return " ".join(str(error).split()).removeprefix(f"{folder}: ")
    return None


def folder_fingerprint(folder: Path) -> str:
    """sha256 over names and sizes of all files, and over the content of text files (annotations)."""
    digest = hashlib.sha256()
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a loop of links
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        for name in sorted(files):
            path = Path(place) / name
            size = path.stat().st_size if path.exists() else -1
            digest.update(os.fsencode(path.relative_to(folder)) + f"\0{size}\n".encode())
            if path.suffix in (".json", ".txt", ".csv") and path.is_file():
                with open(path, "rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
