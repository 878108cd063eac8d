"""The three evaluations that train, as functions and as a program that can be killed or run on several processes.

As a program: trainings.py TASK JSON ..., one run after another. ``kill_at``: [signal, n] is sent to itself
by the n-th micro-batch.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from cmt_mae.core.checkpoint import list_checkpoints, load_checkpoint
from cmt_mae.core.runs import RunDir
from cmt_mae.engine.processes import leave_processes
from cmt_mae.evaluate import finetune, segmentation, training
from cmt_mae.evaluate.detection import CocoConfig, evaluate_coco
from cmt_mae.evaluate.detection import task as detection
from cmt_mae.evaluate.result import Result
from programs import start

torch.set_num_threads(1)

TASKS: dict[str, tuple[Any, Any, Any, str]] = {
    "finetune": (finetune.evaluate_finetune, finetune.FinetuneConfig, finetune, "collate"),
    "ade20k": (segmentation.evaluate_ade20k, segmentation.Ade20kConfig, segmentation, "collate"),
    "coco": (evaluate_coco, CocoConfig, detection, "to_device"),
}
"""Function, settings, and what each micro-batch goes through once."""

SMALL_COCO: dict[str, Any] = {
    "preset": "quick", "log_every": 1, "channels": 16, "hidden": 32, "short_sides": (40, 48), "longest": 64,
    "test_short": 48, "test_longest": 64, "epochs": 2, "score_threshold": 0.01,
}  # fmt: skip

TIMED = ("images_per_second", "data_wait_share", "peak_memory_gb")


def look_late(out: str, *how: Any, **named: Any) -> RunDir:
    """The other processes look later: the first one must not have written to the folder before."""
    before = os.path.exists(out) and sorted(os.listdir(out))
    time.sleep(float(os.environ.get("RANK", 0)))
    assert (os.path.exists(out) and sorted(os.listdir(out))) == before
    return RunDir(out, *how, **named)


def run(name: str, kill_at: tuple[int, int] | None = None, **given: Any) -> Result:
    """One small training on the CPU; with ``kill_at`` this process sends itself the signal."""
    evaluate, config, module, passed = TASKS[name]
    real, seen = getattr(module, passed), 0

    def counted(*arguments: Any) -> Any:
        nonlocal seen
        seen += 1
        if kill_at is not None and seen == kill_at[1]:
            os.kill(os.getpid(), kill_at[0])
        return real(*arguments)

    defaults = {"workers": 0, "progress": False, "device": "cpu", "pictures": 0}
    defaults |= SMALL_COCO if name == "coco" else {}
    setattr(module, passed, counted)
    training.RunDir = look_late  # type: ignore[assignment, misc]
    try:
        return evaluate(config(**{**defaults, **given}))
    finally:
        setattr(module, passed, real)
        training.RunDir = RunDir  # type: ignore[misc]


def program(
    name: str, *runs: dict[str, Any], processes: int = 1
) -> "subprocess.CompletedProcess[str]":
    return start(Path(__file__), name, *map(json.dumps, runs), processes=processes)


def rows(folder: str | Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    read = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMED} for row in read]


def saved(folder: str | Path) -> Result:
    """The one result of a run."""
    (file,) = (Path(folder) / "results").glob("*.json")
    return Result.load(file)


def last_checkpoint(folder: str | Path) -> dict[str, Any]:
    return load_checkpoint(list_checkpoints(Path(folder) / "checkpoints")[-1])


def assert_same_end(one: str | Path, two: str | Path) -> None:
    """Bit for bit: weights, their average, lines, result and stored predictions."""
    first, second = last_checkpoint(one), last_checkpoint(two)
    for part in ("model", "average"):
        mine, theirs = first.get(part) or {}, second.get(part) or {}
        assert mine.keys() == theirs.keys()
        assert [k for k, v in mine.items() if not torch.equal(v, theirs[k])] == []
    assert str(rows(one)) == str(rows(two))  # as text: NaN is NaN
    a, b = saved(one), saved(two)
    for result in (a, b):
        result.details.pop("run", None)
    assert str((a.metrics, a.details, a.protocol)) == str((b.metrics, b.details, b.protocol))
    for file in (Path(one) / "predictions").glob("*.json"):
        assert file.read_bytes() == (Path(two) / "predictions" / file.name).read_bytes()


if __name__ == "__main__":
    for words in sys.argv[2:]:
        run(sys.argv[1], **json.loads(words))
    leave_processes()
