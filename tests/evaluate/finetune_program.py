"""Fine-tuning as a program that can be killed, or started by torchrun: finetune_program.py JSON.

The settings of FinetuneConfig, and ``kill_at``: [signal, n] is sent by the n-th batch that is loaded.
"""

import json
import os
import sys
import time
from typing import Any

import torch

from cmt_mae.core.runs import RunDir
from cmt_mae.engine.processes import leave_processes
from cmt_mae.evaluate import finetune
from cmt_mae.evaluate.finetune import FinetuneConfig, evaluate_finetune
from cmt_mae.evaluate.result import Result

torch.set_num_threads(1)


def run(kill_at: tuple[int, int] | None = None, **given: Any) -> Result:
    """One fine-tuning; with ``kill_at`` this process sends itself the signal."""
    collate, loaded = finetune.collate, 0

    def counted(rows: list[dict[str, Any]]) -> dict[str, Any]:
        nonlocal loaded
        loaded += 1
        if kill_at is not None and loaded == kill_at[1]:
            os.kill(os.getpid(), kill_at[0])
        return collate(rows)

    def look_late(out: str, *how: Any, **named: Any) -> RunDir:
        """The other processes look later: the first one must not have written to the folder before."""
        before = os.path.exists(out) and sorted(os.listdir(out))
        time.sleep(float(os.environ.get("RANK", 0)))
        assert (os.path.exists(out) and sorted(os.listdir(out))) == before
        return RunDir(out, *how, **named)

    finetune.collate, finetune.RunDir = counted, look_late
    try:
        return evaluate_finetune(FinetuneConfig(**{"workers": 0, "progress": False, **given}))
    finally:
        finetune.collate, finetune.RunDir = collate, RunDir


if __name__ == "__main__":
    run(**json.loads(sys.argv[1]))
    leave_processes()
