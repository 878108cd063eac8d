"""Real commands over folders with broken images, and with everything else that may have an image's name.

Pipes, sockets, devices, links, files that nobody may read or that are deleted meanwhile: pre-training goes on
without them, an evaluation names the one it met.
"""

import contextlib
import os
import shutil
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.faults.calling import Outcome, call_forked, fault_in, in_fork
from benchmarks.faults.campaign import Options, Verdict
from benchmarks.faults.measured import obey_permissions
from benchmarks.faults.pictures import encode, png, zeros
from benchmarks.faults.sameness import apart
from benchmarks.faults.tiny import Tiny
from cmt_mae.core.checkpoint import list_checkpoints, load_checkpoint


@dataclass(frozen=True)
class Runs:
    """One way of training over a folder."""

    workers: int
    broken: int
    """Mutated files in the folder, at most."""
    epochs: int


def fill(folder: Path, chosen: list[tuple[str, bytes]], rng: np.random.Generator) -> set[str]:
    """A folder of 120 good images, of broken ones and of what is none; returns the names that must be told."""
    folder.mkdir(parents=True)
    for number in range(120):
        pixels = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((48, 40), 3).save(folder / f"good {number:03d}.jpg")
    names = set()
    for number, (what, raw) in enumerate(chosen):
        name = f"mutated {number:03d} {what.split(',')[0]}.png"  # whatever it is: suffixes may lie
        (folder / name).write_bytes(raw)
        names.add(name)
    (folder / "good, a png.jpg").write_bytes(png(40, 40, 8, 2, zeros(40 * 121)))
    (folder / "good, a gif.tiff").write_bytes(encode(Image.new("RGB", (40, 40)), "GIF"))
    texts = {
        "empty.jpg": b"", "text.jpg": b"I am no picture", "zeros.png": bytes(5000),
        "bomb.png": png(30000, 30000, 8, 2, zeros(10**6)),
        "two\nlines \x1b[31m.jpg": b"\xff\xd8\xff", "x" * 251 + ".jpg": b"GIF89a",
    }  # fmt: skip
    for name, raw in texts.items():
        (folder / name).write_bytes(raw)
    with open(os.fsencode(folder) + b"/\xff\xfe\xb1.jpg", "wb") as file:
        file.write(b"BM")
    (folder / "to nothing.jpg").symlink_to("nowhere.jpg")
    (folder / "to itself.jpg").symlink_to("to itself.jpg")
    (folder / "secret.jpg").write_bytes((folder / "good 000.jpg").read_bytes())
    os.chmod(folder / "secret.jpg", 0)
    names |= {
        "empty.jpg", "text.jpg", "zeros.png", "bomb.png", "two\\nlines \\x1b[31m.jpg", "x" * 251 + ".jpg",
        "\\xff\\xfe\\xb1.jpg", "to nothing.jpg", "to itself.jpg", "secret.jpg",
    }  # fmt: skip
    # none of these is an image, and none may be waited for
    os.mkfifo(folder / "pipe.jpg")
    (folder / "to a pipe.jpg").symlink_to("pipe.jpg")
    (folder / "to a device.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as one, contextlib.chdir(folder):
        one.bind("socket.jpg")
    (folder / "folder.jpg").mkdir()
    (folder / "loop").symlink_to(".")
    return names


def train_on_folders(
    tiny: Tiny,
    folder: Path,
    chosen: list[tuple[str, bytes]],
    runs: tuple[Runs, ...],
    verdict: Verdict,
) -> None:
    """Pre-training over such a folder, with and without loader processes: to its end, all of them named."""
    told: list[tuple[str, Path]] = []
    for one in runs:
        workers, count = one.workers, one.broken
        place = folder / f"photos{workers}"
        wanted = fill(place, chosen[:count], np.random.default_rng(5))
        out = folder / f"run{workers}"
        words = tiny.pretrain(str(place), out, f"--data.workers={workers}", "--batch_size=16")
        words += ["--data.max_bad=0.95", f"--epochs={one.epochs}"]
        ended = call_forked(words, folder, 200, obey_permissions)
        verdict.trials += 1
        check_run(f"{workers} workers", ended, out, wanted, verdict)
        told.append((f"{workers} workers", out))
        delete_during(tiny, folder, workers, 7 * one.epochs, verdict)
        words = tiny.pretrain(str(place), folder / f"strict{workers}", f"--data.workers={workers}")
        words.append("--data.max_bad=0.01")
        if len(runs) == 1:
            continue  # a quick campaign
        strict = call_forked(words, folder, 200, obey_permissions)
        verdict.trials += 1
        fault = fault_in(strict) or (
            None if strict.status == 2 and "cannot be read (first: " in strict.line() else "no line"
        )
        if fault is not None:
            verdict.failures.append(f"too many broken, {workers} workers: {fault}: {strict.line()}")
    if len(told) == 2:
        with_none, with_two = (last_state(out) for _, out in told)
        verdict.trials += 1
        if places := apart(with_none, with_two):
            verdict.failures.append(f"0 and 2 workers trained different weights: {places[:3]}")


def last_state(out: Path) -> Any:
    """The newest checkpoint."""
    checkpoints = list_checkpoints(out / "checkpoints")
    return load_checkpoint(checkpoints[-1]) if checkpoints else {}


def check_run(what: str, ended: Outcome, out: Path, wanted: set[str], verdict: Verdict) -> None:
    """Status 0, no traceback, and bad_images.txt with every broken image and no other."""
    fault = fault_in(ended)
    if fault is not None or ended.status != 0:
        verdict.failures.append(f"{what}: {fault}, status {ended.status}: {ended.line()}")
        return
    lines = (out / "bad_images.txt").read_text(encoding="utf-8").splitlines()
    named = {line.split("\t")[0] for line in lines}
    if not all(len(line.split("\t")) == 2 and line.split("\t")[1] for line in lines):
        verdict.failures.append(f"{what}: a line of bad_images.txt is no name and reason")
    missing = {name for name in wanted - named if "mutated" not in name or " jpeg" not in name}
    missing = {name for name in missing if " mpo" not in name and " photo" not in name}
    if missing or named - wanted:
        verdict.failures.append(
            f"{what}: not named {sorted(missing)[:3]}, wrongly {sorted(named - wanted)[:3]}"
        )
    verdict.figures[f"{what}: broken files in the folder, named"] = f"{len(wanted)}, {len(named)}"


def delete_during(tiny: Tiny, folder: Path, workers: int, epochs: int, verdict: Verdict) -> None:
    """Images deleted, cut and made unreadable while a run reads them."""
    place, out = folder / f"deleted{workers}", folder / f"deleting{workers}"
    shutil.copytree(Path(tiny.photos) / "train", place)
    victims = sorted(place.rglob("*.jpg"))[10:25]
    reached = threading.Event()

    def spoil() -> None:
        metrics = out / "metrics.jsonl"
        while not (metrics.exists() and metrics.stat().st_size) and not reached.wait(0.01):
            pass
        for number, path in enumerate(victims):
            if number % 3 == 0:
                path.unlink()
            elif number % 3 == 1:
                os.truncate(path, 200)
            else:
                os.chmod(path, 0)

    other = threading.Thread(target=spoil)
    words = tiny.pretrain(str(place), out, f"--data.workers={workers}", f"--epochs={epochs}")
    words.append("--runtime.checkpoint_every=5")
    # the thread starts in the fork's parent, after the fork
    starter = threading.Timer(0.2, other.start)
    starter.start()
    ended = call_forked(words, folder, 200, obey_permissions)
    reached.set()
    starter.join()
    other.join()
    verdict.trials += 1
    wanted = {str(path.relative_to(place)) for path in victims}
    wanted |= {name for name, size in sizes(place).items() if size == 200}  # tiny's own two
    check_run(f"deleted during the run, {workers} workers", ended, out, wanted, verdict)


def sizes(place: Path) -> dict[str, int]:
    """Name -> bytes of all files."""
    return {str(p.relative_to(place)): p.stat().st_size for p in place.rglob("*.jpg")}


# --- evaluations ------------------------------------------------------------------------------------

Spoil = Callable[[Path], None]


def replace(path: Path, make: Callable[[Path], Any]) -> None:
    """Put something else in a file's place."""
    path.unlink()
    make(path)


def overwrite(raw: bytes) -> Spoil:
    """Put other bytes into a file."""
    return lambda path: replace(path, lambda p: p.write_bytes(raw))


SPOILED: dict[str, Spoil] = {
    "cut": lambda path: os.truncate(path, path.stat().st_size - 90),
    "text": overwrite(b"I am no picture"),
    "empty": overwrite(b""),
    "bomb": overwrite(png(30000, 30000, 8, 2, zeros(10**6))),
    "nothing": lambda path: replace(path, lambda p: p.symlink_to("nowhere")),
    "itself": lambda path: replace(path, lambda p: p.symlink_to(p.name)),
    "secret": lambda path: os.chmod(path, 0),
    "pipe": lambda path: replace(path, os.mkfifo),
    "folder": lambda path: replace(path, os.mkdir),
}
UNSEEN = ("pipe", "folder")
"""In a folder of classes these are no files, so no images."""


def evaluate_all(tiny: Tiny, options: Options, verdict: Verdict) -> None:
    """Each evaluation with one broken image of each kind: status 2, and one line that names it."""
    data = options.folder / "sets"
    in_fork(lambda: write_sets(tiny, data))
    common = [f"--backbone={tiny.backbone}", "--device=cpu"]
    training = [*common, "--progress=false", "--batch_size=4"]
    small = ["--preset=quick", "--iterations=6", "--crop_size=48", "--channels=8"]
    tasks: dict[str, tuple[str, list[str]]] = {
        "knn": ("classes/val/*/*.jpg", [*common, "--workers=0", "--k=[5]"]),
        "linear": ("classes/train/*/*.jpg", [*common, "--workers=2"]),
        "finetune": ("classes/val/*/*.jpg", [*training, "--workers=2", "--epochs=1"]),
        "ade20k": ("ade20k/images/training/*", [*training, "--workers=2", *small]),
        "coco": ("coco/train2017/*", [*training, "--workers=0", "--preset=quick"]),
        "davis": ("davis/JPEGImages/480p/*/00002.jpg", common),
    }  # fmt: skip
    chosen = list(SPOILED)[:1] if options.quick else list(SPOILED)
    counts: Counter[str] = Counter()
    for task, (pattern, words) in tasks.items():
        if options.quick and task not in ("knn", "davis"):
            continue
        for how in chosen:
            verdict.trials += 1
            place = options.folder / "spoiled"
            name = pattern.split("/")[0]
            shutil.copytree(data / name, place / name, symlinks=True)
            victim = sorted(place.glob(pattern))[3 if task != "davis" else 0]
            SPOILED[how](victim)
            line = ["evaluate", task, f"--data={place / name}", f"--out={options.folder / 'out'}"]
            begin = time.monotonic()
            ended = call_forked([*line, *words], options.folder, 120, obey_permissions)
            fault = fault_in(ended)
            unseen = how in UNSEEN and name == "classes"
            if fault is None and ended.status != (0 if unseen else 2):
                fault = f"status {ended.status}"
            if fault is None and not unseen and victim.name not in ended.line():
                fault = "the image is not named"
            if fault is not None:
                verdict.failures.append(f"{task}, {how}: {fault}: {ended.line()[:300]}")
            counts[task] += 1
            verdict.figures["slowest evaluation, s"] = round(
                max(verdict.figures.get("slowest evaluation, s", 0), time.monotonic() - begin), 1
            )
            shutil.rmtree(place)
            shutil.rmtree(options.folder / "out", ignore_errors=True)
    verdict.figures["evaluations with one broken image"] = dict(counts)


def write_sets(tiny: Tiny, data: Path) -> None:
    """One small data set of each layout, without faults."""
    from cmt_mae.data.sample import write_coco, write_davis, write_imagefolder

    write_imagefolder(data / "classes", 20, 20, 40)
    write_coco(data / "coco", 6, 4)
    write_davis(data / "davis", 1, 5)
    shutil.copytree(tiny.segments, data / "ade20k")
