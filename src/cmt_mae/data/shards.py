"""Data in tar or parquet files, which a path or a pattern names."""

import glob
import os
import re
from pathlib import Path

from cmt_mae.core.errors import InputError
from cmt_mae.data.source import Source


def open_files(path: str, files: list[Path], classes: list[str] | None = None) -> Source:
    """Tar or parquet files, by their suffix."""
    special = [file for file in files if file.exists() and not file.is_file()]
    if special:  # reading a pipe would wait for ever
        raise InputError(f"{special[0]}: not a regular file; give a folder, .tar or .parquet file")
    name = files[0].name.lower()
    if name.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
        raise InputError(f"{path}: a compressed tar cannot be read at random; unpack it to .tar")
    if name.endswith(".tar"):
        from cmt_mae.data.tar import open_tar

        return open_tar(files)
    if name.endswith(".parquet"):
        from cmt_mae.data.tables import open_parquet

        return open_parquet(files, classes)
    raise InputError(f"{path}: not a folder, .tar or .parquet file; give one of these")


def open_pattern(path: str) -> Source:
    """A path that does not exist as it stands: a brace or glob pattern of shards, or an error."""
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
    return open_files(path, files)


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
