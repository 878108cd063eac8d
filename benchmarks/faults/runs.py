"""Faults of processes, signals, folders and disks under whole runs."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.faults import hooks
from benchmarks.faults.lab import STOPPED, Broken, Lab, Row, tree
from benchmarks.faults.launch import Launch, descendants, one_thread
from benchmarks.faults.same import differences, loads, steps_done
from cmt_mae.core.errors import InputError

Words = Callable[[Path], list[str]]

# --- kills ------------------------------------------------------------------------------------------------


def commands(lab: Lab) -> dict[str, tuple[Words, int, tuple[str, ...]]]:
    """Command -> (its words in a folder, processes, where kills are placed)."""
    cache = ("--data.crops=fixed", "--teacher.cache=true")
    probe = (f"--runtime.probe_data={lab.packed}", "--runtime.probe_every=1", "--runtime.micro_batch=4")
    return {
        "pretrain": (lab.pretrain, 1, ("time", "file", "byte", "step")),
        "pretrain, accumulation and probe": (lambda out: lab.pretrain(out, *probe), 1, ("file", "byte", "step")),
        "pretrain, photos, 2 workers": (
            lambda out: lab.pretrain(out, "--data.workers=2", data=lab.photos), 1, ("decode", "time"),
        ),
        "pretrain, 2 processes": (
            lambda out: lab.pretrain(out, "--runtime.micro_batch=2"), 2, ("step", "file", "byte", "time"),
        ),
        "pretrain, teacher outputs kept": (lambda out: lab.pretrain(out, *cache), 1, ("file", "step")),
        "evaluate finetune": (lab.finetune, 1, ("time", "file", "byte")),
        "evaluate ade20k": (lab.segmentation, 1, ("time", "file", "byte")),
        "evaluate linear": (lab.linear, 1, ("time", "file")),
    }  # fmt: skip


def kill_and_restart(name: str, lab: Lab, rng: random.Random) -> None:
    """One to three kills -9, each placed by another counter; then the same command to its end."""
    words_in, processes, kinds = commands(lab)[name]
    whole = lab.finished(name, words_in, processes)
    folder = lab.fresh()
    run = folder / "run"
    words = words_in(run)
    first = Launch(words_in(folder / "counted" / "run"), folder / "counted.log", processes).start()
    first.finish()
    totals, seconds = first.counters.read(), time.monotonic() - first.began
    for number in range(rng.randint(1, 3)):
        kind, left = rng.choice(kinds), 1 / (1 + 0.5 * number)  # what is left of a killed run is shorter
        launch = Launch(words, folder / "log", processes)
        if kind == "time":
            launch.start()
            moment = seconds * left * rng.uniform(0.1, 0.9)
            launch.until(lambda: False, limit_s=moment)
            launch.kill(rng.randrange(processes))
        else:
            rank = 0 if kind in ("file", "byte") else rng.randrange(processes)  # rank 0 alone writes
            launch.kill_at = hooks.KillAt(kind, rng.randrange(max(1, int(left * totals[kind]))), rank)
            launch.start()
        launch.finish()
        whole_so_far(run)
    lab.ends_as(whole, words, processes)


def whole_so_far(run: Path) -> int:
    """Step of the newest checkpoint: whatever can be seen is whole."""
    try:
        return loads(run)
    except InputError as error:
        raise Broken(f"what is left cannot be loaded: {error}") from error


def kill_group(lab: Lab, rng: random.Random) -> None:
    """``python -m cmt_mae`` with workers: SIGKILL to the whole process group, then the same command."""
    whole = lab.finished("pretrain, 2 workers", lambda out: lab.pretrain(out, "--data.workers=2"))
    run = lab.fresh() / "run"
    words = lab.pretrain(run, "--data.workers=2")
    launch = Launch(words, run.parent / "log", real=True).start()
    if not launch.until(lambda: len(steps_done(run)) >= rng.randint(1, 15)):
        raise Broken(f"it ended by itself: {launch.finish()} {launch.last()}")
    below = descendants(launch.pids[0])
    os.killpg(launch.pids[0], signal.SIGKILL)
    launch.finish()
    time.sleep(1.0)
    alive = [pid for pid in below if running(pid)]
    if alive:
        raise Broken(f"{len(alive)} of {len(below)} processes outlive the group")
    whole_so_far(run)
    lab.ends_as(whole, words, real=True)


def running(pid: int) -> bool:
    """Whether a process is there and not a zombie."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def kill_one_of_two(lab: Lab, _: random.Random) -> None:
    """SIGKILL of process 1: process 0 notices, says so in one line and keeps its checkpoint."""
    run = lab.fresh() / "run"
    launch = Launch(lab.pretrain(run, "--epochs=2000"), run.parent / "log", 2).start()
    launch.until(lambda: len(steps_done(run)) >= 3)
    launch.kill(1)
    begin = time.monotonic()
    while os.waitid(os.P_PID, launch.pids[0], os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() - begin > 60:
            launch.kill(0)
            raise Broken("process 0 runs on for 60 s")
        time.sleep(0.02)
    statuses = launch.finish()
    if statuses[0] != STOPPED or launch.said().count("another process of this run is gone") != 1:
        raise Broken(f"{statuses}: {launch.last()}")
    whole_so_far(run)


def kill_leaf(command: str, lab: Lab, rng: random.Random) -> None:
    """pack, report or export killed at any operation on its files; the same command then makes the same files."""
    run = lab.finished("pretrain", lab.pretrain)

    def words(out: Path) -> list[str]:
        return {
            "pack": ["pack", f"--data={lab.photos}", f"--out={out}", "--size=16", "--workers=0"],
            "export": ["export", f"--backbone={run}", f"--out={out / 'x.safetensors'}"],
            "report": ["report", str(run), f"--out={out / 'report.html'}"],
        }[command]

    whole, folder = lab.fresh(), lab.fresh()
    first = Launch(words(whole / "o"), whole / "log").start()
    if any(first.finish()):
        raise Broken(f"undisturbed: {first.last()}")
    launch = Launch(words(folder / "o"), folder / "log")
    launch.kill_at = hooks.KillAt("file", rng.randrange(max(1, first.counters.read()["file"])))
    launch.start().finish()
    again = Launch(words(folder / "o"), folder / "log").start()
    if any(again.finish()):
        raise Broken(f"the same command again: {again.statuses} {again.last()}")
    made, wanted = (
        {name for name in tree(place / "o") if not name.endswith(".tmp")} for place in (folder, whole)
    )
    if made != wanted:
        raise Broken(f"files {sorted(made ^ wanted)[:4]}")
    apart = [n for n in made if (folder / "o" / n).read_bytes() != (whole / "o" / n).read_bytes()]
    if apart and command != "report":  # its page holds the time
        raise Broken(f"other bytes than undisturbed: {apart[:4]}")


# --- signals ------------------------------------------------------------------------------------------------


def polite_stop(name: str, processes: int, lab: Lab, rng: random.Random) -> None:
    """SIGTERM, SIGINT or SIGHUP: a checkpoint within one step, exit 75, and the restart has the same bits."""
    words_in: Words = {"finetune": lab.finetune, "ade20k": lab.segmentation}.get(name, lab.pretrain)
    whole = lab.finished(f"{name} stopped, {processes}", words_in, processes)
    run = lab.fresh() / "run"
    which = rng.choice((signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
    total = len(steps_done(whole))
    launch = Launch(words_in(run), run.parent / "log", processes, prepare=lambda _: hooks.slow_steps(0.02)).start()
    wanted = rng.randrange(1, max(2, total - 3))
    if not launch.until(lambda: len(steps_done(run)) >= wanted):
        raise Broken(f"it ended by itself: {launch.finish()} {launch.last()}")
    os.kill(launch.pids[0], signal.SIGSTOP)  # so that the last line is that of the moment of the signal
    time.sleep(0.02)
    before = max(steps_done(run), default=0)
    os.kill(launch.pids[rng.randrange(processes)], which)
    os.kill(launch.pids[0], signal.SIGCONT)
    statuses = launch.finish()
    if set(statuses) == {0} and before >= max(steps_done(whole)) - 2:
        return  # it had just ended
    if set(statuses) != {STOPPED}:
        raise Broken(f"{which.name} after step {before}: statuses {statuses}: {launch.last()}")
    if whole_so_far(run) not in (before, before + 1):
        raise Broken(f"{which.name} after step {before}: the checkpoint is of step {loads(run)}")
    again = Launch(words_in(run), run.parent / "log", processes).start()
    if any(again.finish()):
        raise Broken(f"the restart ended with {again.statuses}: {again.last()}")
    found = [d for d in differences(whole, run, stopped=True) if not d.startswith("config.yaml")]
    if found:
        raise Broken(f"not the undisturbed run: {'; '.join(found[:3])}")


def impatient(lab: Lab, rng: random.Random) -> None:
    """A second signal leaves at once; the checkpoint before it loads."""
    run = lab.fresh() / "run"
    words = lab.pretrain(run, "--epochs=400")
    launch = Launch(words, run.parent / "log", prepare=lambda _: hooks.slow_steps(0.2)).start()
    if not launch.until(lambda: loads(run) >= 2):
        raise Broken(f"it ended by itself: {launch.finish()} {launch.last()}")
    launch.kill(0, signal.SIGTERM)
    time.sleep(rng.uniform(0.0, 0.1) + 0.06)
    launch.kill(0, signal.SIGINT)
    begin = time.monotonic()
    statuses = launch.finish(30)
    if statuses[0] == 0 or time.monotonic() - begin > 10:
        raise Broken(f"statuses {statuses} after {time.monotonic() - begin:.1f} s")
    if whole_so_far(run) < 2:
        raise Broken("the checkpoint before is gone")


def sigstop(lab: Lab, rng: random.Random) -> None:
    """The run (and its workers) stand still for two seconds, as a suspended machine does."""
    whole = lab.finished("pretrain, 2 workers", lambda out: lab.pretrain(out, "--data.workers=2"))
    run = lab.fresh() / "run"
    launch = Launch(lab.pretrain(run, "--data.workers=2"), run.parent / "log").start()
    launch.until(lambda: len(steps_done(run)) >= rng.randint(1, 12))
    still = [launch.pids[0], *descendants(launch.pids[0])]
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for pid in still:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        time.sleep(2.0 if number == signal.SIGSTOP else 0.0)
    if any(launch.finish()):
        raise Broken(f"{launch.statuses}: {launch.last()}")
    found = [d for d in differences(whole, run) if not d.startswith("config.yaml")]
    if found:
        raise Broken(f"not the undisturbed run: {found[:3]}")


def clock(lab: Lab, rng: random.Random) -> None:
    """The clock of the day jumps to and fro while a run, a kill and a restart happen."""
    whole = lab.finished("pretrain", lab.pretrain)
    run = lab.fresh() / "run"
    jump = hooks.jumping_clock(rng.choice((3600.0, 86400.0 * 400)))
    launch = Launch(lab.pretrain(run), run.parent / "log", prepare=jump).start()
    launch.until(lambda: len(steps_done(run)) >= rng.randint(1, 15))
    launch.kill()
    launch.finish()
    lab.ends_as(whole, lab.pretrain(run), prepare=jump)


def closed_pipe(command: str, lab: Lab, _: random.Random) -> None:
    """``COMMAND 2>&1 | true`` and ``| head -n 1``: trained to the end, or not 0."""
    for reader in ("true", "head -n 1"):
        run = lab.fresh() / "run"
        words = lab.pretrain(run) if command == "pretrain" else lab.finetune(run)
        line = f"{sys.executable} -m cmt_mae {' '.join(words)} 2>&1 | {reader}; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(
            ["bash", "-c", line], capture_output=True, env=one_thread(), timeout=180, check=False
        )
        steps = steps_done(run)
        if not steps or steps[-1] < (20 if command == "pretrain" else 10):
            raise Broken(f"| {reader}: status {done.returncode}, {steps[-1] if steps else 0} steps done")
        if done.returncode != 0:
            raise Broken(f"| {reader}: trained to the end, yet status {done.returncode}")


# --- the table ------------------------------------------------------------------------------------------------

EXACT = "the same command again ends with the same weights, optimizer, metrics and files, bit for bit"
POLITE = "a checkpoint within one step and exit 75; the restart ends with the same bits"
KILLED = (
    "pretrain", "pretrain, accumulation and probe", "pretrain, photos, 2 workers", "pretrain, 2 processes",
    "pretrain, teacher outputs kept", "evaluate finetune", "evaluate ade20k", "evaluate linear",
)  # fmt: skip
ROWS = [
    *[Row(f"kill -9: {name}", EXACT, partial(kill_and_restart, name), 6) for name in KILLED],
    Row("kill -9 of a process group", f"no process outlives it; {EXACT}", kill_group, 3),
    Row("kill -9 of one of two processes", "the other stops in one line, its checkpoint whole", kill_one_of_two),
    *[
        Row(f"kill -9 inside {c}", "nothing half written is seen (hidden asides apart); then the same files",
            partial(kill_leaf, c), 5)
        for c in ("pack", "report", "export")
    ],
    *[
        Row(f"SIGTERM, SIGINT, SIGHUP: {name}, {n} process(es)", POLITE, partial(polite_stop, name, n), 6)
        for name, n in (("pretrain", 1), ("pretrain", 2), ("finetune", 1), ("ade20k", 1))
    ],
    Row("a second signal", "the run leaves at once and the checkpoint before loads", impatient, 3),
    Row("SIGSTOP and SIGCONT", "the run goes on to the same bits", sigstop, 2),
    Row("a clock that jumps", EXACT, clock, 2),
    *[
        Row(f"closed pipe: {c}", "a lost reader stops no training and never makes exit 0 of less",
            partial(closed_pipe, c))
        for c in ("pretrain", "finetune")
    ],
]  # fmt: skip
