"""Broken containers of images and broken annotations: tar, parquet and packs here, layouts in shard_layouts.py.

Each trial writes a broken file, opens it as a user's run would, and reads everything that is in it. It must be
refused in one line, or be read: what a sample gives then is a picture or a reason, never an error, and memory and
time stay within bounds.
"""

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.faults.calling import in_fork
from benchmarks.faults.campaign import Options, Verdict
from benchmarks.faults.measured import Trial, judge
from benchmarks.faults.pictures import MUTATIONS, encode, mutate
from benchmarks.faults.shard_layouts import layouts
from cmt_mae.data.decode import BadImage
from cmt_mae.data.loader import load_image
from cmt_mae.data.pack import PackConfig, pack
from cmt_mae.data.sources import open_source

PROMISE = (
    "broken shards, tables, packs and annotations are refused in one line or read for what is whole in them; "
    "time and memory stay bounded"
)
LIMIT_S = 60.0
MIB = 600.0

ABSURD: tuple[Any, ...] = (
    None, True, -1, 0, 1.5, 2**31, 2**53, 2**63, 10**30, float("nan"), float("inf"), "", "x", "../../x", "\x1b[2J",
    [], {}, [[]], [None], ["x"], {"a": {}}, [[[[[[0]]]]]], [float("nan")] * 4, [-1, -1, -1, -1], [10**400],
    "9" * 3000,
)  # fmt: skip
"""Put in the place of every value in turn."""


def campaign(options: Options) -> Verdict:
    """Tar shards, parquet files, packs; COCO, ADE20K, DAVIS."""
    verdict = Verdict(PROMISE)
    rng = np.random.default_rng(options.seed)
    small = options.quick
    folder = options.folder
    groups: dict[str, list[Trial]] = {
        "tar": tar_trials(folder / "tar", rng, 40 if small else 1500),
        "parquet": parquet_trials(folder / "parquet", rng, 3 if small else 90),
        "pack": pack_trials(folder / "pack", rng, 30 if small else 500, small),
    }
    for name, trials in groups.items():
        record(name, trials, verdict, MIB)
    layouts(folder, rng, small, verdict, record)
    return verdict


def record(
    name: str, trials: list[Trial], verdict: Verdict, most_mib: float, each: int = 100
) -> None:
    """Run one group of trials and put down what it came to."""
    found = judge(trials, LIMIT_S * 5, most_mib, each)
    verdict.trials += len(trials)
    verdict.failures += [f"{name}: {line}" for line in found.failures]
    verdict.figures[name] = (
        f"{len(trials)} trials, {len(found.refused)} refused, peak {found.peak_mib:.0f} MiB, "
        f"{found.seconds:.1f} s for {each} at most"
    )


def read_all(path: Path) -> str | None:
    """Open a source and read everything; what is wrong with it."""
    source = open_source(str(path))
    for index in range(len(source)):
        name, label = source.name(index), source.label(index)
        if not name.isprintable() or not (label is None or 0 <= label < 2**40):
            return f"name {name!r}, label {label!r}"
        try:
            if load_image(source, index, 3).dtype != np.uint8:
                return "no uint8"
        except BadImage as error:
            if "\n" in str(error):
                return f"reason {error!r}"
    return None if len(source.fingerprint()) == 64 else "no fingerprint"


def written(path: Path, raw: bytes) -> str | None:
    """Write a file, then ``read_all`` of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)
    try:
        return read_all(path)
    finally:
        path.unlink()


# --- tar --------------------------------------------------------------------------------------------


def tar(members: list[tuple[str, bytes | str]], kind: int = tarfile.PAX_FORMAT) -> bytes:
    """A shard; a text in place of bytes is the target of a link."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as out:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if isinstance(data, str):
                info.type, info.linkname = tarfile.SYMTYPE, data
                out.addfile(info)
            else:
                info.size = len(data)
                out.addfile(info, io.BytesIO(data))
    return file.getvalue()


def photo(value: int) -> bytes:
    """A small JPEG."""
    return encode(Image.new("RGB", (20, 16), (value, 90, 30)), "JPEG")


def header(kind: bytes, size: int) -> bytes:
    """One member's header."""
    info = tarfile.TarInfo("member.jpg")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


def tar_trials(folder: Path, rng: np.random.Generator, count: int) -> list[Trial]:
    """Mutations of whole shards, and shards made to hurt."""
    samples: list[tuple[str, bytes | str]] = []
    for i in range(6):
        samples += [(f"{i:04d}.jpg", photo(i)), (f"{i:04d}.cls", b"%d" % i)]
    whole = [tar(samples, kind) for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)]
    long_names: list[tuple[str, bytes | str]] = [
        ("d/" * 90 + f"{i}.jpg", photo(i)) for i in range(4)
    ]
    whole.append(tar(long_names))
    path = folder / "shard.tar"
    trials: list[Trial] = []
    for number in range(count):
        raw = whole[number % 3]
        how = MUTATIONS[number // 3 % len(MUTATIONS)]
        data = mutate(raw, how, rng, whole[(number + 1) % 3])
        check = partial(whole_or_named, path, 6 if number % 3 < 2 else 4)
        check = check if how == "cut" else partial(written, path)
        trials.append((f"{how} {number}", partial(check, data)))
    for size in range(0, len(whole[0]), 512):
        trials.append((f"cut at {size}", partial(whole_or_named, path, 6, whole[0][:size])))
    jpg, deep = photo(1), b"[" * 100_000
    hurting: dict[str, bytes] = {
        "nothing": b"", "zeros": bytes(10240), "no image": tar([("a.txt", b"x")]), "joined": whole[0] * 2,
        "traversal": tar([("../../../tmp/h.jpg", jpg), ("/etc/h.jpg", jpg), ("a/../../h.jpg", jpg)]),
        "duplicates": tar([("a.jpg", jpg)] * 5), "control": tar([("a\x1b[2J\nb.jpg", jpg)]),
        "links": tar([("a.jpg", jpg), ("b.jpg", "/etc/passwd"), ("c.jpg", "c.jpg"), ("b.cls", "a.jpg")]),
        "deep json": tar([("a.jpg", jpg), ("a.json", b'{"label":' + deep)]),
        "huge json number": tar([("a.jpg", jpg), ("a.json", b'{"label":' + b"9" * 10**6 + b"}")]),
        "absurd label": tar([("a.jpg", jpg), ("a.cls", b"9" * 50)]),
        "empty image": tar([("a.jpg", b"")]),
        "garbage between": whole[0][:2048] + rng.bytes(1024) + whole[0][2048:],
        "endless long name": header(tarfile.GNUTYPE_LONGNAME, 2**60) + bytes(2048),
        "endless file": header(tarfile.REGTYPE, 2**60) + bytes(2048),
        "backwards": whole[0][:1536] + header(tarfile.REGTYPE, -(2**20)) + bytes(2048),
        "names of names": (header(tarfile.GNUTYPE_LONGNAME, 2) + b"a".ljust(512, b"\0")) * 20_000,
        "sparse": header(tarfile.GNUTYPE_SPARSE, 512) + bytes(2048), "device": header(tarfile.CHRTYPE,
        0) + bytes(1024),
    }  # fmt: skip
    trials += [(what, partial(written, path, raw)) for what, raw in hurting.items()]
    for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE):
        trials.append((f"a header of 2 GiB, {kind!r}", partial(sparse, path, header(kind, 2**31))))
    return trials


def whole_or_named(path: Path, count: int, raw: bytes) -> str | None:
    """A shard that was cut: refused, or a warning says that images may be missing, or nothing is missing."""
    import logging

    heard: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    ear, logger = Ear(), logging.getLogger("cmt_mae")
    logger.addHandler(ear)
    try:
        wrong = written(path, raw)
        path.write_bytes(raw)
        if wrong is None and not heard and len(open_source(str(path))) < count:
            wrong = "images are missing and nobody says so"
        return wrong
    finally:
        logger.removeHandler(ear)
        path.unlink(missing_ok=True)


def sparse(path: Path, head: bytes) -> str | None:
    """A file of 2 GiB and a little, all zeros but its head."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(2**31 + 4096)
    try:
        return read_all(path)
    finally:
        path.unlink()


# --- parquet ----------------------------------------------------------------------------------------


def parquet(**columns: Any) -> bytes:
    """A file of these columns."""
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


def parquet_trials(folder: Path, rng: np.random.Generator, count: int) -> list[Trial]:
    """Mutations of a whole table, and tables of other schemas. `datasets` keeps its copies in ``folder``."""
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    datasets.disable_progress_bars()
    jpg = photo(3)
    cells = [{"bytes": photo(i), "path": f"{i}.jpg"} for i in range(40)]
    whole = parquet(image=cells, label=list(range(40)))
    path = folder / "table.parquet"
    trials: list[Trial] = []
    for number in range(count):
        how = MUTATIONS[number % len(MUTATIONS)]
        trials.append((f"{how} {number}", partial(once, folder, mutate(whole, how, rng, jpg * 9))))
    tables: dict[str, dict[str, Any]] = {
        "no image": {"text": ["a"]}, "numbers": {"image": [1, 2]}, "lists": {"image": [[1], [2]]},
        "text for bytes": {"image": [{"bytes": "a", "path": "b"}]}, "no rows": {"image": pa.array([],
        pa.binary())},
        "empty cells": {"image": pa.array([None, jpg, b""], pa.binary())},
        "paths": {"image": [{"bytes": None, "path": "/etc/passwd"}, {"bytes": jpg, "path": "a\n\x1b[2J"}]},
        "a pipe for a path": {"image": [{"bytes": None, "path": str(pipe(folder))}, {"bytes": jpg, "path": ""}]},
        "endless labels": {"image": [jpg], "label": pa.array([2**64 - 1], pa.uint64())},
        "negative labels": {"image": [jpg], "label": [-(2**63)]}, "labels of text": {"image": [jpg],
        "label": ["x"]},
        "no labels": {"image": [jpg], "label": pa.array([None], pa.int64())},
    }  # fmt: skip
    chosen = list(tables.items()) if count > 10 else list(tables.items())[-4:]
    trials += [(what, partial(once, folder, parquet(**columns))) for what, columns in chosen]
    trials += [
        ("nothing", partial(written, path, b"")),
        ("text", partial(written, path, b"PAR1" * 9)),
    ]
    return trials


def pipe(folder: Path) -> Path:
    """A named pipe."""
    folder.mkdir(parents=True, exist_ok=True)
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


def once(folder: Path, raw: bytes) -> str | None:
    """As ``written``, without the copies that `datasets` keeps of earlier files."""
    shutil.rmtree(folder / "cache", ignore_errors=True)
    return written(folder / "table.parquet", raw)


# --- packs ------------------------------------------------------------------------------------------


def pack_trials(folder: Path, rng: np.random.Generator, count: int, small: bool) -> list[Trial]:
    """Every value of meta.json absurd, arrays of wrong sizes and kinds, mutations of the three files."""
    whole = folder / "whole"

    def make() -> None:
        for i in range(8):
            place = folder / "photos" / f"class {i % 2}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{i}.jpg").write_bytes(photo(i))
        pack(PackConfig(data=str(folder / "photos"), out=str(whole), size=12, workers=0))

    in_fork(make)
    meta = json.loads((whole / "meta.json").read_text())
    trials: list[Trial] = []
    for key in meta:
        for value in ABSURD[:: 9 if small else 1]:
            text = json.dumps({**meta, key: value}).encode()
            trials.append((f"{key} = {value!r:.40}", changed(folder, "meta.json", text)))
        text = json.dumps({k: v for k, v in meta.items() if k != key}).encode()
        trials.append((f"no {key}", changed(folder, "meta.json", text)))
    for text in (b"", b"{}", b"[" * 100_000, b"null", b"\xff\xfe"):
        trials.append((f"meta.json {text[:9]!r}", changed(folder, "meta.json", text)))
    arrays: tuple[Any, ...] = (
        np.zeros((7, 12, 12, 3), np.uint8), np.zeros((8, 12, 12, 4), np.uint8), np.zeros((8, 12, 12, 3),
        np.float32),
        np.zeros(8), np.full(8, np.nan), np.full(8, 2**62), np.full(8, -2), np.array(["a"] * 8), np.array(3),
        np.zeros((8, 1), np.int64), np.zeros(0, np.int64), np.zeros(8, np.complex128), np.zeros(8, "M8[s]"),
    )  # fmt: skip
    for array in arrays:
        for name in ("images.npy", "labels.npy"):
            file = io.BytesIO()
            np.save(file, array)
            what = f"{name} {array.dtype} {array.shape}"
            trials.append((what, changed(folder, name, file.getvalue())))
    for name in ("images.npy", "labels.npy"):
        for shape in ((10**13,), (2**62, 2**62), (8, 12, 12, 3), (-1,), ()):
            file = io.BytesIO()
            fields = {"descr": "<i8", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, fields)
            trials.append((f"{name} says {shape}", changed(folder, name, file.getvalue())))
    names = ("images.npy", "labels.npy", "meta.json")
    for number in range(count):
        name, how = names[number % 3], MUTATIONS[number // 3 % len(MUTATIONS)]
        raw = (whole / name).read_bytes()
        trials.append(
            (f"{name}, {how} {number}", changed(folder, name, mutate(raw, how, rng, raw)))
        )
    return trials


def changed(folder: Path, name: str, raw: bytes) -> Callable[[], str | None]:
    """A trial of the pack with another content of one file."""

    def trial() -> str | None:
        place = folder / "changed"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(folder / "whole", place)
        (place / name).write_bytes(raw)
        return read_all(place)

    return trial
