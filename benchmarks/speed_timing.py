"""Contestants timed in turns, in one process or each in its own, and what a comparison says."""

import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from cmt_mae.core.runs import processor
from cmt_mae.tools.bench.measure import spread

SHARED = Path(__file__).resolve().parents[2] / "shared"
OURS = "ours"
CONSOLE = Console(stderr=True)


@dataclass
class Options:
    """How much is measured."""

    rounds: int = 7
    """Timings of each contestant; the median counts."""
    sizes: tuple[str, ...] = ("small", "vits16")
    """Which networks, see ``speed_steps.SIZES``."""
    quick: bool = False
    """A smoke run: everything small, 2 rounds, no measurement."""
    shared: Path = SHARED
    """Folder with data/photos and data/imagenette."""


@dataclass
class Comparison:
    """One comparison: contestants that do the same work."""

    part: str
    """mae | cmt | cost | memory | loader | features | knn | sweep."""
    name: str
    """Unique, e.g. mae/vits16."""
    what: str
    """What is done, and by whom, in one or two sentences."""
    items: int
    """Images (or heads) in one timed run."""
    unit: str = "images"
    """What is counted by ``items``."""
    target: dict[str, float] = field(default_factory=dict)
    """Contestant -> least ratio of its time to ours that we want."""
    absent: dict[str, str] = field(default_factory=dict)
    """Contestant that could not be compared -> why."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Settings and checks worth knowing: threads, data type, agreement of results."""

    def measured(self, seconds: dict[str, list[float]]) -> dict[str, Any]:
        """Everything as plain values. seconds: contestant -> one number a round."""
        mine = seconds.get(OURS)
        rows = {}
        for name, times in seconds.items():
            row: dict[str, Any] = {"seconds": times, **spread(times)}
            row["rate"] = self.items / row["median"]
            if mine is not None and name != OURS:
                row["times_ours"] = spread([b / a for a, b in zip(mine, times, strict=True)])
            rows[name] = row
        return {
            **vars(self),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "rounds": len(next(iter(seconds.values()))),
            "threads": torch.get_num_threads(),
            "processor": processor(),
            "torch": torch.__version__,
            "contestants": rows,
        }


def alternate(
    contestants: dict[str, Callable[[], object]], rounds: int, title: str, warm: int = 1
) -> dict[str, list[float]]:
    """Seconds of every contestant, round by round; each round begins with another one.

    Taking turns lets a slow minute of the machine hit all alike. ``warm`` runs each are not counted.
    """
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warm, rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            begin = time.perf_counter()
            contestants[name]()
            if number >= 0:
                seconds[name].append(time.perf_counter() - begin)
        if CONSOLE.is_terminal:
            CONSOLE.print(f"  {title}: round {number + 1} of {rounds}", end="\r")
    return seconds


REST_S = 0.3
"""Between turns of different processes: OpenMP's threads of the last one go on spinning for a while."""
TURN_S = 1.0
"""A turn of a process lasts about as long: of short steps it takes several, and their mean is the round's time."""


def alternate_processes(
    makers: dict[str, Callable[[], Callable[[], object]]], rounds: int, title: str, warm: int = 2
) -> dict[str, list[float]]:
    """As ``alternate``, with every contestant made and run in a process of its own, in turns.

    So each has the settings of the process (its memory allocator) that its users have.
    """
    with running(makers) as ends:
        names = list(makers)
        seconds: dict[str, list[float]] = {name: [] for name in names}
        times, fastest = 1, TURN_S
        for number in range(-warm, rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                time.sleep(REST_S)
                ends[name].send(times)
                took = ends[name].recv()
                if number >= 0:
                    seconds[name].append(took)
                fastest = min(fastest, took)
            if number < 0:
                times = max(1, round(TURN_S / fastest))  # the same for all
            if CONSOLE.is_terminal:
                CONSOLE.print(f"  {title}: round {number + 1} of {rounds}", end="\r")
    return seconds


@contextmanager
def running(makers: dict[str, Callable[[], Callable[[], object]]]) -> Iterator[dict[str, Any]]:
    """A process for each contestant, ready; the ends of their pipes by name."""
    context = multiprocessing.get_context("spawn")
    ends, processes = {}, []
    try:
        for name, maker in makers.items():
            ends[name], other = context.Pipe()
            process = context.Process(
                target=serve, args=(maker, other, torch.get_num_threads()), daemon=True
            )
            process.start()
            processes.append(process)
            other.close()
            ends[name].recv()  # one after another: the making of one does not slow another's
        yield ends
    finally:
        for process in processes:
            process.kill()
            process.join()


def serve(maker: Callable[[], Callable[[], object]], end: Any, threads: int) -> None:
    """A contestant's process: make it, then for every number that comes time so many runs; the mean goes back."""
    torch.set_num_threads(threads)
    run = maker()
    end.send("ready")
    while True:
        times = end.recv()
        begin = time.perf_counter()
        for _ in range(times):
            run()
        end.send((time.perf_counter() - begin) / times)


def say(entry: dict[str, Any]) -> None:
    """One line for each contestant, as it is measured."""
    for name, row in entry["contestants"].items():
        ratio = row.get("times_ours")
        text = f"  {ratio['median']:.2f} x ours" if ratio else ""
        print(
            f"{entry['name']:28} {name:28} {row['rate']:10.4g} {entry['unit']}/s{text}",
            file=sys.stderr,
            flush=True,
        )
