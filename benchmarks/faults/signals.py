"""SIGTERM and SIGINT: a checkpoint within one step, exit 75, the same end; a second one leaves at once."""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.faults.campaign import Options, Verdict
from benchmarks.faults.sameness import differences, loads, steps_done
from benchmarks.faults.tiny import Launch, Tiny, descendants, prepare, remove
from cmt_mae.engine.signals import ONE_REQUEST_S

STOPPED = 75
EVERY_LINE = "--log_every=1"


@dataclass
class Case:
    """A command that is stopped politely."""

    name: str
    words: Callable[[Tiny, Path], list[str]]
    processes: int = 1
    real: bool = False
    trials: int = 8


CASES = (
    Case("pretrain", lambda t, out: t.pretrain(t.packed, out, "--runtime.log_every=1"), trials=10),
    Case(
        "pretrain, 2 workers, accumulation",
        lambda t, out: t.pretrain(
            t.photos, out, "--runtime.log_every=1", "--data.workers=2", "--runtime.micro_batch=4"),
    ),
    Case(
        "pretrain, 2 processes",
        lambda t, out: t.pretrain(t.packed, out, "--runtime.log_every=1"), processes=2,
    ),
    Case("evaluate finetune", lambda t, out: t.finetune(out, EVERY_LINE)),
    Case("evaluate ade20k", lambda t, out: t.segmentation(out), trials=4),
    Case(
        "torchrun, 2 processes: pretrain",
        lambda t, out: t.pretrain(t.packed, out, "--runtime.log_every=1", "--epochs=400"),
        processes=2, real=True, trials=2,
    ),
)  # fmt: skip
QUICK = (2,)
IMPATIENT = ("the checkpoint", "the loop")
"""When the second signal comes."""


def campaign(options: Options) -> Verdict:
    """Random moments of every command; the log line of every step tells how far it was."""
    verdict = Verdict(
        "SIGTERM or SIGINT: a checkpoint within one step and exit 75 in every process, the restart ends with the "
        "same bits; a second signal leaves at once and the previous checkpoint loads"
    )
    rng, counts = random.Random(options.seed), Counter[str]()
    delays: list[float] = []
    tiny = prepare(options.folder / "data")
    for number, case in enumerate(CASES):
        if options.quick and number not in QUICK:
            continue
        folder = options.folder / f"case{number}"
        words = case.words(tiny, folder / "run")
        if not case.real:
            first = Launch(words, folder / "whole.log", case.processes).start()
            if any(first.finish()):
                verdict.failures.append(
                    f"{case.name}: undisturbed run failed: {first.said()[-300:]}"
                )
                continue
            (folder / "run").rename(folder / "whole")
        for trial in range(1 if options.quick else case.trials):
            which = (signal.SIGTERM, signal.SIGINT)[trial % 2]
            _polite(case, words, folder, which, rng, verdict, counts, delays)
    for moment in IMPATIENT * (1 if options.quick else 4):
        _impatient(moment, tiny, options.folder / "twice", rng, verdict, counts)
    verdict.trials = sum(counts.values()) - counts["too late"]
    verdict.figures = {
        "stops": dict(counts),
        "seconds from signal to exit, longest": round(max(delays, default=0.0), 2),
    }
    return verdict


def _polite(
    case: Case, words: list[str], folder: Path, which: signal.Signals, rng: random.Random,
    verdict: Verdict, counts: Counter[str], delays: list[float],
) -> None:  # fmt: skip
    """One signal to one process at a random step; the checkpoint, the statuses, the restart."""
    run, log = folder / "run", folder / f"{rng.random()}.log"
    total = len(steps_done(folder / "whole")) if not case.real else 12
    wanted, rank = rng.randrange(1, max(2, total)), rng.randrange(case.processes)
    launch = Launch(words, log, case.processes, case.real).start()
    while launch.running() and len(steps_done(run)) < wanted:
        time.sleep(0.001)
    target = launch.pids[0] if case.real else launch.pids[rank]
    writer = launch.pids[0]
    if case.real:  # torchrun passes it on; the first child is rank 0, the one that logs
        found = [
            p for p in descendants(writer) if b"cmt_mae" in Path(f"/proc/{p}/cmdline").read_bytes()
        ]
        writer = min(found, default=writer)
    time.sleep(rng.random() * 0.03)
    if not launch.running():
        launch.finish()
        remove(run)
        counts["too late"] += 1
        return
    os.kill(writer, signal.SIGSTOP)  # so that the last line is that of the moment of the signal
    time.sleep(0.01)
    before = max(steps_done(run), default=0)
    os.kill(target, which)
    os.kill(writer, signal.SIGCONT)
    begin = time.monotonic()
    statuses = launch.finish()
    delays.append(time.monotonic() - begin)
    where = f"{case.name}, {which.name} to rank {rank} after step {before}"
    last = max(steps_done(folder / "whole"), default=0) if not case.real else before
    if statuses == [0] * len(statuses) and before > last - 2:  # it had just ended
        counts["too late"] += 1
    else:
        counts[f"{case.name}, {which.name}"] += 1
        expected = [STOPPED] if not case.real else [1]  # torchrun has a status of its own
        if set(statuses) != set(expected):
            verdict.failures.append(f"{where}: statuses {statuses}: {launch.said()[-300:]}")
        if loads(run) not in (before, before + 1):
            verdict.failures.append(f"{where}: the checkpoint is of step {loads(run)}")
        if launch.said().count("run the same command to continue") != case.processes:
            verdict.failures.append(f"{where}: no line, or more than one: {launch.said()[-300:]}")
        if not case.real:
            if Launch(words, log, case.processes).start().finish() != [0] * case.processes:
                verdict.failures.append(f"{where}: the restart failed")
            verdict.failures += [
                f"{where}: {x}" for x in differences(folder / "whole", run, stopped=True)
            ]
    remove(run)


def _impatient(
    moment: str,
    tiny: Tiny,
    folder: Path,
    rng: random.Random,
    verdict: Verdict,
    counts: Counter[str],
) -> None:
    """A second signal while the first one's checkpoint is being written slowly, or while a step hangs."""
    run, log = folder / "run", folder / "log"
    words = tiny.pretrain(tiny.packed, run, "--runtime.log_every=1")

    def slow(_: int) -> None:
        from cmt_mae.core import checkpoint
        from cmt_mae.engine.trainer import Trainer

        write, step = checkpoint._Hashed.write, Trainer.step

        def slow_write(self: Any, data: bytes) -> int:
            if _step_of(self) > 6:
                time.sleep(0.2)
            return write(self, data)

        def slow_step(self: Trainer, batches: Any, number: int) -> Any:
            if number == 6:
                time.sleep(60)
            return step(self, batches, number)

        if moment == "the checkpoint":
            checkpoint._Hashed.write = slow_write  # type: ignore[method-assign]
        else:
            Trainer.step = slow_step  # type: ignore[method-assign]

    launch = Launch(words, log, prepare=slow).start()
    while launch.running() and not (run / "checkpoints" / "step_00000006.pt").exists():
        time.sleep(0.002)
    time.sleep(0.05)
    first, second = rng.choice(((signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM)))
    launch.kill(0, first)
    time.sleep(ONE_REQUEST_S + 0.3)
    was_running = launch.running()
    launch.kill(0, second)
    begin = time.monotonic()
    statuses = launch.finish(20)
    seconds = time.monotonic() - begin
    where = f"second signal during {moment}"
    counts[where] += 1
    if not was_running or statuses != [128 + second] or seconds > 1:
        verdict.failures.append(
            f"{where}: status {statuses} after {seconds:.1f} s: {launch.said()[-300:]}"
        )
    if loads(run) != 6:
        verdict.failures.append(
            f"{where}: the newest checkpoint is of step {loads(run)}, not of step 6"
        )
    if Launch(words, log).start().finish() != [0]:
        verdict.failures.append(f"{where}: the restart failed: {launch.said()[-300:]}")
    if not (folder / "whole").exists():
        whole = folder / "aside"
        run.rename(whole)
        Launch(words, folder / "whole.log").start().finish()
        run.rename(folder / "whole")
        whole.rename(run)
    verdict.failures += [f"{where}: {x}" for x in differences(folder / "whole", run, stopped=True)]
    remove(run)


def _step_of(hashed: Any) -> int:
    """Step of the checkpoint that this writer makes, by its file's name."""
    return int(Path(hashed.file.name).name.split("_")[1].split(".")[0])
