"""A checkpoint is complete or invisible: torn writes, flipped bits, disks that refuse, two runs in one folder."""

import contextlib
import io
import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults.campaign import Options, Verdict
from benchmarks.faults.disks import forbidden, full_disk
from benchmarks.faults.sameness import steps_done
from benchmarks.faults.tiny import Fault, Launch, Tiny, prepare, remove
from cmt_mae.core.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    load_last,
    mark_best,
    rotate,
    save_checkpoint,
)
from cmt_mae.core.errors import InputError


def campaign(options: Options) -> Verdict:
    """Small files exhaustively, a real run's at random; then the disk's refusals under whole runs."""
    verdict = Verdict(
        "a checkpoint is complete or invisible: the run stops with one line and exit 2, the previous checkpoint "
        "loads, every flipped bit is noticed, and one process at a time works in a run directory"
    )
    rng, counts = random.Random(options.seed), Counter[str]()
    tiny = prepare(options.folder / "data")
    whole = _undisturbed(tiny, options.folder / "whole", verdict)
    torn_small(options.folder / "torn", 37 if options.quick else 1, rng, verdict, counts)
    _torn_real(options, whole, rng, verdict, counts)
    _killed_writes(options, verdict, counts)
    full_disk(tiny, options, whole, rng, verdict, counts)
    forbidden(tiny, options, whole, verdict, counts)
    _two_runs(tiny, options, rng, verdict, counts)
    verdict.trials = sum(n for name, n in counts.items() if not name.startswith("of these"))
    verdict.figures = {
        **dict(counts),
        "bytes of the real checkpoint": _newest(whole).stat().st_size,
    }
    return verdict


def _undisturbed(tiny: Tiny, folder: Path, verdict: Verdict) -> Path:
    launch = Launch(tiny.pretrain(tiny.packed, folder / "run"), folder / "log").start()
    if any(launch.finish()):
        verdict.failures.append(f"the undisturbed run failed: {launch.said()[-300:]}")
    return folder / "run"


def _newest(run: Path) -> Path:
    return list_checkpoints(run / "checkpoints")[-1]


# ---- torn and flipped files


def _small(step: int) -> dict[str, Any]:
    return {"step": step, "w": torch.full((3,), float(step))}


def torn_small(
    folder: Path, every: int, rng: random.Random, verdict: Verdict, counts: Counter[str]
) -> None:
    """A checkpoint cut at every (or every so many) length and with every byte hurt; its checksum file too."""
    save_checkpoint(folder, 1, _small(1))
    small = save_checkpoint(folder, 2, _small(2))
    places = range(0, small.stat().st_size, every)
    _hurt(small, 1, places, places, rng, verdict, counts, "a small checkpoint")
    sidecar = small.with_suffix(".sha256")
    content = sidecar.read_bytes()
    for at in range(0, len(content), -(-every // 8)):
        for bit in range(8):
            hurt = bytearray(content)
            hurt[at] ^= 1 << bit
            sidecar.write_bytes(hurt)
            _falls_back(folder, 1, f"bit {bit} of byte {at} of the checksum flipped", verdict)
            counts["flipped bits of a checksum file"] += 1
    sidecar.write_bytes(content)


def _torn_real(
    options: Options, whole: Path, rng: random.Random, verdict: Verdict, counts: Counter[str]
) -> None:
    """The same at random places of a real run's checkpoint."""
    real = options.folder / "torn_real"
    shutil.copytree(whole / "checkpoints", real)
    paths = list_checkpoints(real)
    before, size = int(load_checkpoint(paths[-2])["step"]), paths[-1].stat().st_size
    places = [rng.randrange(size) for _ in range(10 if options.quick else 400)]
    _hurt(paths[-1], before, places, places, rng, verdict, counts, "a real checkpoint")


def _hurt(
    path: Path, before: int, lengths: Any, places: Any, rng: random.Random, verdict: Verdict,
    counts: Counter[str], what: str,
) -> None:  # fmt: skip
    content = path.read_bytes()
    for length in lengths:
        path.write_bytes(content[:length])
        _falls_back(path.parent, before, f"{what} cut to {length} bytes", verdict)
        counts[f"torn writes of {what}"] += 1
    for at in places:
        hurt = bytearray(content)
        hurt[at] ^= 1 << rng.randrange(8)
        path.write_bytes(hurt)
        _falls_back(path.parent, before, f"byte {at} of {what} flipped", verdict)
        counts[f"flipped bits of {what}"] += 1
    path.write_bytes(content)
    if load_last(path.parent)["step"] == before:  # type: ignore[index]
        verdict.failures.append(f"{what}, whole again, is not loaded")


def _falls_back(folder: Path, step: int, what: str, verdict: Verdict) -> None:
    """``load_last`` returns the checkpoint before, with one line of warning."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            state = load_last(folder)
    except Exception as error:
        verdict.failures.append(f"{what}: {type(error).__name__}: {error}")
        return
    if state is None or state["step"] != step:
        verdict.failures.append(f"{what}: loaded step {state and state['step']}")
    elif said.getvalue().count("\n") != 1 or "is damaged" not in said.getvalue():
        verdict.failures.append(f"{what}: warned {said.getvalue()!r}")


def _killed_writes(options: Options, verdict: Verdict, counts: Counter[str]) -> None:
    """SIGKILL at every file operation and byte of: a first write, a second write of it, best, rotation."""
    folder = options.folder / "killed"

    def work(_: int) -> None:
        save_checkpoint(folder, 2, _small(2))
        save_checkpoint(folder, 2, {**_small(2), "evaluated": True})
        mark_best(folder / "step_00000002.pt")
        rotate(folder, 1, lambda _: False)
        os._exit(0)

    def once(fault: Fault | None) -> Launch:
        remove(folder)
        save_checkpoint(folder, 1, _small(1))
        mark_best(folder / "step_00000001.pt")
        launch = Launch(
            [f"--out={folder}"], options.folder / "killed.log", fault=fault, prepare=work
        )
        launch.start().finish()
        return launch

    totals = once(None).counters.read()
    for kind in ("file", "byte"):
        for at in range(
            0, totals[kind], {"file": 1, "byte": 16}[kind] * (30 if options.quick else 1)
        ):
            launch = once(Fault(kind, at))
            counts[f"kills in saving, marking and rotating, at each {kind}"] += 1
            if launch.statuses != [-signal.SIGKILL]:
                verdict.failures.append(
                    f"{kind} {at}: not killed, {launch.statuses}: {launch.said()[-200:]}"
                )
            for path in [*list_checkpoints(folder), folder / "best.pt"]:
                try:
                    load_checkpoint(path)
                except InputError as error:
                    verdict.failures.append(f"killed at {kind} {at}: {error}")
            if not list_checkpoints(folder):
                verdict.failures.append(f"killed at {kind} {at}: no checkpoint left")


# ---- two runs at once


def _two_runs(
    tiny: Tiny, options: Options, rng: random.Random, verdict: Verdict, counts: Counter[str]
) -> None:
    """Starts at the same moment: one works, the other is told by whom; and no lock outlives a kill."""
    run, log = options.folder / "two" / "run", options.folder / "two" / "log"
    words = tiny.pretrain(tiny.packed, run, "--data.workers=2", "--epochs=40")
    for number in range(1 if options.quick else 8):
        launches = [Launch(words, log.with_name(f"{number}{n}.log")) for n in range(2)]
        for launch in launches:
            launch.start()
            time.sleep(rng.random() * 0.05)
        while all(launch.running() for launch in launches) or not steps_done(run):
            time.sleep(0.002)
            if not any(launch.running() for launch in launches):
                break
        working = [launch for launch in launches if launch.running()]
        refused = [launch for launch in launches if not launch.running()]
        counts["two starts at once"] += 1
        if len(working) != 1 or refused[0].finish() != [2]:
            verdict.failures.append(
                f"two starts: {len(working)} work: {refused and refused[0].said()[-300:]}"
            )
        elif (
            f"in use by pid {working[0].pids[0]} on {os.uname().nodename}" not in refused[0].said()
        ):
            verdict.failures.append(f"two starts: {refused[0].said()[-300:]}")
        for launch in working:
            launch.kill()
            launch.finish()
        # its two workers still live for seconds: a lock they had inherited would refuse this start
        after = Launch(tiny.pretrain(tiny.packed, run, "--epochs=40"), log).start()
        while after.running() and "continuing" not in after.said():
            time.sleep(0.002)
        counts["starts right after a kill, workers alive"] += 1
        if not after.running():
            verdict.failures.append(f"a stale lock: {after.finish()}: {after.said()[-300:]}")
        else:
            after.kill()
            after.finish()
        remove(run)
        log.unlink(missing_ok=True)
