"""Segmentation as a program that can be killed, or started by torchrun: segmentation_program.py JSON ...

One run after another, each with the settings of Ade20kConfig, and ``kill_at``: [signal, n] is sent by the n-th
micro-batch that is loaded.
"""

import json
import os
import sys
from typing import Any

import torch

from cmt_mae.engine.processes import leave_processes
from cmt_mae.evaluate import segmentation
from cmt_mae.evaluate.result import Result
from cmt_mae.evaluate.segmentation import Ade20kConfig, evaluate_ade20k

torch.set_num_threads(1)


def run(kill_at: tuple[int, int] | None = None, **given: Any) -> Result:
    """One segmentation; with ``kill_at`` this process sends itself the signal."""
    collate, loaded = segmentation.collate, 0

    def counted(rows: list[Any]) -> Any:
        nonlocal loaded
        loaded += 1
        if kill_at is not None and loaded == kill_at[1]:
            os.kill(os.getpid(), kill_at[0])
        return collate(rows)

    segmentation.collate = counted
    try:
        return evaluate_ade20k(
            Ade20kConfig(**{"workers": 0, "progress": False, "device": "cpu", **given})
        )
    finally:
        segmentation.collate = collate


if __name__ == "__main__":
    for words in sys.argv[1:]:
        run(**json.loads(words))
    leave_processes()
