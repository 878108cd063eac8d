"""A run directory as the page needs it.

The files may be foreign: each is read whole or named as a problem, and none leads out of the directory.
"""

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cmt_mae.core.errors import InputError
from cmt_mae.core.lock import may_run
from cmt_mae.core.metrics_file import read_metrics
from cmt_mae.core.parsing import flatten, read_settings
from cmt_mae.core.text import one_line

MAX_TEXT = 1 << 20
"""Bytes of config.yaml, run.json, bad_images.txt and warnings.jsonl; more is no such file."""
MAX_METRICS = 1 << 28
"""Bytes of metrics.jsonl: a run of 800 epochs of ImageNet has about 0.02 of this."""
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
SIGNS_OF_RUN = ("config.yaml", "run.json", "metrics.jsonl")


@dataclass
class Record:
    """Everything of one run."""

    path: Path
    label: str
    """Short name, unique on the page."""
    settings: dict[str, Any] = field(default_factory=dict)
    """config.yaml, flat: ``mask.ratio`` -> 0.75."""
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
    bench: dict[str, Any] = field(default_factory=dict)
    """bench.json, where `cmt-mae bench --out RUN` was run."""
    going_on: bool = False
    """Whether a process holds run.lock, or may (another machine's)."""
    silent_seconds: float = 0.0
    """Since the last change of metrics.jsonl."""
    problems: list[str] = field(default_factory=list)
    """What could not be read and why; one line each."""

    def setting(self, name: str, default: Any = None) -> Any:
        """One setting, or the default where config.yaml does not say."""
        value = self.settings.get(name)
        return default if value is None else value

    def plan(self, name: str) -> int:
        """A number of the plan (total_steps, switch_step, steps_per_epoch, ...); 0 where it is not known."""
        value = section(self.facts, "plan").get(name)
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


def read_record(run: str, label: str = "") -> Record:
    """Read a run directory; a damaged file becomes a problem of the record.

    Raises InputError where there is no run.
    """
    path = Path(run).expanduser()
    if not path.is_dir():
        raise InputError(f"{run}: no such run directory; check the path")
    if not any((path / name).is_file() for name in SIGNS_OF_RUN):
        raise InputError(
            f"{run} holds no run (no {', no '.join(SIGNS_OF_RUN)}): give what --out was in cmt-mae pretrain"
        )
    record = Record(path, one_line(label or name_of(path), 120))
    record.settings = _settings(record)
    record.facts = _json(record, "run.json")
    record.bench = _json(record, "bench.json")
    record.rows = _metrics(record)
    record.bad_images = _bad_images(record)
    record.warnings = _warnings(record)
    record.pictures = _pictures(record)
    record.going_on = may_run((_text(record, "run.lock") or "").strip())
    return record


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


def inside(run: Path, path: Path) -> bool:
    """Whether a path, its links followed, is a regular file below the run directory."""
    try:
        real = path.resolve(strict=True)
        return real.is_relative_to(run.resolve()) and real.is_file()
    except (OSError, RuntimeError, ValueError):  # gone, a ring of links, a zero byte
        return False


def _text(record: Record, name: str, most: int = MAX_TEXT) -> str | None:
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


def _settings(record: Record) -> dict[str, Any]:
    text = _text(record, "config.yaml")
    if text is None:
        return {}
    try:
        settings = flatten(read_settings(text, "config.yaml"))
        return {one_line(name, 120): value for name, value in settings.items()}
    except InputError as error:
        record.problems.append(str(error))
        return {}


def _json(record: Record, name: str) -> dict[str, Any]:
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


def _metrics(record: Record) -> list[dict[str, float]]:
    path = record.path / "metrics.jsonl"
    if not path.exists() and not path.is_symlink():
        return []
    try:
        if not inside(record.path, path) or path.stat().st_size > MAX_METRICS:
            raise InputError(f"no regular file of this run, or over {MAX_METRICS >> 20} MiB")
        rows = [_numbers(row) for row in read_metrics(record.path)]
    except (InputError, OSError) as error:
        record.problems.append(f"metrics.jsonl is left out: {one_line(error)}")
        return []
    record.silent_seconds = max(0.0, time.time() - path.stat().st_mtime)
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


def _bad_images(record: Record) -> list[tuple[str, str]]:
    lines = (_text(record, "bad_images.txt") or "").splitlines()
    pairs = [line.partition("\t") for line in lines if line.strip()]
    return [(one_line(name, 300), one_line(reason, 300)) for name, _, reason in pairs]


def _warnings(record: Record) -> list[tuple[int, str]]:
    found = []
    for line in (_text(record, "warnings.jsonl") or "").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            found.append((row["step"], one_line(row.get("text", ""), 1000)))
    return found


def _pictures(record: Record) -> list[Path]:
    folder = record.path / "pictures"
    try:
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURES)
    except OSError as error:
        record.problems.append(f"pictures cannot be listed: {error.strerror}")
        return []
    good = [path for path in files if inside(record.path, path)]
    if len(good) < len(files):
        record.problems.append(f"{len(files) - len(good)} picture(s) lead out of the run: left out")
    return good
