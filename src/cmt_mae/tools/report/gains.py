"""Student minus teacher: what the pre-training gave beyond the network that taught it, on every task both have."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cmt_mae.core.run_reader import is_run, read_run, section
from cmt_mae.evaluate.result import Result
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
                made[column] = Gain(student, teacher, column, difference, interval, differs)
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

    Of accuracies by the binomial errors of both and the spread over seeds: the images are the same, which makes
    the true error smaller. Of videos by the differences video by video. Of AP and mIoU none is known.
    """
    both = [
        [result.metrics[name] for result in results]
        for results, name in ((ours, metric), (theirs, its_metric))
    ]
    difference = statistics.fmean(both[0]) - statistics.fmean(both[1])
    count = ours[0].counted()[0]
    mine, its = ours[0].videos(metric), theirs[0].videos(its_metric)
    if metric.endswith("top1") and count:
        error = 1.96 * math.sqrt(sum(variance(values, count) for values in both))
    elif len(mine) > 1 and mine.keys() == its.keys():
        each = [mine[name] - its[name] for name in mine]
        error = 1.96 * statistics.stdev(each) / math.sqrt(len(each))
    else:
        return difference, None
    return difference, [difference - error, difference + error]


def variance(values: list[float], count: int) -> float:
    """Of the mean over seeds of an accuracy in percent, over so many images."""
    share = min(1.0, max(0.0, statistics.fmean(values) / 100))
    seeds = statistics.variance(values) / len(values) if len(values) > 1 else 0.0
    return 1e4 * share * (1 - share) / count + seeds
