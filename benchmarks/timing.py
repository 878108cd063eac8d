"""Contestants timed in turns, in one process or each in processes of its own, and the file that keeps the numbers.

A contestant is something that can be called again and again and does the same work each time. ``alternate`` calls
several in turns in this process; ``alternate_processes`` gives each a process (or several that train together) of
its own, where memory is measured too.
"""

import gc
import json
import math
import multiprocessing
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from cmt_mae.core.files import write_json
from cmt_mae.core.runs import environment, processor
from cmt_mae.tools.bench.measure import forget_peak, peak_gb, spread

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "docs" / "results"
SHARED = REPOSITORY.parent / "shared"
OURS = "ours"
REST_S = 0.3
"""Between turns of different processes: OpenMP's threads of the last one go on spinning for a while."""
TURN_S = 1.0
"""A turn of a process lasts about as long: of short steps it takes several, and their mean is the round's time."""
PROCESSES: Any = multiprocessing.get_context("spawn")
"""How processes begin: each from nothing, with the memory that its users see."""


@dataclass
class Step:
    """One run of a contestant's work, and what is worth knowing about it (plain values)."""

    run: Callable[[], object]
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Contestant:
    """How to make a step in a process of its own."""

    make: Callable[[], Step]
    """A function of a module, or a partial of one: it travels to the process."""
    processes: int = 1
    """So many train together: the variables of torchrun are set in each."""
    imports: str = ""
    """A module whose import counts for the start, not for the step's memory."""


@dataclass
class Turns:
    """What ``alternate_processes`` found, contestant -> value."""

    seconds: dict[str, list[float]]
    """Of each round, of one step; of several processes the slowest."""
    facts: dict[str, dict[str, Any]]
    """Those of its step, and peak_gb, start_gb, above_start_gb of its first process."""
    sent: dict[str, list[float]]
    """Bytes that this machine sent to itself while a step ran, by round."""


@dataclass
class Comparison:
    """Contestants that do the same work."""

    part: str
    """Part of the page, e.g. mae."""
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
        """Everything as plain values. seconds: contestant -> one number a round.

        Ratios are taken within a round, so that a slow minute of the machine does not count for one alone.
        """
        mine = seconds.get(OURS)
        rows = {}
        for name, times in seconds.items():
            row: dict[str, Any] = {"seconds": times, **spread(times)}
            row["rate"] = self.items / row["median"]
            if mine is not None and name != OURS:
                row["times_ours"] = spread([b / a for a, b in zip(mine, times, strict=True)])
            rows[name] = row
        return {
            **vars(self), **stamp(), "rounds": len(next(iter(seconds.values()))), "contestants": rows,
        }  # fmt: skip


def stamp() -> dict[str, Any]:
    """When and on what an entry was measured."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
        "processor": processor(),
        "torch": torch.__version__,
    }


def turn(names: list[str], number: int) -> list[str]:
    """The order of a round: each round begins with another contestant."""
    first = number % len(names)
    return names[first:] + names[:first]


def alternate(
    contestants: dict[str, Callable[[], object]], rounds: int, warm: int = 1
) -> dict[str, list[float]]:
    """Seconds of every contestant, round by round; ``warm`` rounds are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(-warm, rounds):
        for name in turn(list(contestants), number):
            begin = time.perf_counter()
            contestants[name]()
            if number >= 0:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def alternate_processes(
    contestants: dict[str, Contestant], rounds: int, warm: int = 2, turn_s: float | None = None
) -> Turns:
    """As ``alternate``, every contestant in processes of its own, with the memory allocator its users have.

    turn_s: seconds of a turn (``TURN_S``); 0: one step a turn.
    """
    turn_s = TURN_S if turn_s is None else turn_s
    with running(contestants) as (ends, facts):
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        sent: dict[str, list[float]] = {name: [] for name in contestants}
        times, fastest = 1, turn_s
        for number in range(-warm, rounds):
            for name in turn(list(contestants), number):
                time.sleep(REST_S if len(contestants) > 1 else 0)
                before = loopback_bytes()
                took = max(asked(ends[name], times))
                if number >= 0:
                    seconds[name].append(took)
                    sent[name].append((loopback_bytes() - before) / times)
                fastest = min(fastest, took)
            if number < 0 and fastest > 0:
                times = max(1, round(turn_s / fastest))  # the same for all
        for name in contestants:
            facts[name].update(asked(ends[name], "memory")[0])
    return Turns(seconds, facts, sent)


def loopback_bytes() -> int:
    """Bytes that this machine has sent to itself."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])
    return 0


def asked(ends: list[Any], question: Any) -> list[Any]:
    """The answers of all processes of a contestant. Raises RuntimeError where one is gone."""
    try:
        for end in ends:
            end.send(question)
        answers = [end.recv() for end in ends]
    except (EOFError, OSError) as error:
        raise RuntimeError("a process of a contestant ended; its error stands above") from error
    return answers


@contextmanager
def running(
    contestants: dict[str, Contestant],
) -> Iterator[tuple[dict[str, list[Any]], dict[str, dict[str, Any]]]]:
    """The processes of all contestants, ready: the ends of their pipes, and facts of their steps, by name."""
    ends: dict[str, list[Any]] = {}
    facts, processes = {}, []
    try:
        for name, contestant in contestants.items():
            ends[name], port = [], free_port()
            for rank in range(contestant.processes):
                mine, other = PROCESSES.Pipe()
                places = torchrun_places(rank, contestant.processes, port)
                words = (contestant, other, torch.get_num_threads(), places)
                process = PROCESSES.Process(target=serve, args=words, daemon=True)
                process.start()
                processes.append(process)
                other.close()
                ends[name].append(mine)
            # one contestant after another: the making of one does not slow another's
            facts[name] = asked(ends[name], "facts")[0]
        yield ends, facts
    finally:
        for process in processes:
            process.kill()
            process.join()


def torchrun_places(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun sets; nothing for a process alone."""
    if world == 1:
        return {}
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def serve(contestant: Contestant, end: Any, threads: int, places: dict[str, str]) -> None:
    """A contestant's process: a number asks for so many runs (their mean comes back), words for what they name."""
    os.environ.update(places)
    torch.set_num_threads(threads)
    if contestant.imports:
        __import__(contestant.imports)
    device = torch.device("cpu")
    start = peak_gb(device) if forget_peak(device) else 0.0
    step = contestant.make()
    gc.collect()
    # building makes copies that training does not need: what counts is the steps
    fresh = forget_peak(device)
    while True:
        question = end.recv()
        if question == "facts":
            end.send(step.facts)
        elif question == "memory":
            peak = peak_gb(device)
            end.send(
                {"peak_gb": peak, "start_gb": start, "above_start_gb": peak - start, "of_steps_alone": fresh}
            )  # fmt: skip
        else:
            begin = time.perf_counter()
            for _ in range(question):
                step.run()
            end.send((time.perf_counter() - begin) / question)


def exponent(sizes: list[float], values: list[float]) -> dict[str, float]:
    """value = constant * size ** power, by least squares of the logarithms; r2 says how well it fits."""
    x, y = ([math.log(v) for v in row] for row in (sizes, values))
    power, constant = statistics.linear_regression(x, y)
    r2 = statistics.correlation(x, y) ** 2 if len(set(y)) > 1 else 1.0
    return {"power": power, "constant": math.exp(constant), "r2": r2}


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table; the first column is text, the others numbers."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *rows])


class Book:
    """A JSON file of results that grows entry by entry: a cut loses nothing, the same command goes on."""

    def __init__(self, path: Path, budget_s: float = math.inf, **about: Any) -> None:
        """budget_s: no entry is begun that would end later. about: what stands beside the entries."""
        self.path, self.end = path, time.perf_counter() + budget_s
        before = json.loads(path.read_text()) if path.exists() else {}
        self.entries: dict[str, Any] = before.get("entries", {})
        self.content = {**before, **about, **environment(), "entries": self.entries}
        self.left: list[str] = []

    def seconds_left(self) -> float:
        """Until the budget is spent."""
        return self.end - time.perf_counter()

    def measure(
        self, key: str, needed_s: float, work: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """The entry of this name: from the file, or measured now; {} where no time is left for it.

        An error becomes the entry and is tried again by the next call: one that fails must not cost the others.
        """
        found: dict[str, Any] = self.entries.get(key, {})
        if found and "error" not in found:
            return found
        if needed_s > self.seconds_left():
            self.left.append(key)
            return {}
        begin = time.perf_counter()
        try:
            entry = work()
        except torch.OutOfMemoryError:
            entry = {"out_of_memory": True, "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9}
        except Exception as error:
            text = " ".join(str(error).split())[:600]
            entry = {"error": f"{type(error).__name__}: {text}"}
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        entry["seconds"] = round(time.perf_counter() - begin, 1)
        self.entries[key] = entry
        self.write()
        print(f"{key:45} {entry.get('error', '')}{entry['seconds']:6.1f} s", file=sys.stderr, flush=True)
        return entry

    def write(self) -> None:
        """The whole file, after every entry."""
        self.content["left"] = self.left
        write_json(self.path, self.content)
