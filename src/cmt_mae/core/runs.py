"""Writing a run directory, the only interface between commands.

run_reader.py reads it, lock.py locks it, continuing.py refuses what is another run.
"""

import dataclasses
import json
import os
import platform
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from cmt_mae.core.errors import InputError
from cmt_mae.core.files import (
    ASIDE,
    flush,
    flush_folder,
    make_folder,
    sweep,
    write_json,
    write_text,
    writing,
)
from cmt_mae.core.lock import Lock, no_link

LIBRARIES = (
    "cmt-mae", "torch", "torchvision", "timm", "accelerate", "numpy", "pillow", "simplejpeg",
)  # fmt: skip


class RunDir:
    """One run's folder: a new one, or the same one again. Rank 0 alone writes.

    Nothing is written before ``claim``, so that a start that fails leaves nothing behind.
    """

    def __init__(
        self,
        out: str,
        settings: dict[str, Any],
        resume_safe: tuple[str, ...],
        writes: bool,
        defaults: dict[str, Any] | None = None,
    ) -> None:
        """settings: nested plain values. resume_safe: prefixes of keys that do not affect results.
        defaults: of all settings; a run from before one of them existed had its default.

        Raises InputError where the folder holds something else, or a run with other settings.
        """
        self.path, self.writes, self.settings = Path(out), writes, settings
        self.resume_safe, self.defaults = resume_safe, defaults or {}
        self.checkpoints = self.path / "checkpoints"
        self._lock = Lock(self.path / "run.lock")
        try:
            self._look()
        except OSError as error:
            raise InputError(
                f"{out} cannot be read: {error.strerror}; make it readable or choose another --out"
            ) from error

    def _look(self) -> None:
        if (self.path / "config.yaml").exists():
            from cmt_mae.core.continuing import refuse_another

            refuse_another(self)
        elif self.path.exists() and (not self.path.is_dir() or self._foreign()):
            raise InputError(
                f"{self.path} is not empty and holds no run: choose a new folder for --out"
            )

    def claim(self) -> None:
        """Take the folder for this process, clear away what killed ones left, and write config.yaml.

        Raises InputError while another process runs in it, or where it cannot be written.
        """
        if not self.writes:
            return
        with writing(self.path):
            make_folder(self.path)
        self._lock.take()
        for part in ("", "checkpoints", "pictures", "results", "predictions"):
            with writing(self.path / part):
                sweep(self.path / part)
        write_text(self.path / "config.yaml", yaml.safe_dump(self.settings, sort_keys=False))

    def note(self, **facts: Any) -> None:
        """Put further facts into run.json, in place of those of the same name."""
        known = self.known_facts()
        if {**known, **facts} != known:
            write_json(self.path / "run.json", {**known, **facts})

    def _foreign(self) -> bool:
        # a run killed at once leaves these two behind
        names = (p.name for p in self.path.iterdir())
        return any(name != "run.lock" and not ASIDE.fullmatch(name) for name in names)

    def close(self) -> None:
        """Give the folder back."""
        self._lock.give_back()

    def known_facts(self) -> dict[str, Any]:
        """run.json of an earlier start, or nothing. Raises InputError where it is damaged."""
        path = self.path / "run.json"
        try:
            facts = json.loads(path.read_bytes())
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise InputError(
                f"{path} cannot be read: {error.strerror}; make it readable"
            ) from error
        except (ValueError, RecursionError):
            facts = None
        kinds = {"starts": list, "data": dict, "backbone": dict}  # what is read from it
        if not isinstance(facts, dict) or not all(
            isinstance(facts.get(part, kind()), kind) for part, kind in kinds.items()
        ):
            raise InputError(
                f"{path} is damaged: bring it back from a copy, or delete it (data and backbone are then "
                "not compared with those of the start)"
            )
        return facts

    def write_facts(self, facts: dict[str, Any]) -> None:
        """run.json: versions, device, command, data; a list of the starts of this run."""
        starts = self.known_facts().get("starts", [])
        start = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "command": sys.argv}
        write_json(self.path / "run.json", {**facts, **environment(), "starts": [*starts, start]})

    def append_metrics(self, row: dict[str, Any]) -> None:
        """One line of metrics.jsonl."""
        self._append("metrics.jsonl", row)

    def append_warning(self, step: int, text: str) -> None:
        """One line of warnings.jsonl: stderr is lost with the terminal."""
        if self.writes:
            self._append("warnings.jsonl", {"step": step, "text": text})

    def _append(self, name: str, row: dict[str, Any]) -> None:
        path = self.path / name
        with writing(path), open(path, "a", encoding="utf-8", opener=no_link) as file:
            file.write(json.dumps(row) + "\n")

    def settle(self) -> None:
        """Before a checkpoint: the folder is still ours, and the lines of metrics so far are on the disk.

        Else a power cut could keep the checkpoint and lose lines before it. Raises InputError where
        another process has taken the folder.
        """
        self._lock.check()
        path = self.path / "metrics.jsonl"
        with writing(path):
            if path.exists():
                with open(path, "rb") as file:
                    flush(file.fileno())
                flush_folder(self.path)

    def read_metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl, oldest first; a torn one is left out."""
        from cmt_mae.core.run_reader import read_metrics

        return read_metrics(self.path)

    def cut_metrics(self, step: int, keep: Callable[[dict[str, Any]], bool] | None = None) -> None:
        """Forget lines after ``step``, and those not to ``keep``: the run goes on and writes them again."""
        for name in ("metrics.jsonl", "warnings.jsonl"):
            path = self.path / name
            if path.exists():
                from cmt_mae.core.run_reader import read_metrics

                kept = (
                    json.dumps(row) + "\n"
                    for row in read_metrics(self.path, name)
                    if row["step"] <= step and (keep is None or keep(row))
                )
                write_text(path, "".join(kept))


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
    """Name of the CPU, from Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), ""
    )
