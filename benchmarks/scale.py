"""What scaling rests on, on two CPU cores: growth of a step, processes, checkpoints, loader, tar index.

    python -m benchmarks.scale                     # about 10 minutes, on an idle machine
    python -m benchmarks.scale --parts growth      # some parts; the others keep their earlier numbers
    python -m benchmarks.scale --quick --out DIR   # does it work? (no measurement)

writes docs/results/scale.json; the tables of docs/scale.md come from it (python -m benchmarks.scale_model).
"""

import argparse
import io
import json
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import steps
from benchmarks.photos import make_tars
from benchmarks.steps import settings
from benchmarks.timing import RESULTS, Contestant, Step, alternate_processes, exponent
from cmt_mae.core.checkpoint import load_checkpoint, save_checkpoint
from cmt_mae.core.files import write_json
from cmt_mae.core.runs import environment
from cmt_mae.data.loader import CropSettings, pretrain_batches
from cmt_mae.data.pack import PackConfig, pack
from cmt_mae.data.packed import FORMAT
from cmt_mae.data.sources import open_source
from cmt_mae.data.steps import order
from cmt_mae.data.tar import open_tar
from cmt_mae.tools.bench.measure import spread

# --- growth ----------------------------------------------------------------------------------------------

AXES: dict[str, dict[int, dict[str, Any]]] = {
    # axis: size -> settings of cmt, stage two, beside the small preset (width 128, depth 6, 64 px, 16 images)
    "images a step": {n: {"batch_size": n} for n in (8, 16, 32, 64)},
    "image size, px": {px: {"student.img_size": [px]} for px in (32, 64, 96, 128)},
    "width": {w: {"student.width": w, "student.heads": w // 32} for w in (64, 128, 256, 384)},
    "depth": {d: {"student.depth": d} for d in (2, 4, 8, 16)},
}
STORES = (1_000, 10_000, 100_000, 1_000_000)
"""Images in a packed data set that a batch is read from."""


def growth(rounds: int, folder: Path, quick: bool) -> dict[str, Any]:
    """Seconds and memory of a step along each axis, and value = constant * size ** power fitted to both."""
    found = {}
    for axis, points in list(AXES.items())[: 1 if quick else None]:
        chosen = dict(list(points.items())[: 2 if quick else None])
        preset = "micro" if quick else "small"
        contestants = {
            str(at): Contestant(partial(steps.ours, settings("two", preset, **more), "two"))
            for at, more in chosen.items()
        }
        found[axis] = fitted(contestants, rounds)
    if not quick:
        stores = {str(n): Contestant(partial(read_packed, folder / f"store{n}", n)) for n in STORES}
        found["images in the data set"] = fitted(stores, rounds)
    return {
        "what": "one optimizer step of cmt, stage two, small preset, in a process of its own (data set: reading "
        "32 random crops of 32 px of a packed one), in turns; value = constant * size ** power",
        "rounds": rounds, "axes": found,
    }  # fmt: skip


def fitted(contestants: dict[str, Contestant], rounds: int) -> dict[str, Any]:
    """Times and memory of an axis, and their exponents."""
    turns = alternate_processes(contestants, rounds)
    sizes = [float(name) for name in contestants]
    seconds = {name: spread(times) for name, times in turns.seconds.items()}
    memory = {name: turns.facts[name]["above_start_gb"] for name in contestants}
    return {
        "seconds": seconds, "memory_gb": memory,
        "of_time": exponent(sizes, [row["median"] for row in seconds.values()]),
        "of_memory": exponent(sizes, [max(gb, 1e-6) for gb in memory.values()]),
    }  # fmt: skip


def read_packed(path: Path, count: int) -> Step:
    """Batches of a packed data set of so many black images of 32 px; what was never written takes no disk."""
    path.mkdir()
    images = np.lib.format.open_memmap(
        path / "images.npy", mode="w+", dtype=np.uint8, shape=(count, 32, 32, 3)
    )
    del images
    np.save(path / "labels.npy", np.full(count, -1))
    names = [f"{number}.png" for number in range(count)]
    meta = {
        "format": FORMAT, "names": names, "classes": None, "count": count, "size": 32, "channels": 3,
        "source": "none", "source_fingerprint": "none", "bad": [],
    }  # fmt: skip
    (path / "meta.json").write_text(json.dumps(meta))
    stream = pretrain_batches(
        open_source(str(path)), CropSettings((32, 32)), noise_length=0, seed=0, batch_size=32, micro_batch=32,
        workers=0,
    )  # fmt: skip
    return Step(lambda: next(stream))


# --- processes -------------------------------------------------------------------------------------------


def processes(rounds: int, images: int, size: str, quick: bool) -> dict[str, Any]:
    """Images/s of 1 process and of 2, with and (unless quick) without the exchange of gradients, in turns."""
    alone = settings("two", size, batch_size=images)
    both = settings("two", size, batch_size=2 * images)
    ways = {
        "1 process": Contestant(partial(steps.ours, alone, "two")),
        "2 processes, no exchange": Contestant(partial(unshared, both), processes=2),
        "2 processes": Contestant(partial(steps.ours, both, "two"), processes=2),
    }
    if quick:
        del ways["2 processes, no exchange"]
    turns = alternate_processes(ways, rounds)
    rates = {
        name: spread([ways[name].processes * images / s for s in times])
        for name, times in turns.seconds.items()
    }
    return {
        "what": f"optimizer steps of cmt, stage two, {size}, {images} images a process, 1 thread each, gloo",
        "rounds": rounds, "images_per_process": images,
        "gradient_bytes": turns.facts["1 process"]["gradient_bytes"],
        "seconds": turns.seconds, "images_per_second": rates,
        "loopback_bytes_per_step": statistics.median(turns.sent["2 processes"]),
    }  # fmt: skip


def unshared(config: Any) -> Step:
    """Our step without the exchange of gradients (that of the guard against NaN stays)."""
    trainer, _, batches, at = steps.our_trainer(config, "two")
    real = trainer._synchronised
    trainer._synchronised = lambda _: real(False)  # type: ignore[method-assign]
    return Step(lambda: trainer.step(batches, at))


# --- checkpoints, loader, index ------------------------------------------------------------------------------


def checkpoints(rounds: int, size: str, folder: Path) -> dict[str, Any]:
    """Bytes and seconds of a real checkpoint of stage two, optimizer state included."""
    run = settings("two", size, **{"teacher.name": "embedded"})
    trainer, task, _, _ = steps.our_trainer(run, "two")
    for parameter in task.learner.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    task.optimizer.step()  # makes its state, which a first step would make
    state = {"step": 1, **trainer.state_dict()}
    written, loaded = [], []
    for number in range(rounds):
        begin = time.perf_counter()
        path = save_checkpoint(folder, number, state)
        written.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        load_checkpoint(path)
        loaded.append(time.perf_counter() - begin)
        size_now = path.stat().st_size
        path.unlink()
    preset = run.student.preset
    return {"size": preset, "bytes": size_now, "write_s": spread(written), "read_s": spread(loaded)}


def loader(count: int, photo: tuple[int, int], crop: int, folder: Path) -> dict[str, Any]:
    """Images/s of one core: JPEG photos in tar shards, and the same packed at 256 px."""
    total = make_tars(folder / "tar", count, 1, photo)
    side = min(256, photo[1])
    pack(PackConfig(data=str(folder / "tar"), out=str(folder / "packed"), size=side, workers=0))
    rates = {
        kind: loader_rate(str(folder / kind), CropSettings((crop, crop)), min(20, count), 0, max(1, count // 20))
        for kind in ("tar", "packed")
    }  # fmt: skip
    return {"photo": list(photo), "mean_bytes": total / count, "packed_bytes": 3 * side**2, **rates}


def loader_rate(
    path: str, crops: CropSettings, batch: int, workers: int, count: int
) -> dict[str, Any]:
    """Images/s of the loader alone, after the first batches: what the workers can deliver."""
    source = open_source(path)
    batch = min(batch, len(source))
    stream = pretrain_batches(
        source, crops, noise_length=196, seed=0, batch_size=batch, micro_batch=batch, workers=workers
    )  # fmt: skip
    with closing(stream) as batches:  # type: ignore[type-var]
        for _ in range(1 + workers):  # workers make whole batches, side by side
            next(batches)
        begin = time.perf_counter()
        for _ in range(count):
            next(batches)
        seconds = time.perf_counter() - begin
    return {
        "images_per_second": batch * count / seconds, "workers": workers, "batch": batch, "batches": count,
    }  # fmt: skip


def index(members: int, images: int, folder: Path) -> dict[str, Any]:
    """Seconds and bytes a sample that open_tar takes at the start, and that the order of an epoch takes."""
    folder.mkdir()
    shard, tiny = folder / "00000.tar", b"\xff\xd8" + bytes(62)
    with tarfile.open(shard, "w") as tar:
        for number in range(members):
            info = tarfile.TarInfo(f"{number:09d}.jpg")
            info.size = len(tiny)
            tar.addfile(info, io.BytesIO(tiny))
    begin = time.perf_counter()
    source = open_tar([shard])
    seconds = time.perf_counter() - begin
    members = source._reader
    arrays = (members._where, members._offsets, members._sizes, source._labels, source._names._ends)
    held = sum(a.nbytes for a in arrays) + len(source._names._blob)
    begin = time.perf_counter()
    permutation = order(images, 0, 0)
    return {
        "members": members, "seconds_per_sample": seconds / members, "bytes_per_sample": held / members,
        "order_images": images, "order_seconds_per_image": (time.perf_counter() - begin) / images,
        "order_bytes_per_image": permutation.itemsize,
    }  # fmt: skip


# --- the command -----------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Path, bool], dict[str, Any]]] = {
    "index": lambda folder, quick: index(*((200, 1000) if quick else (50_000, 20_000_000)), folder / "index"),
    "loader": lambda folder, quick: loader(*((4, (64, 48), 32) if quick else (200, (500, 375), 224)), folder),
    "checkpoint": lambda folder, quick: checkpoints(*((1, "micro") if quick else (3, "vitb16")), folder),
    "processes": lambda _, quick: processes(*((1, 4, "micro") if quick else (9, 16, "small")), quick),
    "growth": lambda folder, quick: growth(1 if quick else 7, folder, quick),
}  # fmt: skip


def main(words: list[str] | None = None) -> dict[str, Any]:
    """Measure what is asked for, writing as it goes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated")
    parser.add_argument("--quick", action="store_true", help="smoke run")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for scale.json")
    given = parser.parse_args(words)
    for part in given.parts.split(","):
        if part not in PARTS:
            parser.error(f"'{part}' is unknown: use {', '.join(PARTS)}")
    torch.set_num_threads(1)
    path = given.out / "scale.json"
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    content |= {"command": "python -m benchmarks.scale", "quick": given.quick, **environment()}
    with tempfile.TemporaryDirectory(prefix="cmt_scale_", dir=given.out) as name:
        for part in given.parts.split(","):
            content[part] = PARTS[part](Path(name), given.quick)
            write_json(path, content)
            print(part, "done", file=sys.stderr, flush=True)
    return content


if __name__ == "__main__":
    main()
