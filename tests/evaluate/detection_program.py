"""Detection as a program that can be killed, or started by torchrun: detection_program.py JSON.

The settings of CocoConfig, and ``kill_at``: [signal, n] is sent as the n-th batch goes to the device.
"""

import json
import os
import sys
from typing import Any

import torch

from cmt_mae.engine.processes import leave_processes
from cmt_mae.evaluate.detection import CocoConfig, evaluate_coco, task
from cmt_mae.evaluate.result import Result

torch.set_num_threads(1)

SMALL: dict[str, Any] = {
    "preset": "quick", "workers": 0, "progress": False, "device": "cpu", "pictures": 0, "log_every": 1,
    "channels": 16, "hidden": 32, "short_sides": (40, 48), "longest": 64, "test_short": 48,
    "test_longest": 64, "epochs": 2, "score_threshold": 0.01,
}  # fmt: skip


def run(kill_at: tuple[int, int] | None = None, **given: Any) -> Result:
    """One small training; with ``kill_at`` this process sends itself the signal."""
    to_device, seen = task.to_device, 0

    def counted(*arguments: Any) -> Any:
        nonlocal seen
        seen += 1
        if kill_at is not None and seen == kill_at[1]:
            os.kill(os.getpid(), kill_at[0])
        return to_device(*arguments)

    task.to_device = counted
    try:
        return evaluate_coco(CocoConfig(**{**SMALL, **given}))
    finally:
        task.to_device = to_device


if __name__ == "__main__":
    run(**json.loads(sys.argv[1]))
    leave_processes()
