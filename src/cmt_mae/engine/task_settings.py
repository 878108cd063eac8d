"""Settings that every training evaluation has: fine-tuning, detection, segmentation."""

import os
from dataclasses import dataclass
from pathlib import Path

from cmt_mae.core.backbone_facts import BackboneFacts
from cmt_mae.core.errors import InputError
from cmt_mae.core.settings import (
    TIMEOUT_S,
    Amount,
    Count,
    CountOrNone,
    Device,
    Parallel,
    Precision,
    Tracker,
    check_fields,
    resume_safe,
)


@dataclass(kw_only=True)
class TaskSettings(BackboneFacts):
    """What fine-tuning, detection and segmentation have in common."""

    backbone: str = resume_safe("")
    """Run directory, checkpoint file, timm name or `embedded`."""
    data: str = resume_safe("")
    """The data set's folder, in its public layout."""
    out: str | None = resume_safe(None)
    """Run directory of this training; the same command again continues it. Default: inside the backbone's run."""
    key: str | None = None
    """`momentum` takes the momentum student of a run; other files: their entry of this name."""
    seed: CountOrNone = 0
    """Of new weights, order, crops and everything else that is drawn."""
    precision: Precision = "auto"
    """auto (bf16 on GPUs, else fp32) | bf16 | fp32."""
    device: Device = resume_safe("auto")
    """auto | cpu | cuda | mps."""
    parallel: Parallel = resume_safe("ddp")
    """How several processes share the work: ddp (each holds the network) | fsdp (weights, gradients and optimizer
    are cut into pieces, one a process)."""
    deterministic: bool = resume_safe(False)
    """On a GPU too, the same seed gives the same bits (slower; on CPU it always does)."""
    compile: bool = resume_safe(False)
    """torch.compile the blocks of the network (minutes at the start; off where this machine cannot)."""
    workers: CountOrNone = resume_safe(2)
    """Processes that load images, for each process that computes; 0: none."""
    timeout_s: Amount = resume_safe(TIMEOUT_S)
    """A loader process that gives no answer for so many seconds counts as hung; 0: wait for ever."""
    micro_batch: CountOrNone = resume_safe(0)
    """Images a process takes at a time; 0: its whole share of the batch. Gradients are accumulated."""
    log_every: Count = resume_safe(20)
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every: Amount = resume_safe(1.0)
    """Epochs between checkpoints."""
    eval_every: Amount = resume_safe(0.0)
    """Epochs between two evaluations on the validation images; 0: only at the end."""
    keep_last: Count = resume_safe(1)
    """How many of the newest checkpoints are kept."""
    max_nonfinite: Count = resume_safe(20)
    """So many steps in a row without a finite loss and gradient stop the run."""
    tracker: Tracker = resume_safe("none")
    """none | wandb: a further place for metrics (metrics.jsonl and tensorboard are always written)."""
    progress: bool = resume_safe(True)
    """Show the progress bar."""
    pictures: CountOrNone = resume_safe(8)
    """How many validation images are pictured at every evaluation; 0: none."""

    def run_directory(self, task: str, protocol: str) -> Path:
        """Where this training lives: ``out``, or TASK-PROTOCOL inside the backbone's run directory.

        Raises InputError where nothing says so, or a common setting is missing or impossible.
        """
        if not self.backbone:
            raise InputError("no backbone: give --backbone RUN, FILE or NAME")
        if not self.data:
            raise InputError("no data: give --data FOLDER")
        check_fields(self)
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
