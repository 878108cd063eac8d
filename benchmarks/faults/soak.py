"""Twenty thousand steps with a checkpoint each 200: does anything grow that should not?

A step costs milliseconds (16 px, 4 patches, width 16), so that a day's worth of checkpoints, lines of metrics and
epochs passes in minutes. Sampled from outside, in /proc, while ``python -m cmt_mae pretrain`` runs.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.faults import tiny
from benchmarks.faults.campaign import Options, Verdict
from benchmarks.faults.sameness import steps_done

EACH = 200
"""Steps between two checkpoints."""
WORDS = [
    "--student.img_size=[16]", "--student.patch_size=8", "--student.depth=1", "--student.heads=1",
    "--decoder.heads=1", "--student.drop_path=0", "--batch_size=2",
    "--data.max_bad=1", f"--runtime.checkpoint_every={EACH / 20}", "--runtime.log_every=100",
    "--optim.blr=0.001", "--optim.warmup_epochs=1",
]  # fmt: skip
PER_1000_STEPS_KB = 100.0
"""Growth of a process that would be a leak: 100 bytes a step. Measured on the second half of each stage."""


@dataclass
class Sample:
    """One look at a running process (its loader processes taken together with it)."""

    step: int
    memory_kb: int
    """Anonymous memory: libraries mapped from files, which the system takes and brings back, are left out."""
    descriptors: int
    threads: int
    processes: int
    files: int
    """In the run directory besides checkpoints and pictures."""
    disk_kb: int


@dataclass
class Curve:
    """What was sampled in one run."""

    samples: list[Sample] = field(default_factory=list)
    seconds: float = 0.0
    status: int = 0
    said: str = ""

    def slope(self, first: int, last: int) -> float:
        """KB of memory a 1000 steps: median of the slopes of any two samples between two steps (Theil, Sen)."""
        there = [(s.step / 1000, s.memory_kb) for s in self.samples if first <= s.step <= last]
        if len(there) < 3:
            return 0.0
        steps, sizes = np.array(there, dtype=np.float64).T
        return float(stats.theilslopes(sizes, steps)[0])

    def least(self, name: str, first: int, last: int) -> int:
        """Smallest value between two steps."""
        return min((getattr(s, name) for s in self.samples if first <= s.step <= last), default=0)

    def most(self, name: str, first: int, last: int) -> int:
        """Largest value between two steps."""
        return max((getattr(s, name) for s in self.samples if first <= s.step <= last), default=0)


def campaign(options: Options) -> Verdict:
    """A long run without loader processes, a shorter one with two."""
    verdict = Verdict(
        f"A long run with a checkpoint each {EACH} steps grows in memory, descriptors, threads, processes and "
        "files by nothing but what is kept on purpose"
    )
    work = tiny.prepare(options.folder / "data_")
    lengths = ((800, 0),) if options.quick else ((20_000, 0), (4_000, 2))
    for steps, workers in lengths:
        judge(options, work, verdict, steps, workers)
    return verdict


def judge(
    options: Options, work: tiny.Tiny, verdict: Verdict, steps: int, workers: int,
    prepare: Callable[[int], None] | None = None,
) -> None:  # fmt: skip
    """One run; figures and failures into the verdict. prepare: done in the process before (a planted leak)."""
    out = options.folder / f"soak{workers}"
    words = work.pretrain(
        work.packed, out, *WORDS, f"--epochs={steps // 20}", f"--data.workers={workers}"
    )
    curve = sample(words, out, options.quick, prepare)
    name = f"{steps} steps, {workers} loader processes"
    verdict.trials += 1
    if curve.status or steps_done(out)[-1:] != [steps]:
        verdict.failures.append(f"{name}: exit {curve.status}, {curve.said.splitlines()[-1:]}")
        return
    half, grown = steps // 2, {}
    for stage, begin in (("one", 0), ("two", half)):
        first, middle, last = begin + half // 10, begin + half // 2, begin + half
        slope = curve.slope(middle, last)
        grown[stage] = round(slope, 2)
        if not options.quick and slope > PER_1000_STEPS_KB * (1 + workers):
            verdict.failures.append(
                f"{name}: memory grows by {slope:.0f} KB a 1000 steps in stage {stage}"
            )
        for what in ("descriptors", "threads", "processes", "files"):
            # the least, as a file that is being read or written for a moment is no growth
            early, late = curve.least(what, first, middle), curve.least(what, middle, last)
            if late > early:
                verdict.failures.append(
                    f"{name}: {what} grow from {early} to {late} in stage {stage}"
                )
    kept = sorted(p.name for p in (out / "checkpoints").iterdir())
    if len(kept) != 4:
        verdict.failures.append(f"{name}: {len(kept)} files are kept of the checkpoints: {kept}")
    verdict.figures[name] = {
        "checkpoints written": steps // EACH,
        "seconds": round(curve.seconds, 1),
        "samples": len(curve.samples),
        "memory in MB: after a tenth of stage one, its end, a tenth into stage two, the end": [
            round(at(curve, step) / 1024, 1)
            for step in (half // 10, half - 1, half + half // 10, steps)
        ],
        "growth of memory in KB a 1000 steps, second half of each stage": grown,
        "most descriptors, threads, processes, files": [
            curve.most(what, half // 10, steps)
            for what in ("descriptors", "threads", "processes", "files")
        ],
        "run directory at the end in KB": curve.samples[-1].disk_kb,
        "of it metrics.jsonl and tensorboard": size_kb(out / "metrics.jsonl") + size_kb(out / "tensorboard"),
        "files of the checkpoints": kept,
    }  # fmt: skip
    tiny.remove(out)


def sample(words: list[str], out: Path, fork: bool, prepare: Callable[[int], None] | None) -> Curve:
    """Run the command and look at it every second (or four times in one). fork: no interpreter of its own."""
    launch = tiny.Launch(words, out.with_suffix(".log"), real=not fork, prepare=prepare).start()
    curve, begin = Curve(), time.monotonic()
    while launch.running():
        done = steps_done(out) if out.exists() else []
        if done:
            look = look_at(launch.pids[0], out, done[-1])
            if look is not None:
                curve.samples.append(look)
        time.sleep(0.25 if fork else 1.0)
    curve.status, curve.said = launch.finish()[0], launch.said()
    curve.seconds = time.monotonic() - begin
    return curve


def look_at(pid: int, out: Path, step: int) -> Sample | None:
    """A sample, or None where the process has just ended."""
    try:
        family = [pid, *tiny.descendants(pid)]
        memory = [anonymous_kb(p) for p in family]
        threads = [len(os.listdir(f"/proc/{p}/task")) for p in family]
        files = [p for p in out.rglob("*") if p.is_file() and not p.name.startswith(".")]
        return Sample(
            step=step,
            memory_kb=sum(memory),
            descriptors=len(os.listdir(f"/proc/{pid}/fd")),
            threads=sum(threads),
            processes=len(family),
            files=len([p for p in files if not {"checkpoints", "pictures"} & set(p.parts)]),
            disk_kb=sum(p.stat().st_size for p in files) // 1024,
        )
    except OSError:
        return None


def anonymous_kb(pid: int) -> int:
    """Memory of a process that no file stands behind. Raises OSError where it has ended.

    What forks share counts in each: a page that becomes a process's own is no growth.
    """
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1])
    raise OSError(f"process {pid} has ended")


def at(curve: Curve, step: int) -> int:
    """Memory in KB at the last sample up to a step."""
    return next((s.memory_kb for s in reversed(curve.samples) if s.step <= step), 0)


def size_kb(path: Path) -> int:
    """Of a file or of everything in a folder."""
    files: list[Any] = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    return sum(p.stat().st_size for p in files) // 1024
