"""metrics.jsonl of a run, read without torch: reports start at once."""

import json
from pathlib import Path
from typing import Any

from cmt_mae.core.errors import InputError


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
