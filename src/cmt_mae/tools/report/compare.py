"""``cmt-mae compare``: one table, backbones x tasks, from result files. Reads files, trains nothing."""

from __future__ import annotations

import json
import math
import shlex
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cmt_mae.core.errors import InputError
from cmt_mae.core.files import same_fingerprint
from cmt_mae.core.run_reader import is_run, result_files
from cmt_mae.core.settings import check_fields
from cmt_mae.evaluate.result import Result
from cmt_mae.tools.report.gains import METRICS, Column, Gain, gains, metrics_of, name_of
from cmt_mae.tools.report.paper import PROTOCOLS, SOURCE, PaperNumber, paper_numbers

Format = Literal["table", "markdown", "json"]

MAX_BYTES = 256 << 20
"""A result file of more bytes than this is none; one with every class of ImageNet has about 0.2 MB."""

PARTS = {
    "task": str,
    "metrics": dict,
    "protocol": dict,
    "backbone": dict,
    "data": dict,
    "seed": int,
}


@dataclass
class CompareConfig:
    """One table of results: a row per backbone, a column per task, a mark per protocol."""

    runs: list[str]
    """Run directories, folders of them, or result files."""
    paper: bool = False
    """Add the rows of the paper's tables that have a number in one of the columns."""
    format: Format | None = None
    """table, markdown or json. Default: by the ending of out (.md, .json), else table."""
    out: str | None = None
    """File to write instead of stdout."""
    protocols: bool = False
    """Say every setting of each protocol under the table, not only its name and its data."""


@dataclass
class Number:
    """What one mark says in one cell: a number, or the mean over seeds."""

    value: float
    """Mean over the seeds; NaN where the metric does not exist for this data."""
    spread: float | None
    """Sample standard deviation over the seeds (n - 1); None with fewer than two."""
    n: int
    """Number of seeds with a number."""
    mark: str
    """Which protocol and data: a key of the table's footnotes."""
    seeds: list[int] = field(default_factory=list)
    """Of the evaluations; empty for the paper's."""
    files: list[str] = field(default_factory=list)
    """Where the numbers stand."""
    interval: list[float] | None = None
    """95 % interval over the images or videos, of a number of one seed; None where none is known."""
    counted: str = ""
    """What the number is over: "400 images", "60 images, 431 objects"; empty for the paper's."""


@dataclass
class Row:
    """One backbone: its weights, or a row of the paper."""

    name: str
    """What the user called it, or the paper's name of the method."""
    network: str
    """Architecture."""
    weights: str
    """Digest of the weights (sha256, hex); empty for the paper's rows."""
    group: str
    """measured, or which of the paper's tables."""
    cells: dict[Column, list[Number]] = field(default_factory=dict)
    """Numbers of each column, one a mark."""


@dataclass
class Comparison:
    """The whole table."""

    columns: list[Column]
    rows: list[Row]
    footnotes: dict[str, dict[str, Any]]
    """Mark -> task, protocol, data, seeds (measured) or source, protocol a task, doubts (paper)."""
    notes: list[str]
    """What was left out and why; one line each."""
    gains: list[Gain] = field(default_factory=list)
    """Student minus its teacher, on every task that both were evaluated on."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values that strict JSON can hold; a NaN becomes None."""
        return {
            "columns": [{"task": task, "metric": metric} for task, metric in self.columns],
            "rows": [
                {
                    "name": row.name,
                    "network": row.network,
                    "weights": row.weights,
                    "group": row.group,
                    "cells": [
                        {
                            "task": task,
                            "metric": metric,
                            **vars(number),
                            "value": None if math.isnan(number.value) else number.value,
                        }
                        for (task, metric), numbers in row.cells.items()
                        for number in numbers
                    ],
                }
                for row in self.rows
            ],
            "footnotes": self.footnotes,
            "notes": self.notes,
            "student_minus_teacher": [vars(gain) for gain in self.gains],
        }


def compare(config: CompareConfig) -> dict[str, Any]:
    """Print one table of all results under ``runs`` and return it (see ``Comparison.as_dict``).

    Two numbers of one column have the same mark exactly when their protocols and their data
    (fingerprint and counts; the place does not matter) are equal. Notes go to stderr.

    Raises:
        InputError: a run that is not there, a named file that is no result, no result at all.
    """
    from cmt_mae.tools.report.comparison_text import write

    check_fields(config)
    found, notes = collect(config.runs)
    if not found:
        raise InputError("; ".join(notes))
    comparison = tabulate(found, paper_numbers() if config.paper else [])
    comparison.notes[:0] = notes
    write(comparison, config.format, config.out, config.protocols)
    return comparison.as_dict()


def collect(runs: list[str]) -> tuple[list[tuple[Path, Result]], list[str]]:
    """All results under ``runs``, each measurement once, and a line for each thing left out.

    A run's results are in ``results/*.json``, and those of the evaluations that trained in
    ``evaluations/*/results/*.json``; a folder may be a run or hold runs.

    Raises:
        InputError: no run given, one that is not there, or a named file that is no result.
    """
    if not runs:
        raise InputError(
            "compare needs run directories or result files: cmt-mae compare RUN [RUN ...]"
        )
    found: list[tuple[Path, Result]] = []
    notes: list[str] = []
    seen: set[Path] = set()
    for run in runs:
        path = Path(run).expanduser()
        if not path.is_dir():
            found += [(path, read_result(path))] if _is_new(path, seen) else []
            continue
        files = files_in(path)
        if not files:
            notes.append(nothing_measured(path))
        for file in files:
            if _is_new(file, seen):
                try:
                    found.append((file, read_result(file)))
                except InputError as error:
                    notes.append(f"left out: {error}")
    return newest(found, notes), notes


def files_in(folder: Path) -> list[Path]:
    """Result files of a run, of the trainings of its evaluations, or of runs side by side, sorted."""
    found = sorted(folder.glob("*.json")) if folder.name == "results" else result_files(folder)
    if not is_run(
        folder
    ):  # runs side by side; the folders of a run itself are not searched for runs
        for child in sorted(folder.iterdir()):
            found += result_files(child) if child.is_dir() else []
    return list(dict.fromkeys(found))


def read_result(path: Path) -> Result:
    """A result file whose parts have the types that a table needs.

    Raises:
        InputError: missing, unreadable, or something else than a result.
    """
    if not path.exists():
        raise InputError(f"{path}: no such run directory or result file; check the path")
    if not path.is_file():
        raise InputError(f"{path}: no regular file; give run directories or result files")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has over {MAX_BYTES >> 20} MiB")
        content = json.loads(path.read_text(encoding="utf-8"))
        lacks = [part for part in PARTS if not isinstance(content, dict) or part not in content]
        if lacks:
            raise ValueError(f"it has no {', '.join(lacks)}")
        wrong = [part for part, kind in PARTS.items() if type(content[part]) is not kind]
        if wrong:
            raise ValueError(f"its {', '.join(wrong)} cannot be read")
        return Result.load(path)
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a result of cmt-mae evaluate: {error}") from None


def nothing_measured(run: Path) -> str:
    """The line for a folder without results, with the command that makes one."""
    is_backbone = any(run.glob("backbone*.safetensors")) or (run / "config.yaml").is_file()
    where = f"--backbone {shlex.quote(str(run))} --data DIR"
    if not is_backbone:
        where = f"--backbone B --data DIR --out {shlex.quote(str(run))}"
    return f"{run} holds no results; make one: cmt-mae evaluate linear {where}"


def newest(found: list[tuple[Path, Result]], notes: list[str]) -> list[tuple[Path, Result]]:
    """The newest file of each measurement (same backbone, protocol, data and seed)."""
    kept: dict[tuple[str, str], tuple[Path, Result]] = {}
    for path, result in found:
        key = (name_of(result), result.identity())
        if key in kept:
            other, before = kept[key]
            if before.metrics != result.metrics:
                notes.append(f"{other} and {path} are the same measurement: the newer one is shown")
            if str(result.date) <= str(before.date):
                continue
        kept[key] = (path, result)
    return list(kept.values())


def tabulate(found: Iterable[tuple[Path, Result]], paper: list[PaperNumber]) -> Comparison:
    """Rows, columns and marks of the results and, below them, of the paper's numbers."""
    found = sorted(found, key=lambda item: _task_order(item[1].task))
    table = Comparison([], [], {}, [])
    marks: dict[tuple[str, str], str] = {}
    rows: dict[tuple[str, str], Row] = {}
    cells: dict[tuple[str, str], dict[tuple[Column, str], list[tuple[Path, Result, str]]]] = {}
    first_facts: dict[tuple[str, str], Any] = {}
    for path, result in found:
        digest = str(result.backbone.get("digest") or "")
        key = (name_of(result), digest)
        # the same weights with another mean, std or heads are another row; older results state none of them
        facts = result.backbone.get("facts")
        if facts and first_facts.setdefault(key, facts) != facts:
            key = (key[0], f"{digest} {json.dumps(facts, sort_keys=True)}")
        rows.setdefault(key, Row(key[0], result.network, digest, "measured"))
        mark = measured_mark(result, marks, table.footnotes)
        for column, metric in metrics_of(result).items():
            cell = cells.setdefault(key, {}).setdefault((column, mark), [])
            cell.append((path, result, metric))
    for key, row in rows.items():
        for (column, mark), values in cells[key].items():
            row.cells.setdefault(column, []).append(over_seeds(values, mark))
    table.rows = list(rows.values())
    present = {column for row in table.rows for column in row.cells}
    table.columns = sorted(present, key=_column_order)
    for weights in dict.fromkeys(row.weights for row in table.rows if row.weights):
        names = [row.name for row in table.rows if row.weights == weights]
        if len(names) > 1:
            table.notes.append(f"the same weights ({weights[:8]}): {', '.join(names)}")
    table.gains = gains(found)
    if paper:
        add_paper(table, paper)
    return table


def measured_mark(
    result: Result, marks: dict[tuple[str, str], str], footnotes: dict[str, dict[str, Any]]
) -> str:
    """The mark of this task, protocol and data; a new letter where none has them yet."""
    data = {k: v for k, v in result.data.items() if k != "path"}
    rest = {k: v for k, v in data.items() if k != "fingerprint"}
    text = json.dumps([result.task, result.protocol, rest], sort_keys=True)
    fingerprint = str(data.get("fingerprint"))
    alike = (m for (t, f), m in marks.items() if t == text and same_fingerprint(f, fingerprint))
    mark = next(alike, "")
    if not mark:
        mark = marks[text, fingerprint] = letters(len(marks))
        footnotes[mark] = {
            "task": result.task,
            "protocol": result.protocol,
            "data": {"path": result.data.get("path"), **data},
            "seeds": [],
        }
    note = footnotes[mark]
    note["seeds"] = sorted({*note["seeds"], result.seed})
    return mark


def letters(index: int) -> str:
    """0 -> a, 25 -> z, 26 -> aa."""
    text = ""
    index += 1
    while index:
        index, digit = divmod(index - 1, 26)
        text = chr(ord("a") + digit) + text
    return text


def over_seeds(values: list[tuple[Path, Result, str]], mark: str) -> Number:
    """Mean and sample standard deviation over seeds of (file, result, metric); NaN values are left out."""
    there = [result.metrics[metric] for _, result, metric in values]
    there = [value for value in there if not math.isnan(value)]
    _, result, metric = next((v for v in values if not math.isnan(v[1].metrics[v[2]])), values[0])
    ends = result.interval(metric) if len(there) == 1 else None
    return Number(
        value=statistics.fmean(there) if there else math.nan,
        spread=statistics.stdev(there) if len(there) > 1 else None,
        n=len(there),
        mark=mark,
        seeds=sorted(result.seed for _, result, _ in values),
        files=[str(path) for path, _, _ in values],
        interval=None if ends is None else list(ends),
        counted=result.over(metric),
    )


def add_paper(table: Comparison, paper: list[PaperNumber]) -> None:
    """The paper's rows under the measured ones, always with marks of their own.

    ``P2`` is table 2, ``P2†3`` a number of table 2 with doubt 3, ``P2†3,5`` one with two doubts.
    Rows of tables 1 to 3 are joined where method, architecture and stated epochs are the same.
    """
    doubts: dict[str, int] = {}
    rows: dict[tuple[str, str, str], Row] = {}
    out = 0
    for number in paper:
        column = (number.task, number.metric)
        if column not in table.columns:
            out += 1
            continue
        mark = f"P{number.table}"
        if number.doubts:
            each = [doubts.setdefault(doubt, len(doubts) + 1) for doubt in number.doubts]
            mark += "†" + ",".join(map(str, each))
        source = f"{SOURCE}, table {number.table}"
        note: dict[str, Any] = {"source": source, "protocol": {}, "doubts": list(number.doubts)}
        note = table.footnotes.setdefault(mark, note)
        note["protocol"][number.task] = PROTOCOLS[number.task]
        group, name = paper_row(number)
        row = Row(name, number.architecture, "", group)
        row = rows.setdefault((group, name, number.architecture), row)
        cell = Number(number.value, None, 1, mark, files=[source])
        row.cells.setdefault(column, []).append(cell)
    table.rows += rows.values()
    if out:
        table.notes.append(f"{out} of the paper's {len(paper)} numbers are of other columns")


def paper_row(number: PaperNumber) -> tuple[str, str]:
    """Group and name of the row that a number of the paper stands in."""
    if number.table > 3:
        return f"paper, table {number.table}", f"{number.method}"
    epochs = "epochs not stated" if number.epochs is None else f"{number.epochs} epochs"
    return "paper, tables 1-3", f"{number.method}, {epochs}"


def _is_new(path: Path, seen: set[Path]) -> bool:
    """Whether this file was not met before, however it was named."""
    real = path.resolve()
    if real in seen:
        return False
    seen.add(real)
    return True


def _task_order(task: str) -> tuple[int, str]:
    """Tasks as listed in METRICS, others after them by name."""
    known = list(METRICS)
    return (known.index(task) if task in known else len(known), task)


def _column_order(column: Column) -> tuple[tuple[int, str], int, str]:
    """By task, then as listed in METRICS, others after them by name."""
    task, metric = column
    usual = METRICS.get(task, ())
    return (_task_order(task), usual.index(metric) if metric in usual else len(usual), metric)
