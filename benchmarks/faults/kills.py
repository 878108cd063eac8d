"""kill -9 at any moment: the same command again ends with the same bits.

A chain is one run that is killed one to four times and then left to end. Kills are placed at a random moment of
its life ("time"), at its n-th operation on a file of the run, inside a checkpoint after its n-th byte, in its
n-th micro-batch, or after its n-th decoded image (in a loader's worker, where there are some).
"""

import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.faults.campaign import Options, Verdict
from benchmarks.faults.sameness import differences, loads, steps_done
from benchmarks.faults.tiny import Fault, Launch, Tiny, descendants, kill_one, prepare, remove
from cmt_mae.core.errors import InputError

SWITCH = 10
"""First step of stage two in the tiny pre-training."""


@dataclass(frozen=True)
class Scenario:
    """A command, and what kills are worth placing in it."""

    name: str
    words: Callable[[Tiny, Path], list[str]]
    kinds: tuple[str, ...]
    chains: int
    processes: int = 1
    real: bool = False


SCENARIOS = (
    Scenario(
        "pretrain, accumulation, probe, 0 workers",
        lambda t, out: t.pretrain(
            t.packed, out, "--runtime.micro_batch=4", f"--runtime.probe_data={t.packed}",
            "--runtime.probe_every=1"),
        ("time", "file", "byte", "step", "file", "byte"), 16,
    ),
    Scenario("pretrain, photos, 0 workers", lambda t, out: t.pretrain(t.photos, out), ("decode", "time"), 4),
    Scenario(
        "pretrain, photos, accumulation, 2 workers",
        lambda t, out: t.pretrain(t.photos, out, "--data.workers=2", "--runtime.micro_batch=4"),
        ("decode", "time", "file"), 6,
    ),
    Scenario(
        "pretrain, photos, accumulation, 2 processes",
        lambda t, out: t.pretrain(t.photos, out, "--runtime.micro_batch=2"),
        ("step", "time", "file", "byte", "decode"), 5, processes=2,
    ),
    Scenario(
        "pretrain, packed, 2 processes with 2 workers each",
        lambda t, out: t.pretrain(t.packed, out, "--data.workers=2"), ("time", "step"), 2, processes=2,
    ),
    Scenario("evaluate finetune", lambda t, out: t.finetune(out), ("time", "file", "byte", "file"), 6),
    Scenario(
        "evaluate finetune, 2 workers, 2 processes",
        lambda t, out: t.finetune(out, "--workers=2", "--micro_batch=2"), ("time", "file"), 2, processes=2,
    ),
    Scenario("evaluate ade20k", lambda t, out: t.segmentation(out), ("time", "file", "byte"), 4),
    Scenario("evaluate linear", lambda t, out: t.linear(out), ("time", "file"), 2),
    Scenario(
        "python -m cmt_mae pretrain, 2 workers",
        lambda t, out: t.pretrain(t.packed, out, "--data.workers=2"), ("time",), 2, real=True,
    ),
    Scenario(
        "torchrun, 2 processes: pretrain",
        lambda t, out: t.pretrain(t.packed, out), ("time",), 1, processes=2, real=True,
    ),
    Scenario(
        "pretrain, teacher outputs kept",
        lambda t, out: t.pretrain(t.packed, out, "--data.crops=fixed", "--teacher.cache=true"),
        ("file", "step", "time"), 3,
    ),
)  # fmt: skip
QUICK = (0, 3)


@dataclass
class Tally:
    """What happened."""

    kills: Counter[str] = field(default_factory=Counter)
    """By scenario."""
    kinds: Counter[str] = field(default_factory=Counter)
    landed: Counter[str] = field(default_factory=Counter)
    """Where the run was."""
    several: int = 0
    aside: int = 0
    missed: int = 0


def campaign(options: Options) -> Verdict:
    """At least 60 kills; about 45 chains at full size."""
    verdict = Verdict(
        "a run killed at any moment and started again by the same command ends with the same student, momentum "
        "student, optimizer, metrics and files, bit for bit"
    )
    rng, tally = random.Random(options.seed), Tally()
    tiny = prepare(options.folder / "data")
    chosen = [SCENARIOS[i] for i in QUICK] if options.quick else list(SCENARIOS)
    for scenario in chosen:
        _scenario(scenario, tiny, options, rng, verdict, tally)
    verdict.figures = {
        "kills": sum(tally.kills.values()),
        "kills by command": dict(tally.kills),
        "kills by placement": dict(tally.kinds),
        "where the run was": dict(tally.landed),
        "chains": verdict.trials,
        "chains killed more than once": tally.several,
        "kills that left a file half written aside": tally.aside,
        "placed too late, the run had ended": tally.missed,
    }
    return verdict


def _scenario(
    scenario: Scenario,
    tiny: Tiny,
    options: Options,
    rng: random.Random,
    verdict: Verdict,
    tally: Tally,
) -> None:
    """The undisturbed run, then chains at the same path."""
    folder = options.folder / scenario.name.replace(" ", "_").replace(",", "")
    run, whole = folder / "run", folder / "whole"
    words = scenario.words(tiny, run)
    first = Launch(words, folder / "whole.log", scenario.processes, scenario.real).start()
    if any(first.finish()):
        verdict.failures.append(
            f"{scenario.name}: the undisturbed run failed: {first.said()[-300:]}"
        )
        return
    seconds = time.monotonic() - first.began
    run.rename(whole)
    totals = first.counters.read()
    for number in range(1 if options.quick else scenario.chains):
        log = folder / f"chain{number}.log"
        history: list[str] = []
        for _ in range(2 if scenario.real or options.quick else rng.randint(1, 4)):
            kind = scenario.kinds[(number + len(history)) % len(scenario.kinds)]
            # what is left of a run that was killed before is shorter
            left = 1 / (1 + 0.5 * len(history))
            launch = Launch(words, log, scenario.processes, scenario.real)
            said = _kill(launch, kind, totals, left * seconds, left, rng)
            history.append(said)
            if not _killed(launch):
                tally.missed += 1
                break
            tally.kills[scenario.name] += 1
            tally.kinds[kind] += 1
            tally.landed[_place(run, scenario)] += 1
            tally.aside += bool(list(run.rglob(".*.tmp")))
            _check_visible(run, verdict, f"{scenario.name} {history}")
        tally.several += len(history) > 1
        verdict.trials += 1
        last = Launch(words, log, scenario.processes, scenario.real).start()
        where = f"{scenario.name}, chain {number}, kills at {history}"
        if any(last.finish()):
            verdict.failures.append(
                f"{where}: the restart ended with {last.statuses}: {last.said()[-300:]}"
            )
        else:
            verdict.failures += [f"{where}: {line}" for line in differences(whole, run)]
        remove(run)
    remove(whole)
    print(f"  {sum(tally.kills.values())} kills, {scenario.name}", file=sys.stderr)


def _kill(
    launch: Launch,
    kind: str,
    totals: dict[str, int],
    seconds: float,
    left: float,
    rng: random.Random,
) -> str:
    """Start, kill (or let the fault do it), wait for the end; what was done, to repeat it."""
    rank = rng.randrange(launch.processes)
    if kind == "time":
        # a new interpreter imports for most of its life
        moment = seconds * rng.uniform(0.6 if launch.real else 0.0, 0.9)
        launch.start()
        while launch.running() and time.monotonic() - launch.began < moment:
            time.sleep(0.001)
        if launch.real:  # torchrun, its processes and their workers, as a node that goes away
            for pid in [*descendants(launch.pids[0]), launch.pids[0]]:
                kill_one(pid)
        else:
            launch.kill(rank)
        launch.finish()
        return f"{moment:.3f} s of rank {rank}"
    if kind in ("file", "byte"):
        rank = 0  # alone writes
    launch.fault = Fault(kind, rng.randrange(max(1, int(left * totals[kind]))), rank)
    launch.start().finish()
    return f"{kind} {launch.fault.at} of rank {rank}"


def _killed(launch: Launch) -> bool:
    return -signal.SIGKILL in launch.statuses


def _place(run: Path, scenario: Scenario) -> str:
    """Where the run was when it was killed, by its metrics and what lies aside."""
    steps = steps_done(run)
    aside = [p.name for p in run.rglob(".*.tmp")]
    if any(".pt." in name for name in aside):
        return "writing a checkpoint"
    if aside:
        return "writing another file"
    if "pretrain" not in scenario.name:
        return "in an evaluation task" if steps else "before the first line of an evaluation task"
    if not steps:
        return "before the first line"
    if steps[-1] in (SWITCH - 1, SWITCH):
        return "within 3 steps of the switch of stages"
    return (
        "stage one"
        if steps[-1] < SWITCH
        else "stage two"
        if steps[-1] < 20
        else "after the last step"
    )


def _check_visible(run: Path, verdict: Verdict, where: str) -> None:
    """Whatever can be seen now is whole."""
    try:
        loads(run)
    except InputError as error:
        verdict.failures.append(f"{where}: after the kill: {error}")
