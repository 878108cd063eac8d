"""Tiny trainings for the campaigns: data, commands, processes that are forked, hurt and compared.

A trial costs a second because its process is forked from one that has imported everything and run no training;
from there on it is what ``python -m cmt_mae`` is: the command's words go through ``cmt_mae.core.cli.main``. With
``Launch(real=True)`` it is that command, and torchrun for two processes.
"""

import contextlib
import mmap
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.faults.calling import wait
from cmt_mae.core.cli import main

# imported here, so that a forked process need not
for _module in (
    "cmt_mae.tools.pretrain", "cmt_mae.evaluate.finetune", "cmt_mae.evaluate.segmentation",
    "cmt_mae.evaluate.linear", "cmt_mae.evaluate.knn", "torch.utils.tensorboard", "matplotlib.pyplot",
    "jsonargparse", "torch.distributed", "torch.nn.parallel",
):  # fmt: skip
    __import__(_module)

PRETRAIN = [
    "pretrain", "--epochs=4", "--batch_size=8", "--precision=fp32", "--student.img_size=[32]",
    "--student.patch_size=8", "--student.preset=micro", "--student.width=16", "--student.depth=2",
    "--student.heads=2", "--student.drop_path=0.2", "--decoder.width=16", "--decoder.depth=1",
    "--decoder.heads=2", "--optim.blr=0.03", "--optim.warmup_epochs=0.5", "--runtime.device=cpu",
    "--runtime.progress=false", "--runtime.log_every=3", "--runtime.checkpoint_every=0.4", "--data.workers=0",
]  # fmt: skip
"""40 images: 20 steps, the switch of stages at 10; drop path draws random numbers in every step."""


@dataclass
class Tiny:
    """Files that the commands below read."""

    folder: Path
    packed: str = ""
    photos: str = ""
    """JPEG files, two of them broken."""
    teacher: str = ""
    backbone: str = ""
    segments: str = ""

    def __post_init__(self) -> None:
        self.packed, self.photos = str(self.folder / "packed"), str(self.folder / "photos")
        self.teacher = str(self.folder / "teacher.safetensors")
        self.backbone = str(self.folder / "backbone.safetensors")
        self.segments = str(self.folder / "segments")

    def pretrain(self, data: str, out: Path, *more: str) -> list[str]:
        """Words of a pre-training of 20 steps."""
        data_words = [f"--data.path={data}", "--data.max_bad=0.5", f"--teacher.name={self.teacher}"]
        return [*PRETRAIN, *data_words, f"--out={out}", *more]

    def finetune(self, out: Path, *more: str) -> list[str]:
        """Words of a fine-tuning of 10 steps with mixing, drop path, erasing and running average."""
        return [
            "evaluate", "finetune", f"--backbone={self.backbone}", f"--data={self.packed}", f"--out={out}",
            "--device=cpu", "--progress=false", "--workers=0", "--batch_size=8", "--micro_batch=4", "--epochs=2",
            "--log_every=3", "--checkpoint_every=0.4", "--eval_every=1", "--ema_decay=0.9", "--drop_path=0.2",
            "--pictures=2", *more,
        ]  # fmt: skip

    def segmentation(self, out: Path, *more: str) -> list[str]:
        """Words of a segmentation of 6 steps."""
        return [
            "evaluate", "ade20k", f"--backbone={self.backbone}", f"--data={self.segments}", f"--out={out}",
            "--device=cpu", "--progress=false", "--workers=0", "--preset=quick", "--batch_size=4",
            "--iterations=6", "--crop_size=48", "--channels=8", "--log_every=1", "--eval_every=1",
            "--checkpoint_every=0.5", "--pictures=1", *more,
        ]  # fmt: skip

    def linear(self, out: Path, *more: str) -> list[str]:
        """Words of a linear probe."""
        return [
            "evaluate", "linear", f"--backbone={self.backbone}", f"--data={self.packed}", f"--out={out}",
            "--device=cpu", "--workers=0", "--protocol=mae", "--epochs=150", f"--cache={out}/cache", *more,
        ]  # fmt: skip


def prepare(folder: Path) -> Tiny:
    """Make the files, in a process of their own: this one must have run no torch code when it forks."""
    tiny = Tiny(folder)

    def make() -> None:
        import timm

        from cmt_mae.backbones import save_backbone
        from cmt_mae.data.pack import PackConfig, pack
        from cmt_mae.data.sample import write_imagefolder

        write_imagefolder(tiny.photos, 40, 20, 40)
        pack(PackConfig(data=tiny.photos, out=tiny.packed, size=40, workers=0))
        for path in sorted(Path(tiny.photos, "train").rglob("*.webp"))[5:27:21]:
            path.write_bytes(path.read_bytes()[:200])
        torch.manual_seed(5)
        for path, depth in ((tiny.teacher, 2), (tiny.backbone, 4)):
            kwargs = {
                "img_size": 48, "patch_size": 12, "embed_dim": 24, "depth": depth, "num_heads": 2,
            }  # fmt: skip
            model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **kwargs)
            save_backbone(
                path, model, architecture="vit_tiny_patch16_224", kwargs=kwargs, img_size=48,
                mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), licence="none",
                source="random weights of a test",
            )  # fmt: skip
        _write_segments(Path(tiny.segments))

    pid = _fork(make, folder / "prepare.log")
    if wait(pid, 120) != 0:
        raise RuntimeError((folder / "prepare.log").read_text())
    return tiny


def _write_segments(root: Path) -> None:
    """ADE20K's layout: 9 training and 4 validation pictures of boxes on two grounds."""
    rng = np.random.default_rng(0)
    for split, count in (("training", 9), ("validation", 4)):
        for part in ("images", "annotations"):
            (root / part / split).mkdir(parents=True)
        for i in range(count):
            mask = np.ones((40, 48), dtype=np.uint8)
            mask[i % 5 + 4 : i % 5 + 24, 5:25], mask[:, 30:] = 2, 3
            pixels = mask[..., None] * np.array([70, 50, 20]) + rng.normal(0, 9, (*mask.shape, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(
                root / "images" / split / f"{i}.png"
            )
            Image.fromarray(mask).save(root / "annotations" / split / f"{i}.png")
    (root / "objectInfo.txt").write_text("Name\nground\nbox\nwall\n")


FILE_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.link", "os.truncate", "os.rmdir")
"""Of Python's audit hooks."""
COUNTED = ("file", "byte", "step", "decode")


class Counters:
    """How often something happened in a process and its forks: shared memory."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8 * len(COUNTED))

    def add(self, kind: str, amount: int = 1) -> int:
        """The count before."""
        at = 8 * COUNTED.index(kind)
        before: int = struct.unpack_from("q", self._memory, at)[0]
        struct.pack_into("q", self._memory, at, before + amount)
        return before

    def read(self) -> dict[str, int]:
        """Kind -> count."""
        return dict(zip(COUNTED, struct.unpack(f"{len(COUNTED)}q", self._memory[:]), strict=True))


@dataclass(frozen=True)
class Fault:
    """SIGKILL at the n-th operation on a file of the run, byte of checkpoints, step or decoded image."""

    kind: str
    at: int
    rank: int = 0


@dataclass
class Launch:
    """One start of a command: of one or two processes."""

    words: list[str]
    log: Path
    processes: int = 1
    real: bool = False
    """A new interpreter (or torchrun) instead of a fork; no faults and counters then."""
    fault: Fault | None = None
    prepare: Callable[[int], None] | None = None
    """Called in every forked process with its rank, before the command."""
    counters: Counters = field(default_factory=Counters)
    pids: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    began: float = 0.0

    def start(self) -> "Launch":
        """Processes run on their own from here."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.began = time.monotonic()
        if self.real:
            self.pids = [self._start_interpreter()]
            return self
        port = _free_port()
        for rank in range(self.processes):
            self.pids.append(_fork(lambda rank=rank: self._run(rank, port), self.log))
        return self

    def _start_interpreter(self) -> int:
        torchrun = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={self.processes}",
        ]
        launcher = torchrun if self.processes > 1 else []
        with open(self.log, "ab") as log:
            return subprocess.Popen(
                [sys.executable, *launcher, "-m", "cmt_mae", *self.words], stdout=log, stderr=log,
                start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
            ).pid  # fmt: skip

    def _run(self, rank: int, port: int) -> int:
        if self.processes > 1:  # what torchrun sets
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.processes, "MASTER_PORT": port,
                      "LOCAL_WORLD_SIZE": self.processes, "MASTER_ADDR": "127.0.0.1"}  # fmt: skip
            os.environ.update({k: str(v) for k, v in places.items()})
        fault = self.fault if self.fault is not None and self.fault.rank == rank else None
        if rank == 0 or fault is not None:
            watch(self.counters, fault, out_of(self.words))
        from cmt_mae.tools import pretrain

        pretrain.PICTURED = 1  # else most of a tiny run is spent, and killed, drawing pictures
        if self.prepare is not None:
            self.prepare(rank)
        return main(self.words)

    def kill(self, which: int = 0, number: int = signal.SIGKILL) -> None:
        """Send a signal to one of the processes; one that has ended is left alone."""
        if which < len(self.pids) and _alive(self.pids[which]):
            os.kill(self.pids[which], number)

    def running(self) -> bool:
        """Whether none of the processes has ended."""
        return all(_alive(pid) for pid in self.pids)

    def finish(self, timeout_s: float = 120) -> list[int]:
        """Exit statuses, -N for signal N. As torchrun, ends the others soon after one was killed."""
        self.statuses = [0] * len(self.pids)
        end, left = time.monotonic() + timeout_s, set(range(len(self.pids)))
        while left:
            for one in sorted(left):
                pid, status = os.waitpid(self.pids[one], os.WNOHANG)
                if pid:
                    self.statuses[one] = os.waitstatus_to_exitcode(status)
                    left.discard(one)
                    if self.statuses[one] == -signal.SIGKILL:
                        end = min(end, time.monotonic() + 0.3)
            if left and time.monotonic() > end:
                for one in left:
                    os.kill(self.pids[one], signal.SIGKILL)
            time.sleep(0.002)
        return self.statuses

    def said(self) -> str:
        """Everything on stdout and stderr so far, this start's and earlier ones'."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def watch(counters: Counters, fault: Fault | None, run: Path) -> None:
    """Count in this process (and its workers) what faults are placed by, and place one."""
    from cmt_mae.core import checkpoint
    from cmt_mae.data import loader
    from cmt_mae.pretraining.task import Pretraining

    process, text = os.getpid(), str(run)

    def die() -> None:
        os.kill(process, signal.SIGKILL)
        time.sleep(60)  # a worker, whose parent this was

    def count(kind: str) -> None:
        before = counters.add(kind)
        if fault is not None and fault.kind == kind and before >= fault.at:
            die()

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event in FILE_EVENTS and any(str(a).startswith(text) for a in args[:2]):
            count("file")

    sys.addaudithook(audit)
    write, decode, to_device = checkpoint._Hashed.write, loader.decode_image, Pretraining.to_device

    def write_some(self: Any, data: bytes) -> int:
        before = counters.add("byte", len(data))
        if fault is not None and fault.kind == "byte" and before <= fault.at < before + len(data):
            self.file.write(bytes(data)[: fault.at - before])
            self.file.flush()
            die()
        return write(self, data)

    def decode_one(*args: Any) -> Any:
        image = decode(*args)
        count("decode")
        return image

    def take_micro(self: Pretraining, batch: Any) -> Any:
        count("step")
        return to_device(self, batch)

    checkpoint._Hashed.write = write_some  # type: ignore[method-assign]
    loader.decode_image = decode_one
    Pretraining.to_device = take_micro  # type: ignore[method-assign]


def out_of(words: list[str]) -> Path:
    """The run directory of a command."""
    return Path(next(w for w in words if w.startswith("--out=")).removeprefix("--out="))


def _fork(work: Callable[[], Any], log: Path) -> int:
    """Run ``work`` in a fork whose output goes to ``log``; its int becomes the exit status."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.setsid()
        status = work() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _alive(pid: int) -> bool:
    """Whether a child of ours has not ended yet (without collecting its status)."""
    found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    return found is None


def descendants(pid: int) -> list[int]:
    """Children of a process of ours, theirs, and so on."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            parents.setdefault(parent, []).append(int(entry.name))
    found, open_ends = [], [pid]
    while open_ends:
        below = parents.get(open_ends.pop(), [])
        found += below
        open_ends += below
    return found


def kill_one(pid: int) -> None:
    """SIGKILL; it may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def remove(run: Path) -> None:
    """Of a trial that is over."""
    shutil.rmtree(run, ignore_errors=True)
