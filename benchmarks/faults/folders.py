"""Faults of run folders, of what lies in them, and of disks: nothing lost, nothing mixed."""

import random
import resource
import shutil
import subprocess
from pathlib import Path

from benchmarks.faults.lab import Broken, Lab, Row, rows_of
from benchmarks.faults.launch import Launch, judged
from benchmarks.faults.runs import EXACT, whole_so_far
from benchmarks.faults.same import steps_done
from cmt_mae.core.checkpoint import (
    list_checkpoints,
)

# --- folders --------------------------------------------------------------------------------------------------


def sidecar_gone(lab: Lab, _: random.Random) -> None:
    """The newest checkpoint without its .sha256 is named in a warning before older ones are used."""
    run = lab.copy_of_finished()
    newest = list_checkpoints(run / "checkpoints")[-1]
    newest.with_suffix(".sha256").unlink()
    launch = Launch(lab.pretrain(run), run.parent / "log").start()
    launch.finish()
    if newest.name not in launch.said() and newest.stem not in launch.said():
        raise Broken(f"nothing is said of {newest.name}: {launch.statuses} {launch.last()}")


def store_flipped(lab: Lab, rng: random.Random) -> None:
    """A flipped byte in the store of the teacher's outputs is noticed, never learnt from."""
    run = lab.fresh() / "run"
    store = run.parent / "store"
    more = ("--data.crops=fixed", "--teacher.cache=true", f"--teacher.cache_folder={store}")
    words = lab.pretrain(run, *more)
    if any(Launch(words, run.parent / "log").start().finish()):
        raise Broken(f"undisturbed: {(run.parent / 'log').read_text()[-300:]}")
    files = [p for p in store.rglob("*") if p.is_file() and p.stat().st_size > 5000]
    if not files:
        raise Broken("the store holds no large file")
    path = rng.choice(files)
    content = bytearray(path.read_bytes())
    for place in rng.sample(range(len(content)), 50):
        content[place] ^= 0x55
    path.write_bytes(content)
    again = run.parent / "again"
    launch = Launch(lab.pretrain(again, *more), run.parent / "again.log").start()
    (status,) = launch.finish()
    if status == 0 and (rows_same(run, again) or "store" in launch.said() or "damaged" in launch.said()):
        return
    if status != 2:
        raise Broken(f"{path.name} flipped: status {status}, another loss curve, no word: {launch.last()}")


def rows_same(one: Path, two: Path) -> bool:
    """Whether two runs have the same loss curve."""
    return [r["loss"] for r in rows_of(one)] == [r["loss"] for r in rows_of(two)]


# --- checkpoints and disks ---------------------------------------------------------------------------------


def full_disk(lab: Lab, rng: random.Random) -> None:
    """No room (a small tmpfs, else a limit on the size of files): one line, exit 2; with room the same end."""
    whole = lab.finished("pretrain", lab.pretrain)
    folder = lab.fresh()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m,mode=1777", "tmpfs", str(folder)], capture_output=True, check=False
    ).returncode == 0  # fmt: skip
    try:
        run = folder / "run"
        if rng.random() < 0.5:  # a run that is under way
            launch = Launch(lab.pretrain(run), folder / "first.log").start()
            launch.until(lambda: len(steps_done(run)) >= 3)
            launch.kill()
            launch.finish()
        room = rng.randrange(1 << 20)

        def fill() -> None:
            if mounted:
                (folder / "filler").write_bytes(b"x" * max(0, shutil.disk_usage(folder).free - room))
            else:
                limit = rng.randrange(250_000)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        ended = judged(lab.pretrain(run), lab.folder, 60, prepare=fill)
        if fault := ended.fault():
            raise Broken(f"{room // 1024} KiB of room: {fault}")
        whole_so_far(run) if run.exists() else None
        (folder / "filler").unlink(missing_ok=True)
        lab.ends_as(whole, lab.pretrain(run))
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


# --- the table ------------------------------------------------------------------------------------------

ROWS = [
    Row("checkpoint without checksum", "named in a warning before an older one is used", sidecar_gone),
    Row("teacher's store damaged", "noticed, never learnt from", store_flipped, 3),
    Row("full disk", f"one line, exit 2; with room {EXACT}", full_disk, 6),
]  # fmt: skip
