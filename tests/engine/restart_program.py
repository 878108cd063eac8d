"""A process that torchrun starts: at the first start rank 1 is killed, at the second both come to the end."""

import os
import signal
import sys

import torch

from cmt_mae.engine.processes import leave_processes, make_accelerator

accelerator = make_accelerator("cpu", "fp32")
accelerator.reduce(torch.ones(1))
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    if accelerator.process_index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        for _ in range(100):
            accelerator.reduce(torch.ones(1))
    except RuntimeError:
        sys.exit(75)
sys.stdout.write(f"sum {accelerator.reduce(torch.ones(1)).item()}\n")  # in one piece
leave_processes()
