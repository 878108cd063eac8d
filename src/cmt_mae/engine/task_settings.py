"""Settings that every training evaluation has: fine-tuning, detection, segmentation."""

import os
from dataclasses import dataclass
from pathlib import Path

from cmt_mae.core.backbone_facts import BackboneFacts
from cmt_mae.core.errors import InputError
from cmt_mae.core.settings import (
    TIMEOUT_S,
    Amount,
    CountOrNone,
    Precision,
    check_fields,
    resume_safe,
)
from cmt_mae.engine.task import LoopSettings


@dataclass(kw_only=True)
class TaskSettings(BackboneFacts, LoopSettings):
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
    workers: CountOrNone = resume_safe(2)
    """Processes that load images, for each process that computes; 0: none."""
    timeout_s: Amount = resume_safe(TIMEOUT_S)
    """A loader process that gives no answer for so many seconds counts as hung; 0: wait for ever."""
    eval_every: Amount = resume_safe(0.0)
    """Epochs between two evaluations on the validation images; 0: only at the end."""
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
