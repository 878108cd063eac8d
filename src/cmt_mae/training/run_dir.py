"""A run directory: the only interface between commands (design section 5)."""

import dataclasses
import fcntl
import json
import os
import platform
import socket
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from cmt_mae.errors import InputError
from cmt_mae.training.checkpoint import list_checkpoints
from cmt_mae.training.files import write_atomically, write_json

LIBRARIES = ("cmt-mae", "torch", "torchvision", "timm", "accelerate", "numpy", "pillow")


class RunDir:
    """One run's folder: a new one, or the same one again. Rank 0 alone writes.

    Nothing is written before ``claim``, so that a start that fails leaves nothing behind.
    """

    def __init__(
        self, out: str, settings: dict[str, Any], indifferent: tuple[str, ...], writes: bool
    ) -> None:
        """settings: nested plain values. indifferent: prefixes of keys that do not affect results.

        Raises InputError where the folder holds something else, or a run with other settings.
        """
        self.path, self.writes, self._settings = Path(out), writes, settings
        self.checkpoints = self.path / "checkpoints"
        self._lock_file: Any = None
        existing = self.path / "config.yaml"
        if existing.exists():
            if list_checkpoints(
                self.checkpoints
            ):  # else it never got anywhere: settings may change
                before = yaml.safe_load(existing.read_text())
                refuse_changes(self.path, before, settings, indifferent)
        elif self.path.exists() and (not self.path.is_dir() or self._foreign()):
            raise InputError(f"{out} is not empty and holds no run: choose a new folder for --out")

    def claim(self) -> None:
        """Take the folder for this process and write config.yaml.

        Raises InputError while another process runs in it, or where it cannot be written.
        """
        if self.writes:
            self._lock(str(self.path))
            text = yaml.safe_dump(self._settings, sort_keys=False)
            write_atomically(self.path / "config.yaml", lambda aside: aside.write_text(text))

    def _foreign(self) -> bool:
        return any(p.name != "run.lock" for p in self.path.iterdir())

    def _lock(self, out: str) -> None:
        """flock ends with its process, so a stale lock cannot stay behind; the text is for people."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock_file = open(self.path / "run.lock", "a+")  # noqa: SIM115 (held until the run ends)
        except OSError as error:
            raise InputError(
                f"cannot write to {out}: {error.strerror}; choose another --out"
            ) from error
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock_file.seek(0)
            owner = self._lock_file.read().strip() or "another process"
            raise InputError(
                f"{out} is in use by {owner}: wait for it, or choose another --out"
            ) from None
        self._lock_file.truncate(0)
        self._lock_file.write(f"pid {os.getpid()} on {socket.gethostname()}")
        self._lock_file.flush()

    def close(self) -> None:
        """Give the folder back."""
        if self._lock_file is not None:
            self._lock_file.close()

    def known_facts(self) -> dict[str, Any]:
        """run.json of an earlier start, or nothing."""
        path = self.path / "run.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def write_facts(self, facts: dict[str, Any]) -> None:
        """run.json: versions, device, command, data; a list of the starts of this run."""
        starts = self.known_facts().get("starts", [])
        start = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "command": sys.argv}
        write_json(self.path / "run.json", {**facts, **environment(), "starts": [*starts, start]})

    def append_metrics(self, row: dict[str, Any]) -> None:
        """One line of metrics.jsonl."""
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl, oldest first; a torn last line is left out."""
        return read_metrics(self.path)

    def cut_metrics(self, step: int, keep: Callable[[dict[str, Any]], bool] | None = None) -> None:
        """Forget lines after ``step``, and those not to ``keep``: the run goes on and writes them again."""
        path = self.path / "metrics.jsonl"
        if path.exists():
            kept = "".join(
                json.dumps(row) + "\n"
                for row in self.read_metrics()
                if row["step"] <= step and (keep is None or keep(row))
            )
            write_atomically(path, lambda aside: aside.write_text(kept))


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All lines of a run's metrics.jsonl, oldest first; a torn last line is left out."""
    rows = []
    path = run / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def refuse_changes(
    run: Path, before: dict[str, Any], now: dict[str, Any], indifferent: tuple[str, ...]
) -> None:
    """Raise InputError with the differences where a setting that affects results has changed."""
    old, new = flatten(before), flatten(now)
    differences = [
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key) and not key.startswith(indifferent)
    ]
    if differences:
        raise InputError(
            f"{run} holds a run with other settings ({'; '.join(differences)}): give the same settings to "
            "continue it, or another --out"
        )


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def plain(config: Any) -> dict[str, Any]:
    """A settings dataclass as nested plain values."""
    content: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return content


def environment() -> dict[str, Any]:
    """Versions and hardware, for run.json and results."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    hardware = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    return {
        "versions": {"python": platform.python_version(), **versions},
        "hardware": {**hardware, "processor": processor(), "gpu": gpu},
    }


def processor() -> str:
    """Name of the CPU where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), ""
    )
