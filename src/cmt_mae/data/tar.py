"""Tar shards in the WebDataset layout, indexed once and then read at random.

A sample is a run of members with one key (the path up to the first dot of the file name, as in
webdataset): key.jpg + key.cls (an integer) or key.json ({"label": 3}). Where a digit stands between the dots, the
names just have dots (IMG_0.1.jpg, 2024.05.01-007.jpg) and end at the last one. Only offsets are kept, so
shuffling and resuming are as exact as over a folder. Nothing is ever unpacked to the disk.
"""

import json
import logging
import os
import re
import tarfile
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cmt_mae.core.errors import InputError
from cmt_mae.core.text import one_line, printable
from cmt_mae.data.decode import IMAGE_SUFFIXES
from cmt_mae.data.files import MAX_BYTES, is_litter
from cmt_mae.data.folder import left_out_of
from cmt_mae.data.source import BadImage, Names, Source

_KEY = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)
_LABEL_BYTES = 2**20  # a label file above this is not a label
_HEADER_BYTES = 2**24  # a long name or a PAX header above this is none; tarfile would read it whole
_LINK = -1  # in place of a size: the member is a link, which is never followed
_LABEL_FIELDS = ("label", "cls", "class", "class_id")

Member = tuple[str, int, int]  # suffix, offset, size


def open_tar(shards: list[Path]) -> Source:
    """All samples with an image in the given shards, in their order.

    A sample with several images gives its first (.npy only when there is no other), the others count as left out.
    There are no class names: shards carry numbers. Raises InputError naming the shard: unreadable, cut,
    garbage in the middle, a .cls that is no integer, no image at all.
    """
    paths = [os.path.abspath(shard) for shard in shards]
    names: list[str] = []
    left_out: Counter[str] = Counter()
    where, offsets, sizes, labels = array("l"), array("q"), array("q"), array("q")
    for number, shard in enumerate(paths):
        short = os.path.basename(shard)
        for key, members, label in _samples(shard):
            images = [m for m in members if _suffix(m) in IMAGE_SUFFIXES]
            images.sort(key=lambda m: _suffix(m) == ".npy")
            left_out.update(f".{m[0]}"[:16] for m in images[1:])
            if not images:
                left_out[_suffix(members[0])[:16]] += 1
                continue
            suffix, offset, size = images[0]
            names.append(f"{short}/{key}.{suffix}")
            where.append(number)
            offsets.append(offset)
            sizes.append(size)
            labels.append(label)
    if not names:
        raise InputError(
            f"{paths[0]} (and {len(paths) - 1} more): no image found{left_out_of(0, left_out)}; shards "
            "need members such as 0001.jpg"
        )
    reader = Members(paths, np.array(where), np.array(offsets), np.array(sizes))
    fields = ", ".join(_LABEL_FIELDS)
    looked_for = f"a number in KEY.cls, or under {fields} in KEY.json, beside KEY.jpg"
    return Source(Names(names), reader, np.array(labels), None, left_out, looked_for)


class Members:
    """Members of tar shards, by number (`source.Reader`)."""

    encoded = True

    def __init__(
        self, shards: list[str], where: np.ndarray, offsets: np.ndarray, sizes: np.ndarray
    ) -> None:
        self._shards, self._where, self._offsets, self._sizes = shards, where, offsets, sizes

    def read(self, index: int) -> bytes:
        """The member's bytes. Raises BadImage when the shard is gone or has changed."""
        size = int(self._sizes[index])
        if size == _LINK:
            raise BadImage("a link to another member, which is not followed; store the file itself")
        if size > MAX_BYTES:
            raise BadImage(f"member larger than {MAX_BYTES >> 20} MiB")
        try:
            data = self._pread(index, 0, size)
        except OSError as error:
            raise BadImage(error.strerror or type(error).__name__) from None
        if len(data) != size:
            raise BadImage("the shard has become shorter")
        return data

    def _pread(self, index: int, start: int, length: int) -> bytes:
        # Opened for each read: no descriptors to keep, to share over forks or to run out of.
        file = os.open(self._shards[self._where[index]], os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.pread(file, length, int(self._offsets[index]) + start)
        finally:
            os.close(file)

    def piece(self, index: int, start: int, length: int) -> bytes:
        """Some of them."""
        try:
            return self._pread(index, start, max(0, min(length, int(self._sizes[index]) - start)))
        except OSError:
            return b""

    def sizes(self) -> list[int]:
        """Of the members."""
        sizes: list[int] = self._sizes.tolist()
        return sizes


def _suffix(member: Member) -> str:
    """ ".jpg" of "jpg", "JPG" or "seg.jpg"."""
    return "." + member[0].rsplit(".", 1)[-1].lower()


def _samples(shard: str) -> Iterator[tuple[str, list[Member], int]]:
    """(key, members, label or -1) for each run of members with one key."""
    with open(shard, "rb") as raw:
        for key, members in _runs(shard):
            parted = _parted(key, members)
            shared = parted.pop(key, [])
            common = _label(shard, raw.fileno(), key, shared)
            if not parted or any(_suffix(m) in IMAGE_SUFFIXES for m in shared):
                yield key, shared, common
            for name, own in parted.items():
                label = _label(shard, raw.fileno(), name, own)
                yield name, own, common if label < 0 else label


def _runs(shard: str) -> Iterator[tuple[str, list[Member]]]:
    """Members next to each other whose names are equal up to the first dot."""
    key = ""
    members: list[Member] = []
    for info in _members(shard):
        match = _KEY.match(info.name)
        if match is None or any(map(is_litter, info.name.split("/"))):
            continue
        if match[1] != key:
            if members:
                yield key, members
            key, members = match[1], []
        size = info.size if info.isreg() else _LINK
        members.append((match[2], info.offset_data, size))
    if members:
        yield key, members


def _parted(key: str, members: list[Member]) -> dict[str, list[Member]]:
    """A run as it is; or, where its names have dots of their own, by what stands before the last one.

    That is so where an image has a digit between the dots: `IMG_1.0.jpg` and `IMG_1.1.jpg` are two pictures (with
    the label in IMG_1.cls, if there is one), `1.left.jpg` and `1.right.jpg` two members of one sample.
    """
    between = [m[0].rpartition(".")[0] for m in members if _suffix(m) in IMAGE_SUFFIXES]
    if not any(re.search(r"\d", part) for part in between):
        return {key: members}
    parted: dict[str, list[Member]] = {}
    for name, offset, size in members:
        middle, _, suffix = name.rpartition(".")
        parted.setdefault(f"{key}.{middle}" if middle else key, []).append((suffix, offset, size))
    return parted


def _members(shard: str) -> Iterator[tarfile.TarInfo]:
    """Files and links of a shard, every header and the end checked.

    The tarfile module takes garbage after the first member for the end of the archive; here nothing
    but zeros may follow. Where they are missing, the last members may be too: a warning.
    """
    try:
        total = os.path.getsize(shard)
        with open(shard, "rb") as file:
            limited: Any = _Headers(file)
            tar = tarfile.open(fileobj=limited, mode="r:")  # noqa: SIM115 (it opens nothing)
            before = -1
            while (info := tar.next()) is not None:
                # A hostile header may carry a negative size and lead backwards for ever.
                link = info.islnk() or info.issym()
                size = 0 if link else info.size
                if size < 0 or tar.offset <= before or info.offset_data + size > total:
                    raise tarfile.ReadError(f"member {info.name!r} reaches beyond the end")
                before = tar.offset
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps them all
                if link or (info.isreg() and not info.issparse()):
                    yield info
            _check_end(shard, file, tar.offset)
    except Exception as error:
        # headers made to break it raise all kinds, RecursionError among them
        reason = (
            error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        )
        raise InputError(
            f"{shard}: broken or not a tar file ({reason}); make or download it again"
        ) from None


class _Headers:
    """The file as tarfile reads it, headers only, with a limit on what it reads at once."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        if size > _HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self.file.read(size)


def _check_end(shard: str, file: BinaryIO, offset: int) -> None:
    """What follows the last member, from `offset` on."""
    file.seek(offset)
    if file.read(512).strip(b"\0"):
        raise tarfile.ReadError(f"no valid header at byte {offset}")
    if file.tell() == offset:
        logging.getLogger(__name__).warning(
            "%s: does not end with zeros as tar files do; if it was cut, images are missing",
            printable(shard),
        )
    while block := file.read(2**20):
        if block.strip(b"\0"):
            raise tarfile.ReadError(
                f"more data after its end at byte {offset}: archives written one after another"
            )


def _label(shard: str, file: int, key: str, members: list[Member]) -> int:
    """The sample's label from its .cls, else from its .json; -1 without."""
    for suffix, offset, size in members:
        if suffix.lower() == "cls" and size != _LINK:
            text = os.pread(file, min(size, 64), offset).decode("utf-8", "replace").strip()
            if not re.fullmatch(r"\d{1,9}", text):
                raise InputError(f"{shard}: {key}.cls holds {text[:40]!r}, not a class number")
            return int(text)
    for suffix, offset, size in members:
        if suffix.lower() == "json" and 0 <= size <= _LABEL_BYTES:
            try:
                fields = json.loads(os.pread(file, size, offset))
            except (ValueError, RecursionError):
                continue  # other people's metadata: no label in it, no fault of the image
            if isinstance(fields, dict):
                for field in _LABEL_FIELDS:
                    value = fields.get(field)
                    if type(value) is int and 0 <= value < 10**9:
                        return value
    return -1
