"""Where images come from: one path, five kinds, one small interface."""

import os
import re
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from cmt_mae.core.errors import InputError
from cmt_mae.data.folder import FolderSource, class_folders
from cmt_mae.data.packed import PackedSource

_ALIASES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "test"),
}
HUB = "hf://"


class Source(Protocol):
    """A map-style set of images: picklable, cheap to fork, in an order that never changes."""

    classes: list[str] | None
    """Class names by label number; None when there are none."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call the image in messages; printable."""
        ...

    def label(self, index: int) -> int | None:
        """Class number, None when the image has no label."""
        ...

    def read(self, index: int) -> bytes | np.ndarray:
        """The encoded file, or pixels (H, W, C) uint8 from a pack. Raises BadImage."""
        ...

    def fingerprint(self) -> str:
        """sha256 over count, names and sizes: same data, same text. Reads no pixels."""
        ...


def open_source(path: str) -> Source:
    """All images of one path: a folder of images, tar shards (a .tar, a folder of them, or a glob /
    {000..009} pattern), parquet files, a data set saved with save_to_disk, hf://owner/name[:split],
    or a folder made by cmt-mae pack. Raises InputError saying what is wrong with it.
    """
    if path.startswith(HUB):
        from cmt_mae.data.tables import open_hub

        return open_hub(path, None)
    root = Path(path).expanduser()
    if not root.exists():
        return _open_pattern(path)
    if root.is_dir():
        return _open_folder(root)
    return _open_files(path, [root])


def open_split(path: str, split: Literal["train", "val"]) -> Source:
    """One split of a data set: PATH/train or PATH/val (also training, valid, validation, test), tar
    or parquet files with such a word in their name, or the split of a Hugging Face data set.

    A path without any split is its own training split. Labels of an image folder's val/ count as
    those of its train/. Raises InputError when the split is missing.
    """
    if path.startswith(HUB):
        from cmt_mae.data.tables import open_hub

        return open_hub(path, _ALIASES[split])
    found = {name: _find_split(path, words) for name, words in _ALIASES.items()}
    here = found[split]
    if isinstance(here, Path):
        train = found["train"]
        if split == "val" and isinstance(train, Path) and _kind(here) == "images":
            return FolderSource(here, classes=_train_classes(train))
        return open_source(str(here))
    if here:
        return _open_files(path, here)
    if (split == "train" and not found["val"]) or not Path(path).expanduser().exists():
        return open_source(path)  # a missing path is named there
    raise InputError(
        f"{path}: no {split} split; it needs a folder {split}/ or shards named *{split}*"
    )


def has_splits(path: str) -> bool:
    """Whether the path holds both a training and a validation split, as `open_split` finds them."""
    return all(_find_split(path, words) for words in _ALIASES.values())


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


def _train_classes(train: Path) -> list[str] | None:
    """Class folders of the training split, None when it is no image folder."""
    return class_folders(train) or None if _kind(train) == "images" else None


def _shards(root: Path) -> list[Path]:
    """Tar files in the folder; else parquet files in it or in its data/ (the hub's layout)."""
    for pattern in ("*.tar", "*.parquet", "data/*.parquet"):
        files = sorted(p for p in root.glob(pattern) if p.is_file() and p.name[0] != ".")
        if files:
            return files
    return []


def _kind(root: Path) -> Literal["packed", "saved", "shards", "images"]:
    if (root / "images.npy").exists():
        return "packed"
    if (root / "state.json").exists() and (root / "dataset_info.json").exists():
        return "saved"
    return "shards" if _shards(root) else "images"


def _open_folder(root: Path) -> Source:
    kind = _kind(root)
    if kind == "packed":
        return PackedSource(root)
    if kind == "saved":
        from cmt_mae.data.tables import open_saved

        return open_saved(root)
    if kind == "shards":
        return _open_files(str(root), _shards(root))
    for word in (*_ALIASES["train"], *_ALIASES["val"]):
        if (root / word).is_dir() and _kind(root / word) != "images":
            raise InputError(f"{root}: holds splits; give {root / word}")
    return FolderSource(root)


def _open_files(path: str, files: list[Path]) -> Source:
    """Tar or parquet files, by their suffix."""
    special = [file for file in files if file.exists() and not file.is_file()]
    if special:  # reading a pipe would wait for ever
        raise InputError(f"{special[0]}: not a regular file; give a folder, .tar or .parquet file")
    name = files[0].name.lower()
    if name.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
        raise InputError(f"{path}: a compressed tar cannot be read at random; unpack it to .tar")
    if name.endswith(".tar"):
        from cmt_mae.data.tar import TarSource

        return TarSource(files)
    if name.endswith(".parquet"):
        from cmt_mae.data.tables import open_parquet

        return open_parquet(files)
    raise InputError(f"{path}: not a folder, .tar or .parquet file; give one of these")


def _open_pattern(path: str) -> Source:
    """A path that does not exist as it stands: a brace or glob pattern of shards, or an error."""
    import glob

    if not set(path) & set("*?[{"):
        raise InputError(f"{path}: no such file or folder; check the path")
    files: list[Path] = []
    for one in expand_braces(os.path.expanduser(path)):
        matches = sorted(glob.glob(one)) if set(one) & set("*?[") else [one]
        files += [Path(match) for match in matches]
    files = list(dict.fromkeys(files))
    if not files:
        raise InputError(f"{path}: no file matches the pattern; check it")
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise InputError(f"{missing[0]}: named by the pattern {path} but no such file")
    return _open_files(path, files)


def expand_braces(text: str) -> list[str]:
    """Shell braces: a{000..002}b -> a000b a001b a002b (zero-padded as written), {x,y} -> x y."""
    match = re.search(r"\{([^{}]*)\}", text)
    if match is None:
        return [text]
    inside = match.group(1)
    span = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if span:
        low, high = int(span[1]), int(span[2])
        if abs(high - low) >= 1_000_000:
            raise InputError(f"{text}: the pattern names over a million files; check it")
        step = 1 if high >= low else -1
        width = max(len(part) for part in span.groups()) if inside[0] == "0" else 1
        choices = [str(i).zfill(width) for i in range(low, high + step, step)]
    elif "," in inside:
        choices = inside.split(",")
    else:
        raise InputError(f"{text}: {{{inside}}} is neither a range a..b nor a list a,b")
    head, tail = text[: match.start()], text[match.end() :]
    return [one for choice in choices for one in expand_braces(head + choice + tail)]
