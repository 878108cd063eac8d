"""Loader workers that die or hang, at random moments: noticed in time, named, started again, nothing changed.

Every loader of the software runs in a fork with real workers; one of them is killed, stopped, or meets an image
that kills it or that never ends. Then whole commands, whose workers are killed and stopped from outside.
"""

import ctypes
import dataclasses
import importlib
import itertools
import logging
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.faults.calling import call, call_forked, fault_in
from benchmarks.faults.campaign import Options, Verdict
from benchmarks.faults.image_runs import last_state
from benchmarks.faults.measured import Progress, measure
from benchmarks.faults.sameness import apart
from benchmarks.faults.tiny import Launch, Tiny, descendants, prepare
from cmt_mae.core.cli import COMMANDS, EVALUATIONS, load
from cmt_mae.core.errors import InputError
from cmt_mae.data import loader, tasks, workers
from cmt_mae.data.pack import _squares

PROMISE = (
    "a loader worker that dies or hangs is noticed in time, named and started again; every batch is that of the "
    "undisturbed run; one that always dies stops the run in one line"
)
TIMEOUT_S = 1.5
SLACK_S = 6.0
"""Between a death, or the end of the time limit, and the next batch: noticing, ending, starting again."""
IMAGES, STEPS = 96, 18
OUTSIDE = ("SIGKILL", "SIGSEGV", "SIGABRT", "SIGBUS", "SIGSTOP", "SIGSTOP all")
INSIDE = ("segfault", "exit", "out of memory", "endless read", "endless loop")


def campaign(options: Options) -> Verdict:
    """All loaders with all accidents; always the same accident; whole commands; settings."""
    verdict, chance = Verdict(PROMISE), random.Random(options.seed)
    settings(verdict)
    on_loaders(options, chance, verdict)
    always(options, verdict)
    tiny = prepare(options.folder / "tiny")
    on_commands(tiny, options, chance, verdict)
    no_room(tiny, options.folder, verdict)
    return verdict


# --- loaders ----------------------------------------------------------------------------------------


class Images:
    """Small arrays; reading image ``fatal`` in a worker is an accident, ``times`` over."""

    classes: list[str] | None = None
    limits = None

    def __init__(self, folder: Path, how: str = "", fatal: int = -1, times: int = 1) -> None:
        self.pixels = np.random.default_rng(7).integers(0, 256, (IMAGES, 14, 12, 3), np.uint8)
        self.folder, self.how, self.fatal, self.times = folder, how, fatal, times
        self.main = os.getpid()

    def __len__(self) -> int:
        return IMAGES

    def name(self, index: int) -> str:
        """Its number."""
        return f"image {index}"

    def label(self, index: int) -> int | None:
        """Some class."""
        return index % 3

    def read(self, index: int) -> np.ndarray:
        """Pixels, or an accident."""
        if index == self.fatal and os.getpid() != self.main:
            marks = list(self.folder.glob("accident*"))
            if len(marks) < self.times:
                (self.folder / f"accident{time.time_ns()}").touch()
                accident(self.how, self.folder)
        image: np.ndarray = self.pixels[index]
        return image

    def fingerprint(self) -> str:
        """None is needed."""
        return ""


def accident(how: str, folder: Path) -> None:
    """What happens to the process that reads the image."""
    if how == "segfault":
        ctypes.string_at(0)
    elif how == "exit":
        os._exit(3)
    elif how == "out of memory":  # as the kernel ends it
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)
    elif how == "endless read":
        os.mkfifo(pipe := folder / f"pipe{time.time_ns()}")
        with open(pipe, "rb") as file:  # nobody writes
            file.read()
    elif how == "endless loop":
        while True:
            pass


def flat(item: Any) -> Any:
    """An item of any loader as plain values."""
    if isinstance(item, torch.Tensor | np.ndarray):
        return np.asarray(item).tobytes()
    if isinstance(item, dict):
        return {key: flat(value) for key, value in item.items()}
    return tuple(map(flat, item)) if isinstance(item, list | tuple) else item


@dataclasses.dataclass
class Read:
    """A sample function of the training evaluations."""

    images: Images

    def __call__(self, index: int, rng: np.random.Generator) -> Any:
        return self.images.read(index).astype(np.float32) + rng.random()


def streams(images: Images, count: int, timeout_s: float) -> dict[str, Callable[[], Iterator[Any]]]:
    """Every loader of the software over the images, with ``count`` workers."""
    crops = loader.CropSettings((8, 8))
    given: Any = {
        "seed": 3,
        "batch_size": 8,
        "micro_batch": 4,
        "workers": count,
        "timeout_s": timeout_s,
    }
    config = importlib.import_module("cmt_mae.data.pack").PackConfig("", "", 8, workers=count)
    config.timeout_s = timeout_s
    return {
        "pretrain_batches": lambda: loader.pretrain_batches(images, crops, noise_length=3, **given),
        "eval_batches": lambda: loader.eval_batches(
            images, size=(8, 8), batch_size=4, workers=count, timeout_s=timeout_s
        ),
        "train_batches": lambda: tasks.train_batches(Read(images), np.stack, IMAGES, **given),
        "each_once": lambda: tasks.each_once(
            Read(images), np.stack, range(IMAGES), batch_size=4, workers=count, timeout_s=timeout_s
        ),
        "pack": lambda: _squares(images, config),
    }


def on_loaders(options: Options, chance: random.Random, verdict: Verdict) -> None:
    """One accident at a random moment in each trial; what comes out is compared, and the longest wait."""
    rounds = 1 if options.quick else 5
    figures: Counter[str] = Counter()
    slowest: dict[str, float] = {}
    names = list(streams(Images(options.folder), 0, 0))
    trials = [
        (n, how) for n in names for how in (*OUTSIDE, *INSIDE) if n != "pack" or how in INSIDE
    ]
    trials = chance.sample(trials, 3) if options.quick else trials * rounds
    for number, (name, how) in enumerate(trials):
        folder = options.folder / f"trial{number}"
        folder.mkdir()
        moment = chance.randrange(1, 5 if options.quick else STEPS - 3)
        fatal = chance.randrange(IMAGES)
        ended = measure(partial(disturbed, folder, name, how, moment, fatal), 60)
        verdict.trials += 1
        fault = ended.fault() or (ended.value if ended.kind == "refused" else None)
        if fault is None:
            wrong, wait, hurt, said = ended.value
            hang = how.startswith(("SIGSTOP", "endless"))
            if wrong:
                fault = wrong
            elif wait > (TIMEOUT_S if hang else 0) + SLACK_S:
                fault = f"noticed after {wait:.1f} s"
            elif hurt and not (
                "loader worker" in said and "process" in said and "it was to read" in said
            ):
                # unnoticed: a worker that had nothing more to do, or read ahead what nobody asked for
                fault = f"not named: {said!r}" if said else None
            figures["accidents"] += hurt
            figures["noticed"] += bool(said)
            kind = "hang" if hang else "death"
            slowest[kind] = max(slowest.get(kind, 0.0), wait)
        if fault is not None:
            verdict.failures.append(f"{name}, {how} at {moment}, image {fatal}: {fault}")
    verdict.figures["loaders"] = dict(figures)
    verdict.figures["longest wait for a batch, s"] = {k: round(v, 1) for k, v in slowest.items()}
    verdict.figures["time limit in these trials, s"] = TIMEOUT_S


def disturbed(
    folder: Path, name: str, how: str, moment: int, fatal: int, _: Progress
) -> tuple[str, float, int, str]:
    """(what is wrong, longest wait for a batch, accidents, what was said) of one loader."""
    torch.set_num_threads(1)
    inside = how in INSIDE
    whole = streams(Images(folder), 0, 0)[name]()
    expected = [flat(item) for item in itertools.islice(whole, STEPS if name != "pack" else IMAGES)]
    heard: list[str] = []
    ear = logging.Handler()
    ear.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("cmt_mae").addHandler(ear)
    images = Images(folder, how, fatal) if inside else Images(folder)
    stream = streams(images, 2, TIMEOUT_S)[name]()
    found, longest, hurt = [], 0.0, 0
    for number in range(len(expected)):
        if number == moment and not inside:
            time.sleep(0.1)  # some answers are on their way
            running = multiprocessing.active_children()
            victims = running if how.endswith("all") else running[:1]
            for victim in victims:
                os.kill(victim.pid or 0, getattr(signal, how.split()[0]))
            hurt = len(victims)
        begin = time.monotonic()
        found.append(flat(next(stream)))
        longest = max(longest, time.monotonic() - begin) if number else 0.0
    stream.close()  # type: ignore[attr-defined]
    left = multiprocessing.active_children()
    hurt = len(list(folder.glob("accident*"))) if inside else hurt
    wrong = "" if found == expected else "other batches"
    return (
        wrong or (f"{len(left)} workers are left" if left else ""),
        longest,
        hurt,
        " ".join(heard),
    )


def always(options: Options, verdict: Verdict) -> None:
    """An image that kills whoever reads it: one line with its name, and no worker is left."""
    names = list(streams(Images(options.folder), 0, 0))
    for name in names[:1] if options.quick else names:
        for how in ("exit",) if options.quick else ("exit", "endless read"):
            folder = options.folder / f"always {name} {how}"
            folder.mkdir()
            ended = measure(partial(until_it_ends, folder, name, how), 120)
            verdict.trials += 1
            told = str(ended.value)
            if (
                ended.fault()
                or ended.kind != "value"
                or "4 times in a row: loader worker" not in told
            ):
                verdict.failures.append(f"{name}, {how} always: {ended.fault() or told}")
            verdict.figures["stopped in"] = f"{ended.seconds:.1f} s"


def until_it_ends(folder: Path, name: str, how: str, _: Progress) -> str:
    """The line with which a loader gives up."""
    images = Images(folder, how, fatal=40, times=100)
    try:
        for _ in itertools.islice(streams(images, 2, TIMEOUT_S)[name](), 40):
            pass
    except InputError as error:
        return str(error) if not multiprocessing.active_children() else "workers are left"
    return "it went on"


# --- commands ---------------------------------------------------------------------------------------


def on_commands(tiny: Tiny, options: Options, chance: random.Random, verdict: Verdict) -> None:
    """Whole runs whose workers are killed or stopped from outside end with the undisturbed weights."""
    kinds: dict[str, tuple[Callable[[Path], list[str]], int]] = {
        "pretrain": (lambda out: tiny.pretrain(tiny.photos, out, "--data.workers=2",
        f"--data.timeout_s={TIMEOUT_S}", f"--epochs={2 if options.quick else 6}"), 12),
        "finetune": (lambda out: tiny.finetune(out, "--workers=2", f"--timeout_s={TIMEOUT_S}"), 6),
        "ade20k": (lambda out: tiny.segmentation(out, "--workers=2", f"--timeout_s={TIMEOUT_S}"), 4),
    }  # fmt: skip
    figures: Counter[str] = Counter()
    for name, (words, count) in kinds.items():
        if options.quick and name != "pretrain":
            continue
        whole = options.folder / f"{name} whole"
        if (status := Launch(words(whole), options.folder / "log").start().finish()) != [0]:
            verdict.failures.append(f"{name}: undisturbed, status {status}")
            continue
        for number in range(1 if options.quick else count):
            how = (signal.SIGSTOP, signal.SIGKILL)[number % 2]
            out = options.folder / f"{name} {number}"
            log = options.folder / f"log {name} {number}"
            begin = time.monotonic()
            launch = Launch(words(out), log).start()
            hurt = hurt_workers(launch, out, how, chance)
            status = launch.finish(90)
            verdict.trials += 1
            figures[f"{name}: {how.name}"] += hurt
            figures["noticed"] += log.read_text(errors="replace").count(
                "the workers are started again"
            )
            where = f"{name} {number}, {how.name}"
            if status != [0]:
                verdict.failures.append(f"{where}: status {status}: {log.read_text()[-300:]}")
            elif places := apart(last_state(whole), last_state(out)):
                verdict.failures.append(f"{where}: other weights: {places[:3]}")
            figures["slowest run, s"] = max(
                figures["slowest run, s"], round(time.monotonic() - begin)
            )
    verdict.figures["commands"] = dict(figures)


def hurt_workers(launch: Launch, out: Path, how: signal.Signals, chance: random.Random) -> int:
    """Wait for a random line of the run's metrics, then kill or stop one of its workers."""
    lines = chance.randrange(1, 4)
    metrics = out / "metrics.jsonl"
    while launch.running():
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= lines:
            found = descendants(launch.pids[0])
            if found:
                os.kill(chance.choice(found), how)
                return 1
        time.sleep(0.005)
    return 0


def no_room(tiny: Tiny, folder: Path, verdict: Verdict) -> None:
    """/dev/shm of 64 KiB, as in a container: workers cannot hand over their batches, and the run says so."""
    if os.geteuid() != 0:
        verdict.figures["no room in /dev/shm"] = "not tried: a mount needs root"
        return
    libc = ctypes.CDLL(None, use_errno=True)

    def shrink() -> None:
        if libc.unshare(0x20000) != 0:  # a mount namespace of its own
            raise OSError(ctypes.get_errno(), "unshare")
        libc.mount(b"none", b"/", None, 0x44000, None)  # private, with all below
        if libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=64k") != 0:
            raise OSError(ctypes.get_errno(), "mount")

    words = tiny.pretrain(tiny.photos, folder / "no room", "--data.workers=2")
    ended = call_forked(words, folder, 120, shrink)
    verdict.trials += 1
    fault = fault_in(ended)
    if fault is None and not (ended.status == 2 and "/dev/shm" in ended.line()):
        fault = f"status {ended.status}"
    if fault is not None:
        verdict.failures.append(f"/dev/shm of 64 KiB: {fault}: {ended.line()} {ended.err[-600:]}")
    verdict.figures["no room in /dev/shm"] = ended.line()


def settings(verdict: Verdict) -> None:
    """The time limit is on by default, in every command with loader processes, and told by --help."""
    told = []
    for command, entry in {**COMMANDS, **{f"evaluate {k}": v for k, v in EVALUATIONS.items()}}.items():
        kind, _ = load(entry)
        fields = {field.name: field for field in dataclasses.fields(kind)}
        if command == "demo" or ("workers" not in fields and command != "pretrain"):
            continue  # the demo's runs have the defaults of those commands
        verdict.trials += 1
        default = kind().data.timeout_s if command == "pretrain" else fields["timeout_s"].default
        text = call([*command.split(), "--help-all"]).out
        if default != workers.TIMEOUT_S or not 0 < default < 600 or "timeout_s" not in text:
            verdict.failures.append(
                f"{command}: time limit {default}, in --help: {'timeout_s' in text}"
            )
        told.append(command)
    verdict.figures["commands with a time limit by default"] = (
        f"{', '.join(told)}: {workers.TIMEOUT_S:g} s"
    )
