"""A run directory as its readers need it: report, watch, doctor, compare, explain. Without torch: starts at once.

The files may be foreign: each is read whole or named as a problem, and nothing leads out of the directory.
"""

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from cmt_mae.core.errors import InputError
from cmt_mae.core.lock import may_run
from cmt_mae.core.parsing import flatten
from cmt_mae.core.recipes import read_settings
from cmt_mae.core.text import one_line

SIGNS_OF_RUN = ("config.yaml", "run.json", "metrics.jsonl")
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
MAX_TEXT = 1 << 20
"""Bytes of config.yaml, run.json, bad_images.txt and warnings.jsonl; more is no such file."""
MAX_METRICS = 1 << 28
"""Bytes of metrics.jsonl: a run of 800 epochs of ImageNet has about 0.02 of this."""
MAX_LISTED = 20_000
"""Files and folders that are looked at below one folder of a run."""


@dataclass
class RunRecord:
    """Everything that the small files of one run say."""

    path: Path
    label: str
    """Short name, unique among the runs that are shown together."""
    config: dict[str, Any] = field(default_factory=dict)
    """config.yaml, nested."""
    facts: dict[str, Any] = field(default_factory=dict)
    """run.json."""
    rows: list[dict[str, float]] = field(default_factory=list)
    """metrics.jsonl: numbers only, oldest first; each has ``step``; what is not finite is nan."""
    warnings: list[tuple[int, str]] = field(default_factory=list)
    """What the run said beginning with "warning": step and text."""
    bad_images: list[tuple[str, str]] = field(default_factory=list)
    """Name and reason."""
    pictures: list[Path] = field(default_factory=list)
    """Files below pictures/, sorted by name."""
    going_on: bool = False
    """Whether a process holds run.lock, or may (another machine's)."""
    silent_seconds: float = 0.0
    """Since the last change of metrics.jsonl."""
    problems: list[str] = field(default_factory=list)
    """What could not be read and why; one line each."""

    @cached_property
    def settings(self) -> dict[str, Any]:
        """config.yaml, flat: ``mask.ratio`` -> 0.75."""
        return {one_line(name, 120): value for name, value in flatten(self.config).items()}

    def setting(self, name: str, default: Any = None) -> Any:
        """One setting, or the default where config.yaml does not say."""
        value = self.settings.get(name)
        return default if value is None else value

    def number(self, name: str, default: float = math.nan) -> float:
        """A setting that is a finite number, else the default."""
        value = self.setting(name)
        good = isinstance(value, int | float) and not isinstance(value, bool)
        return float(value) if good and math.isfinite(value) else default

    def plan(self, name: str) -> int:
        """A number of the plan (total_steps, switch_step, steps_per_epoch, ...); 0 where it is not known."""
        value = section(self.facts, "plan").get(name)
        return value if type(value) is int and value > 0 else 0

    @property
    def images(self) -> int:
        """Training images by run.json; 0 where it does not say."""
        value = section(self.facts, "data").get("images")
        return value if type(value) is int and value > 0 else 0

    @property
    def last_step(self) -> int:
        """The newest step with a line of metrics; 0 before the first."""
        return max((int(row["step"]) for row in self.rows), default=0)

    @property
    def total_steps(self) -> int:
        """Of the plan; 0 where it is not known."""
        return self.plan("total_steps")

    @property
    def switch_step(self) -> int | None:
        """The last step of stage one; None where the run has one stage only."""
        switch, total = section(self.facts, "plan").get("switch_step"), self.total_steps
        return switch if type(switch) is int and 0 < switch < total else None

    @property
    def finished(self) -> bool:
        """Whether the last planned step is done."""
        return 0 < self.total_steps <= self.last_step

    def log_rows(self) -> list[dict[str, float]]:
        """The lines of the training itself, without those of k-NN."""
        return [row for row in self.rows if "knn_top1" not in row]

    def knn(self) -> list[tuple[int, float]]:
        """(step, top-1 in percent) of the measurements while training."""
        found = [(int(row["step"]), row["knn_top1"]) for row in self.rows if "knn_top1" in row]
        return [(step, value) for step, value in found if math.isfinite(value)]


def section(content: dict[str, Any], name: str) -> dict[str, Any]:
    """A part of a file that should be a dictionary, else nothing."""
    part = content.get(name)
    return part if isinstance(part, dict) else {}


def read_run(run: str | Path, label: str = "") -> RunRecord:
    """Read a run directory; a damaged file becomes a problem of the record.

    Raises InputError where there is no run.
    """
    path = Path(run).expanduser()
    if not path.is_dir():
        raise InputError(f"{run}: no such run directory; check the path")
    if not is_run(path):
        raise InputError(
            f"{run} is no run directory (no {', no '.join(SIGNS_OF_RUN)}): give what --out was in cmt-mae pretrain"
        )
    record = RunRecord(path, one_line(label or name_of(path), 120))
    record.config = _settings(record)
    record.facts = _json(record, "run.json")
    record.rows = _metrics(record)
    record.bad_images = _bad_images(record)
    record.warnings = _warnings(record)
    record.pictures = _pictures(record)
    record.going_on = may_run((_text(record, "run.lock") or "").strip())
    return record


def read_config(run: Path) -> dict[str, Any]:
    """config.yaml, nested. Raises InputError where it cannot be read or holds no settings."""
    path = run / "config.yaml"
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(
            f"{run} is no run directory, {path.name} cannot be read ({error.strerror}): give a folder that "
            "`cmt-mae pretrain` wrote"
        ) from error
    return read_settings(text, str(path))


def is_run(path: Path) -> bool:
    """Whether a folder holds what `pretrain` or a training of `evaluate` writes first."""
    return any((path / name).is_file() for name in SIGNS_OF_RUN)


def read_metrics(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """All lines of a run's metrics.jsonl (or another file of lines with a step), oldest first.

    A torn line (the last one of a killed run, or one hurt on the disk) is left out.
    Raises InputError where the file cannot be read.
    """
    rows, path = [], run / name
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else []
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; make it readable") from error
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.append(row)
    return rows


def result_files(run: Path) -> list[Path]:
    """Result files of a run and of the trainings of its evaluations, sorted; none that lead out of it."""
    found: list[Path] = []
    for pattern in ("results/*.json", "evaluations/*/results/*.json"):
        if inside(run, run / pattern.split("/")[0], folder=True):
            found += [path for path in sorted(run.glob(pattern)) if inside(run, path)]
    return found


def files_below(run: Path, name: str) -> Iterator[Path]:
    """Files below a folder of the run, sorted, without following links: at most MAX_LISTED entries are looked at.

    Raises OSError where the folder leads out of the run.
    """
    folder = run / name
    if not folder.exists():
        return
    if not inside(run, folder, folder=True):
        raise OSError(None, "it leads out of the run")
    looked = 0
    for place, folders, files in os.walk(folder):
        folders.sort()
        for file in sorted(files):
            yield Path(place, file)
        looked += len(folders) + len(files)
        if looked > MAX_LISTED:
            return


def inside(run: Path, path: Path, folder: bool = False) -> bool:
    """Whether a path, its links followed, is a regular file (or a folder) below the run directory."""
    try:
        real = path.resolve(strict=True)
        below = real.is_relative_to(run.resolve())
        return below and (real.is_dir() if folder else real.is_file())
    except (OSError, RuntimeError, ValueError):  # gone, a ring of links, a zero byte
        return False


def name_of(path: Path) -> str:
    """The folder's own name, also for ``.`` and ``..``."""
    return path.name if path.name not in ("", "..") else path.resolve().name or str(path)


def labels_of(runs: list[str]) -> list[str]:
    """A short name for each run, all different: the folder's, with its parents' where two are alike."""
    paths = [Path(run).expanduser().resolve() for run in runs]
    for parts in range(1, max((len(p.parts) for p in paths), default=1) + 1):
        names = ["/".join(p.parts[-parts:]) or str(p) for p in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({number})" for number, name in enumerate(names, 1)]  # the same folder twice


def _text(record: RunRecord, name: str, most: int = MAX_TEXT) -> str | None:
    """A text file of the run; None where it is missing, or (then a problem is noted) cannot be read."""
    path = record.path / name
    if not path.exists() and not path.is_symlink():
        return None
    try:
        if not inside(record.path, path):
            raise OSError(None, "no regular file of this run")
        with open(path, "rb") as file:
            content = file.read(most + 1)
        if len(content) > most:
            raise OSError(None, f"over {most >> 20} MiB")
    except OSError as error:
        record.problems.append(f"{name} cannot be read: {error.strerror or error}")
        return None
    return content.decode("utf-8", errors="replace")


def _settings(record: RunRecord) -> dict[str, Any]:
    text = _text(record, "config.yaml")
    try:
        return {} if text is None else read_settings(text, "config.yaml")
    except InputError as error:
        record.problems.append(str(error))
        return {}


def _json(record: RunRecord, name: str) -> dict[str, Any]:
    text = _text(record, name)
    if text is None:
        return {}
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        record.problems.append(f"{name} is damaged and left out")
        return {}
    return content


def _metrics(record: RunRecord) -> list[dict[str, float]]:
    path = record.path / "metrics.jsonl"
    if not path.exists() and not path.is_symlink():
        return []
    try:
        if not inside(record.path, path) or path.stat().st_size > MAX_METRICS:
            raise InputError(f"no regular file of this run, or over {MAX_METRICS >> 20} MiB")
        rows = [_numbers(row) for row in read_metrics(record.path)]
        record.silent_seconds = max(0.0, time.time() - path.stat().st_mtime)
    except (InputError, OSError) as error:
        record.problems.append(f"metrics.jsonl is left out: {one_line(error)}")
        return []
    return [row for row in rows if row["step"] >= 0]  # nan is no step either


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line; infinities, and whole numbers beyond floats, count as nan."""
    found: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        whole = isinstance(value, int) and abs(value) < 1 << 53
        found[name] = value if whole else _finite(value)
    return found


def _finite(value: float) -> float:
    try:
        return float(value) if math.isfinite(value) else math.nan
    except OverflowError:
        return math.nan


def _bad_images(record: RunRecord) -> list[tuple[str, str]]:
    lines = (_text(record, "bad_images.txt") or "").splitlines()
    pairs = [line.partition("\t") for line in lines if line.strip()]
    return [(one_line(name, 300), one_line(reason, 300)) for name, _, reason in pairs]


def _warnings(record: RunRecord) -> list[tuple[int, str]]:
    found = []
    for line in (_text(record, "warnings.jsonl") or "").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            found.append((row["step"], one_line(row.get("text", ""), 1000)))
    return found


def _pictures(record: RunRecord) -> list[Path]:
    try:
        below = files_below(record.path, "pictures")
        files = [path for path in below if path.suffix.lower() in PICTURES]
    except OSError as error:
        record.problems.append(f"pictures cannot be listed: {error.strerror or error}")
        return []
    good = sorted(path for path in files if inside(record.path, path))
    if len(good) < len(files):
        record.problems.append(f"{len(files) - len(good)} picture(s) lead out of the run: left out")
    return good
