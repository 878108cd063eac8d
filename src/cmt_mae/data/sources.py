"""Where images come from: one path, five kinds, one `Source`."""

import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Literal

from cmt_mae.core.errors import InputError
from cmt_mae.core.text import printable
from cmt_mae.data.files import SPLIT_NAMES, is_litter
from cmt_mae.data.source import Limits, Names, Source, held_out

_ALIASES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "test"),
}
HUB = "hf://"
_reported: set[str] = set()


def open_source(path: str, limits: Sequence[float] = ()) -> Source:
    """All images of one path: a folder of images, tar shards (a .tar, a folder of them, or a glob /
    {000..009} pattern), parquet files, a data set saved with save_to_disk, hf://owner/name[:split],
    or a folder made by cmt-mae pack.

    limits: values of black and white in images of more than 8 bits; empty: measured on some of the images.
    Files that are left out are counted in one line on stderr. Raises InputError saying what is wrong with it.
    """
    return _with_report(path, _limited(path, _open(path), limits))


def open_split(
    path: str,
    split: Literal["train", "val"],
    limits: Sequence[float] = (),
    val_share: float = 0.0,
) -> Source:
    """One split of a data set: PATH/train or PATH/val (also training, valid, validation, test), tar
    or parquet files with such a word in their name, or the split of a Hugging Face data set.

    A path without any split is its own training split; with a val_share above 0, this share of each class (of
    all images where there are none), drawn by seed, is held out as its val. Labels and limits of val are those of
    train. Raises InputError when the split is missing.
    """
    if not 0 <= val_share < 1:
        raise InputError(f"val_share {val_share:g}: give a share of the images below 1, like 0.2")
    words, hub = _ALIASES[split], path.startswith(HUB)
    found = {} if hub else {name: _find_split(path, words) for name, words in _ALIASES.items()}
    if val_share and not hub and not found["val"]:
        return held_out(open_split(path, "train", limits), split, val_share)
    train = None
    if split == "val" and (hub or found["train"]):
        with suppress(InputError) if hub else nullcontext():
            train = open_split(path, "train", limits)
    classes, here = train.classes if train else None, found.get(split)
    if hub:
        source = _open(path, classes, words)
    elif isinstance(here, Path):
        _report_others(here)
        path = str(here)
        source = _open(path, classes)
    elif here:
        from cmt_mae.data.shards import open_files

        source = open_files(path, here, classes)
    elif (split == "train" and not found["val"]) or not Path(path).expanduser().exists():
        return open_source(path, limits)  # a missing path is named there
    else:
        share = ", or add --val_share 0.2 to hold images out" if split == "val" else ""
        raise InputError(
            f"{path}: no {split} split; it needs a folder {split}/ or shards named *{split}*{share}"
        )
    if train is not None:
        source.limits = train.limits
    return _with_report(path, source if train is not None else _limited(path, source, limits))


def has_splits(path: str) -> bool:
    """Whether the path holds both a training and a validation split, as `open_split` finds them."""
    return all(_find_split(path, words) for words in _ALIASES.values())


def _report_others(split: Path) -> None:
    """A line about folders beside a split's: a class may be called train."""
    names = sorted(p.name for p in split.parent.iterdir() if p.is_dir() and not is_litter(p.name))
    others = [name for name in names if name.lower() not in SPLIT_NAMES]
    if others:
        first = ", ".join(map(printable, others[:3])) + (", ..." if len(others) > 3 else "")
        text = f": {split.name}/ alone is read, as its name is that of a split; beside it: {first}"
        _report(f"{split}/", str(split.parent), text)


def report_left_out(path: str, images: int, left_out: Counter[str]) -> None:
    """A line about files that were left out, by suffix, once a path, by the first process."""
    if left_out:
        from cmt_mae.data.folder import left_out_of

        _report(path, path, left_out_of(images, left_out))


def _with_report(path: str, source: Source) -> Source:
    report_left_out(path, len(source), source.left_out)
    return source


def _report(about: str, path: str, text: str) -> None:
    if text and about not in _reported and os.environ.get("RANK", "0") == "0":
        logging.getLogger(__name__).warning("%s%s", path, text)
    _reported.add(about)


def limits_of(where: str, files: Sequence[str | Path]) -> Limits | None:
    """Values of black and white of images that are listed file by file, measured on some, with a line about it."""
    from cmt_mae.data.folder import Files

    listed = Names(str(file) for file in files)
    return _limited(where, Source(listed, Files("", listed)), ()).limits


def _limited(path: str, source: Source, limits: Sequence[float]) -> Source:
    """The source with its limits, given or measured."""
    if limits:
        if len(limits) != 2 or not limits[0] < limits[1]:
            raise InputError(
                f"range {list(limits)}: give the values of black and white, like 0 4095"
            )
        source.limits = (float(limits[0]), float(limits[1]))
        return source
    if source.encoded:
        from cmt_mae.data.decode import measure_limits

        source.limits, text = measure_limits(source)
        _report(f"range of {path}", path, text and f": {text}")
    return source


def _open(
    path: str, classes: list[str] | None = None, words: tuple[str, ...] | None = None
) -> Source:
    """All images of one path. classes: those of the training split. words: names of the wanted split of hf://."""
    if path.startswith(HUB):
        from cmt_mae.data.tables import open_hub

        return open_hub(path, words, classes)
    root = Path(path).expanduser()
    if not root.is_dir():
        from cmt_mae.data.shards import open_files, open_pattern

        return open_files(path, [root], classes) if root.exists() else open_pattern(path)
    kind = _kind(root)
    if kind == "packed":
        from cmt_mae.data.packed import open_packed

        return open_packed(root)
    if kind == "saved":
        from cmt_mae.data.tables import open_saved

        return open_saved(root, classes)
    if kind == "shards":
        from cmt_mae.data.shards import open_files

        return open_files(path, _shards(root), classes)
    for word in (*_ALIASES["train"], *_ALIASES["val"]):
        if (root / word).is_dir() and _kind(root / word) != "images":
            raise InputError(f"{root}: holds splits; give {root / word}")
    from cmt_mae.data.folder import open_folder

    return open_folder(root, classes)


def _find_split(path: str, words: tuple[str, ...]) -> Path | list[Path]:
    """The split's folder, or its shards, or an empty list."""
    root = Path(path).expanduser()
    if not root.is_dir():
        return []
    for word in words:
        if (root / word).is_dir():
            return root / word
    for word in words:
        token = re.compile(rf"(?<![a-z]){word}(?![a-z])", re.IGNORECASE)
        shards = [p for p in _shards(root) if token.search(p.stem)]
        if shards:
            return shards
    return []


def _shards(root: Path) -> list[Path]:
    """Tar files in the folder; else parquet files in it or in its data/ (the hub's layout)."""
    for pattern in ("*.tar", "*.parquet", "data/*.parquet"):
        files = sorted(p for p in root.glob(pattern) if p.is_file() and not is_litter(p.name))
        if files:
            return files
    return []


def _kind(root: Path) -> Literal["packed", "saved", "shards", "images"]:
    if (root / "images.npy").exists():
        return "packed"
    if (root / "state.json").exists() and (root / "dataset_info.json").exists():
        return "saved"
    return "shards" if _shards(root) else "images"
