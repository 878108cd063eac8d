"""Settings that every training evaluation has: fine-tuning, detection, segmentation."""

import os
from dataclasses import dataclass
from pathlib import Path

from cmt_mae.core.errors import InputError
from cmt_mae.data.workers import TIMEOUT_S

# Settings that do not affect the result: they may change when a run is continued.
RESUME_SAFE_SETTINGS = (
    "backbone", "data", "out", "device", "workers", "timeout_s", "micro_batch", "log_every", "checkpoint_every",
    "eval_every", "keep_last", "max_nonfinite", "tracker", "progress", "pictures",
)  # fmt: skip


@dataclass(kw_only=True)
class TaskSettings:
    """What fine-tuning, detection and segmentation have in common."""

    backbone: str = ""
    """Run directory, checkpoint file, timm name or `embedded`."""
    data: str = ""
    """The data set's folder, in its public layout."""
    out: str | None = None
    """Run directory of this training; the same command again continues it. Default: inside the backbone's run."""
    key: str | None = None
    """`momentum` takes the momentum student of a run; other files: their entry of this name."""
    seed: int = 0
    """Of new weights, order, crops and everything else that is drawn."""
    precision: str = "auto"
    """auto (bf16 on GPUs, else fp32) | bf16 | fp32."""
    device: str = "auto"
    """auto | cpu | cuda | mps."""
    workers: int = 2
    """Processes that load images, for each process that computes; 0: none."""
    timeout_s: float = TIMEOUT_S
    """A loader process that gives no answer for so many seconds counts as hung; 0: wait for ever."""
    micro_batch: int = 0
    """Images a process takes at a time; 0: its whole share of the batch. Gradients are accumulated."""
    log_every: int = 20
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every: float = 1.0
    """Epochs between checkpoints."""
    eval_every: float = 0.0
    """Epochs between two evaluations on the validation images; 0: only at the end."""
    keep_last: int = 1
    """How many of the newest checkpoints are kept."""
    max_nonfinite: int = 20
    """So many steps in a row without a finite loss and gradient stop the run."""
    tracker: str = "none"
    """none | wandb: a further place for metrics (metrics.jsonl and tensorboard are always written)."""
    progress: bool = True
    """Show the progress bar."""
    pictures: int = 8
    """How many validation images are pictured at every evaluation; 0: none."""

    def run_directory(self, task: str, protocol: str) -> Path:
        """Where this training lives: ``out``, or TASK-PROTOCOL inside the backbone's run directory.

        Raises InputError where nothing says so, or a common setting is missing or impossible.
        """
        if not self.backbone:
            raise InputError("no backbone: give --backbone RUN, FILE or NAME")
        if not self.data:
            raise InputError("no data: give --data FOLDER")
        if self.log_every < 1 or self.keep_last < 1 or self.workers < 0 or self.micro_batch < 0:
            raise InputError(
                "log_every and keep_last must be positive, workers and micro_batch 0 or more"
            )
        if self.out is not None:
            return Path(self.out)
        if (Path(self.backbone) / "config.yaml").is_file():
            suffix = f"-{self.key}" if self.key else ""
            return Path(self.backbone) / "evaluations" / f"{task}-{protocol}{suffix}"
        if os.sep in self.backbone and not Path(self.backbone).expanduser().exists():
            raise InputError(f"{self.backbone}: no such run directory or file; check --backbone")
        raise InputError(
            f"{self.backbone} is no run directory, so there is no place for this training: give --out FOLDER"
        )
