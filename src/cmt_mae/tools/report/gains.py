"""Student minus teacher: what the pre-training gave beyond the network that taught it, on every task both have."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cmt_mae.core.run_reader import is_run, read_run, section
from cmt_mae.evaluate.result import Result, half_interval
from cmt_mae.evaluate.tasks import TASKS

Column = tuple[str, str]  # task, metric

METRICS = {name: task.columns for name, task in TASKS.items()}
"""Columns of each task; after them what only the results themselves name."""


@dataclass
class Gain:
    """Student minus teacher in one metric, on the same images."""

    student: str
    teacher: str
    column: Column
    difference: float
    """In points."""
    interval: list[float] | None
    """95 %; None where none is known."""
    over: str
    """What the student's number is over, such as "400 images"."""
    differs: str
    """What is not the same in the two protocols, such as each network's input size; empty for nothing."""


def metrics_of(result: Result) -> dict[Column, str]:
    """Column -> metric of one result: its headline and the task's usual metrics.

    k-NN and probes name pools and settings in their keys; those belong to the protocol, so the
    column has only the last part of the headline (``cls/k20/top1`` -> ``top1``).
    """
    headline = str(result.protocol["headline"])
    usual = METRICS.get(result.task, ())
    if result.task in ("knn", "linear"):
        return {(result.task, headline.rsplit("/", 1)[-1]): headline}
    named = dict.fromkeys([headline, *(m for m in usual if m in result.metrics)])
    return {(result.task, metric): metric for metric in named}


def name_of(result: Result) -> str:
    """What the user called the backbone; ``runs/a/`` and ``./runs/a`` are ``runs/a``."""
    name = str(result.backbone.get("name") or "unnamed")
    return str(Path(name)) if "/" in name else name


def gains(found: Iterable[tuple[Path, Result]]) -> list[Gain]:
    """Student minus teacher for every backbone whose teacher has results too, on equal data.

    found: (file, result). Each network is taken under the protocol of the same name, at its own input size.
    """
    backbones: dict[tuple[str, str], list[tuple[Path, Result]]] = {}
    for path, result in found:
        key = (name_of(result), str(result.backbone.get("digest") or ""))
        backbones.setdefault(key, []).append((path, result))
    made: list[Gain] = []
    for student, ours in backbones.items():
        taught = next((t for path, result in ours if (t := teacher_of(path, result))), None)
        teacher = None if taught is None else teacher_among(backbones, taught, student)
        if teacher is not None:
            made += between(student[0], teacher[0], ours, backbones[teacher])
    return made


def teacher_of(path: Path, result: Result) -> tuple[str, str] | None:
    """(digest, name) of the network that taught a result's backbone: by its file, or by the run that it is."""
    taught = result.backbone.get("teacher")
    run = path.parent.parent
    if not taught and run.name == Path(name_of(result)).name and is_run(run):
        taught = section(read_run(run).facts, "teacher")
    if not isinstance(taught, dict) or not taught.get("digest"):
        return None
    return str(taught["digest"]), str(taught.get("name") or "")


def teacher_among(
    backbones: Iterable[tuple[str, str]], taught: tuple[str, str], student: tuple[str, str]
) -> tuple[str, str] | None:
    """The teacher by its weights, else (positions resized to another input give others) by its name."""
    digest, name = taught
    others = [key for key in backbones if key != student]
    by_weights = [key for key in others if key[1] == digest]
    by_name = [key for key in others if name and key[0] == name]
    return next(iter(by_weights + by_name), None)


def between(
    student: str, teacher: str, ours: list[tuple[Path, Result]], theirs: list[tuple[Path, Result]]
) -> list[Gain]:
    """The gains of one student over its teacher, one a column."""
    made: dict[Column, Gain] = {}
    for _, result in ours:
        other = next((one for _, one in theirs if alike(result, one)), None)
        if other is None:
            continue
        its_metrics = metrics_of(other)
        for column, metric in metrics_of(result).items():
            if column in made or column not in its_metrics:
                continue
            seeds = [
                one for _, one in ours if one.protocol == result.protocol and alike(one, result)
            ]
            others = [
                one for _, one in theirs if one.protocol == other.protocol and alike(one, other)
            ]
            found = gain(seeds, others, metric, its_metrics[column])
            if not math.isnan(found[0]):
                difference, interval = found
                differs = differences(result, other)
                over = result.over(metric)
                made[column] = Gain(student, teacher, column, difference, interval, over, differs)
    return list(made.values())


def alike(one: Result, other: Result) -> bool:
    """Whether two results are of one task on the same data, under protocols of one name."""
    data = [{k: v for k, v in result.data.items() if k != "path"} for result in (one, other)]
    names = [(result.task, result.protocol["name"]) for result in (one, other)]
    return names[0] == names[1] and data[0] == data[1]


def differences(one: Result, other: Result) -> str:
    """Settings of the protocol that are not the same: "size [48, 48] and [96, 96]"."""
    first, second = one.protocol, other.protocol
    names = [k for k in {**first, **second} if first.get(k) != second.get(k) and k != "differs"]
    return ", ".join(f"{k} {first.get(k)} and {second.get(k)}" for k in names)


def gain(
    ours: list[Result], theirs: list[Result], metric: str, its_metric: str
) -> tuple[float, list[float] | None]:
    """(difference of the means over seeds, its 95 % interval).

    Of videos by the differences video by video. Else as of independent numbers, from the interval of each and
    the spread over seeds (Newcombe's square-and-add): the images are the same, which makes the true error smaller.
    None where one of the two has no interval (AP).
    """
    sides = [
        _side([result.metrics[name] for result in results], results, name)
        for results, name in ((ours, metric), (theirs, its_metric))
    ]
    difference = sides[0].mean - sides[1].mean
    mine, its = ours[0].videos(metric), theirs[0].videos(its_metric)
    if len(mine) > 1 and mine.keys() == its.keys():
        error = half_interval([mine[name] - its[name] for name in mine])
        return difference, [difference - error, difference + error]
    if sides[0].below is None or sides[1].below is None:
        return difference, None
    return difference, [
        difference - math.hypot(sides[0].below, sides[1].above),
        difference + math.hypot(sides[0].above, sides[1].below),
    ]


@dataclass
class _Side:
    """One of two numbers: its mean over seeds, and how far its 95 % interval goes below and above."""

    mean: float
    below: float | None
    above: float


def _side(values: list[float], results: list[Result], metric: str) -> _Side:
    """Over the images from each seed's own interval, over seeds from the values."""
    mean = statistics.fmean(values)
    ends = [one.interval(metric) for one in results]
    known = [(v - e[0], e[1] - v) for v, e in zip(values, ends, strict=True) if e is not None]
    if len(known) < len(values):
        return _Side(mean, None, 0.0)
    seeds = 1.96 * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    below, above = (math.hypot(statistics.fmean(part), seeds) for part in zip(*known, strict=True))
    return _Side(mean, below, above)
