"""Disks that refuse under whole runs: full, read-only, no longer permitted (a part of checkpoints.py)."""

import contextlib
import os
import random
import resource
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.faults.campaign import Options, Verdict
from benchmarks.faults.sameness import differences, loads, steps_done
from benchmarks.faults.tiny import Launch, Tiny, remove
from cmt_mae.core.checkpoint import list_checkpoints
from cmt_mae.core.errors import InputError

NOBODY = 65534
REFUSALS = (
    "No space left",
    "Permission denied",
    "Read-only file system",
    "File too large",
    "Not a directory",
    "Is a directory",
    "File exists",
)


@contextlib.contextmanager
def _tmpfs(folder: Path, kib: int) -> Iterator[bool]:
    """A small file system of its own, where this user may mount."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k,mode=1777", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def full_disk(
    tiny: Tiny,
    options: Options,
    whole: Path,
    rng: random.Random,
    verdict: Verdict,
    counts: Counter[str],
) -> None:
    """A tmpfs with more and more room (without mount: a limit on the size of files), from the start and midway."""
    trials = 2 if options.quick else 30
    size = list_checkpoints(whole / "checkpoints")[-1].stat().st_size
    with _tmpfs(options.folder / "disk", 4096) as mounted:
        counts["of these: a tmpfs could be mounted"] = int(mounted)
        run = options.folder / "disk" / "run"
        words = tiny.pretrain(tiny.packed, run)
        for number in range(trials):
            room = int(4096 * 1024 * (number + rng.random()) / trials / 4)
            limit = int(size * (number + rng.random()) / trials)

            def fill(_: int, room: int = room, limit: int = limit) -> None:
                if mounted:
                    free = shutil.disk_usage(run.parent).free
                    (run.parent / "filler").write_bytes(b"x" * max(0, free - room))
                else:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

            if number % 2:  # a run that is under way
                launch = Launch(words, options.folder / "disk.log").start()
                while launch.running() and len(steps_done(run)) < 1 + number % 4:
                    time.sleep(0.001)
                launch.kill()
                launch.finish()
            said = f"{room // 1024} KiB of room" if mounted else f"files up to {limit} bytes"
            _refused(words, run, options.folder / f"disk{number}.log", fill, said, verdict, counts)
            (run.parent / "filler").unlink(missing_ok=True)
            _goes_on(words, run, whole, said, options.folder / "disk.log", verdict)
            remove(run)


def _refused(
    words: list[str], run: Path, log: Path, prepare: Callable[[int], None] | None, what: str,
    verdict: Verdict, counts: Counter[str], launch: Launch | None = None,
) -> None:  # fmt: skip
    """Run until it stops: exit 2, one line, and what can be seen is whole; or it had room enough."""
    newest = loads(run) if run.exists() else -1
    launch = launch or Launch(words, log, prepare=prepare).start()
    (status,) = launch.finish()
    lines = [line for line in launch.said().splitlines() if line.startswith("cmt-mae: ")]
    if status == 0:
        counts["of these: room enough, the run ended"] += 1
    elif status != 2 or len(lines) != 1 or "Traceback" in launch.said():
        verdict.failures.append(f"{what}: status {status}: {launch.said()[-400:]}")
    elif not any(refusal in lines[0] for refusal in REFUSALS):
        verdict.failures.append(f"{what}: {lines[0]}")
    else:
        file = lines[0].partition("cannot write ")[2].partition(": ")[0]
        counts[f"of these: refused at {_kind(Path(file).name)}"] += 1
    counts["refusing disks under a run"] += 1
    try:
        if run.exists() and loads(run) < newest:
            verdict.failures.append(f"{what}: the checkpoint of step {newest} is gone")
    except InputError as error:
        verdict.failures.append(f"{what}: {error}")


def _kind(name: str) -> str:
    for part in ("step_", "attention_step_", "backbone"):
        if name.startswith(part):
            return {"step_": "a checkpoint", "attention_step_": "a picture"}.get(part, "a backbone")
    return name or "another place"


def _goes_on(
    words: list[str], run: Path, whole: Path, what: str, log: Path, verdict: Verdict
) -> None:
    """With room again, the same command ends as the undisturbed run."""
    launch = Launch(words, log).start()
    if launch.finish() != [0]:
        verdict.failures.append(f"{what}, then mended: {launch.statuses}: {launch.said()[-300:]}")
        return
    found = [
        d for d in differences(whole, run) if not d.startswith("config.yaml:")
    ]  # it holds --out
    verdict.failures += [f"{what}, then mended: {line}" for line in found]


def forbidden(
    tiny: Tiny, options: Options, whole: Path, verdict: Verdict, counts: Counter[str]
) -> None:
    """Folders that may not be written, from the start and midway; metrics, results and curves that cannot grow."""
    base = options.folder / "forbidden"
    run, log = base / "run", base / "log"
    words = tiny.pretrain(tiny.packed, run)
    root = os.getuid() == 0

    def drop(_: int) -> None:
        if root:  # root is not bound by permissions
            os.setgid(NOBODY)
            os.setuid(NOBODY)

    def slow(rank: int) -> None:
        from cmt_mae.engine.trainer import Trainer

        step = Trainer.step

        def slower(self: Trainer, batches: Any, number: int) -> Any:
            time.sleep(0.05)
            return step(self, batches, number)

        Trainer.step = slower  # type: ignore[method-assign]
        drop(rank)

    def owned(path: Path, mode: int) -> None:
        path.mkdir(parents=True, exist_ok=True)
        os.chmod(path, mode)
        if root:
            os.chown(path, NOBODY, NOBODY)

    os.chmod(options.folder, 0o755)
    for place in ("run",) if options.quick else ("run", "parent"):
        owned(base, 0o755)
        owned(run if place == "run" else base, 0o555)
        _refused(words, run, base / f"{place}.log", drop, f"read-only {place}", verdict, counts)
        os.chmod(base, 0o755)
        remove(run)
    midway = ("", "checkpoints", "checkpoints", "")[: 1 if options.quick else 4]
    for number, part in enumerate(midway):
        owned(base, 0o755)
        owned(run, 0o755)
        each = base / f"midway{number}.log"
        each.touch()
        os.chmod(each, 0o666)
        launch = Launch(words, each, prepare=slow).start()
        while launch.running() and (len(steps_done(run)) < 1 + number % 3 or loads(run) < 0):
            time.sleep(0.002)
        os.chmod(run / part, 0o555)
        said = f"permission for {part or 'the run'} lost midway"
        _refused(words, run, each, None, said, verdict, counts, launch)
        os.chmod(run / part, 0o755)
        _goes_on(words, run, whole, said, log, verdict)
        remove(run)
    launch = Launch(words, base / "full.log", prepare=_slowly(slow)).start()
    while launch.running() and (len(steps_done(run)) < 2 or loads(run) < 0):
        time.sleep(0.002)
    metrics = str(run / "metrics.jsonl")
    kept = Path(metrics).read_bytes()
    if (
        subprocess.run(["mount", "--bind", "/dev/full", metrics], capture_output=True).returncode
        == 0
    ):
        _refused(words, run, base / "full.log", None, "metrics full", verdict, counts, launch)
        subprocess.run(["umount", metrics], check=True)
    else:
        os.unlink(metrics)
        os.mkdir(metrics)
        _refused(words, run, base / "full.log", None, "metrics in the way", verdict, counts, launch)
        os.rmdir(metrics)
    Path(metrics).write_bytes(kept)
    _goes_on(words, run, whole, "metrics could not grow", log, verdict)
    remove(run)
    run.mkdir(parents=True)
    (run / "results").write_text("in the way")
    _refused(
        tiny.linear(run), run, base / "results.log", None, "results in the way", verdict, counts
    )
    remove(run)


def _slowly(slow: Callable[[int], None]) -> Callable[[int], None]:
    """``slow`` without giving up root: the files are swapped by this process."""

    def prepare(rank: int) -> None:
        setuid, setgid = os.setuid, os.setgid
        os.setuid = os.setgid = lambda _: None  # type: ignore[assignment]
        slow(rank)
        os.setuid, os.setgid = setuid, setgid

    return prepare
