"""What scaling rests on, measured on two CPU cores: processes, gradients, checkpoints, loader, tar index.

    python -m benchmarks.scale                     # about 3 minutes, on an idle machine
    python -m benchmarks.scale --quick --out DIR   # does it work? (no measurement)

writes docs/results/scale.json and, from it, the tables of docs/scale.md (benchmarks/scale_model.py).
"""

import argparse
import contextlib
import io
import json
import os
import socket
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_data import loader_rate
from benchmarks.gpu_photos import make_tars
from benchmarks.gpu_variants import VARIANTS, settings
from benchmarks.ladder import REPOSITORY, RESULTS
from cmt_mae.core.checkpoint import load_checkpoint, save_checkpoint
from cmt_mae.core.files import write_json
from cmt_mae.core.runs import environment
from cmt_mae.data.loader import CropSettings
from cmt_mae.data.pack import PackConfig, pack
from cmt_mae.data.steps import order
from cmt_mae.data.tar import TarSource
from cmt_mae.tools.bench.build import make_stepper
from cmt_mae.tools.bench.measure import spread

DEFAULT_BUCKET = 25.0  # torch's
BUCKETS = (1.0, DEFAULT_BUCKET, 100.0)  # MB of gradients that travel together


class Group:
    """Worker processes that wait for commands; a waiting one takes no CPU time."""

    def __init__(self, processes: int, images: int, size: str) -> None:
        self.images = images * processes
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.workers = []
        for rank in range(processes):
            setup = {"OMP_NUM_THREADS": "1"}
            if processes > 1:
                setup |= {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                    "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                }  # fmt: skip
            words = [str(images), str(processes), size]
            command = [sys.executable, "-m", "benchmarks.scale_worker", *words]
            self.workers.append(
                subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                    cwd=REPOSITORY, env={**os.environ, **setup},
                )
            )  # fmt: skip
        self.facts = [self._answer(worker) for worker in self.workers][-1]

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            assert worker.stdin
            with contextlib.suppress(BrokenPipeError):  # of a worker that is gone
                worker.stdin.close()
        for worker in self.workers:
            worker.wait(timeout=60)

    def tell(self, **command: Any) -> float:
        """Seconds of the slowest."""
        for worker in self.workers:
            assert worker.stdin
            worker.stdin.write(json.dumps(command) + "\n")
            worker.stdin.flush()
        return max(float(self._answer(worker)["seconds"]) for worker in self.workers)

    @staticmethod
    def _answer(worker: "subprocess.Popen[str]") -> dict[str, Any]:
        assert worker.stdout
        line = worker.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended with status {worker.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def loopback_bytes() -> int:
    """Bytes that this machine has sent to itself."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])
    return 0


def processes(rounds: int, count: int, images: int, size: str) -> dict[str, Any]:
    """Images/s of 1 process and of 2, with and without the exchange of gradients, in turns."""
    with ExitStack() as stack:
        one = stack.enter_context(Group(1, images, size))
        two = stack.enter_context(Group(2, images, size))
        ways: dict[str, tuple[Group, float | None]] = {  # and the MB of a bucket; None: no exchange
            "1 process": (one, None),
            "2 processes, no exchange": (two, None),
            **{f"2 processes, buckets of {b:g} MB": (two, b) for b in BUCKETS},
        }
        seconds: dict[str, list[float]] = {name: [] for name in [*ways, "exchange alone"]}
        sent: list[float] = []
        for number in range(-1, rounds):  # one round to warm up
            names = list(ways)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                group, bucket = ways[name]
                if bucket is not None:
                    group.tell(do="wrap", bucket_mb=bucket)
                before = loopback_bytes()
                sync = bucket is not None
                taken = group.tell(do="steps", count=count, sync=sync) / count
                if number >= 0:
                    seconds[name].append(taken)
                    if bucket == DEFAULT_BUCKET:
                        sent.append((loopback_bytes() - before) / count)
            alone = two.tell(do="all_reduce", count=count) / count
            if number >= 0:
                seconds["exchange alone"].append(alone)
        rates = {
            name: spread([ways[name][0].images / s for s in times])
            for name, times in seconds.items()
            if name in ways
        }
        facts = one.facts
    return {
        "what": f"optimizer steps of cmt, stage two, {size}, {images} images a process, 1 thread each, gloo",
        "rounds": rounds, "steps_per_round": count, "images_per_process": images,
        "gradient_bytes": facts["gradient_bytes"], "seconds": seconds, "images_per_second": rates,
        "loopback_bytes_per_step": statistics.median(sent),
    }  # fmt: skip


def checkpoints(rounds: int, size: str, folder: Path) -> dict[str, Any]:
    """Bytes and seconds of a real checkpoint of stage two, optimizer state included."""
    run = settings(size, "two", VARIANTS["eager"], 4, precision="fp32")
    run.runtime.device, run.teacher.name = "cpu", "embedded"
    stepper, _ = make_stepper(run)
    stepper.enter_stage(stepper.plan.switch_step)
    for parameter in stepper.learner.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    stepper.optimizer.step()  # makes its state, which a first step would make
    state = {"step": 1, **stepper.state_dict()}
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
    return {"size": size, "bytes": size_now, "write_s": spread(written), "read_s": spread(loaded)}


def loader(count: int, photo: tuple[int, int], crop: int, folder: Path) -> dict[str, Any]:
    """Images/s of one core: JPEG photos in tar shards, and the same packed at 256 px."""
    total = make_tars(folder / "tar", count, 1, photo)
    side = min(256, photo[1])
    pack(PackConfig(data=str(folder / "tar"), out=str(folder / "packed"), size=side, workers=0))
    crops = CropSettings((crop, crop))
    batches = max(1, count // 20)
    return {
        "photo": list(photo), "mean_bytes": total / count, "packed_bytes": 3 * side**2,
        **{
            kind: loader_rate(str(folder / kind), crops, min(20, count), 0, batches)
            for kind in ("tar", "packed")
        },
    }  # fmt: skip


def index(members: int, images: int, folder: Path) -> dict[str, Any]:
    """Seconds and bytes a sample that TarSource takes at the start, and that the order of an epoch takes."""
    folder.mkdir()
    shard, tiny = folder / "00000.tar", b"\xff\xd8" + bytes(62)
    with tarfile.open(shard, "w") as tar:
        for number in range(members):
            info = tarfile.TarInfo(f"{number:09d}.jpg")
            info.size = len(tiny)
            tar.addfile(info, io.BytesIO(tiny))
    begin = time.perf_counter()
    source = TarSource([shard])
    seconds = time.perf_counter() - begin
    arrays = (source._where, source._offsets, source._sizes, source._labels, source._names._ends)
    held = sum(a.nbytes for a in arrays) + len(source._names._blob)
    begin = time.perf_counter()
    permutation = order(images, 0, 0)
    return {
        "members": members, "seconds_per_sample": seconds / members, "bytes_per_sample": held / members,
        "order_images": images, "order_seconds_per_image": (time.perf_counter() - begin) / images,
        "order_bytes_per_image": permutation.itemsize,
    }  # fmt: skip


def main(words: list[str] | None = None) -> dict[str, Any]:
    """Measure everything, writing as it goes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="smoke run")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for scale.json")
    given = parser.parse_args(words)
    torch.set_num_threads(1)
    quick, path = given.quick, given.out / "scale.json"
    content: dict[str, Any] = {
        "command": "python -m benchmarks.scale",
        "quick": quick,
        **environment(),
    }
    with tempfile.TemporaryDirectory(prefix="cmt_scale_", dir=given.out) as name:
        folder = Path(name)
        parts: dict[str, Any] = {
            "index": lambda: index(200 if quick else 50_000, 1000 if quick else 20_000_000, folder / "index"),
            "loader": lambda: loader(4, (64, 48), 32, folder) if quick else loader(200, (500, 375), 224, folder),
            "checkpoint": lambda: checkpoints(1 if quick else 3, "micro" if quick else "base", folder),
            "processes": lambda: processes(1, 1, 4, "micro") if quick else processes(9, 3, 16, "small"),
        }  # fmt: skip
        for part, work in parts.items():
            content[part] = work()
            write_json(path, content)
            print(part, "done", file=sys.stderr, flush=True)
    return content


if __name__ == "__main__":
    main()
