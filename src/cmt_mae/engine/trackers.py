"""Where metrics go: metrics.jsonl and tensorboard always, wandb by choice."""

import contextlib
from typing import Any

from cmt_mae.core.errors import InputError
from cmt_mae.core.files import writing
from cmt_mae.core.runs import RunDir


class Trackers:
    """Open while a run goes on; only the main process writes."""

    def __init__(self, run: RunDir, tracker: str, settings: dict[str, Any], step: int) -> None:
        """tracker: none | wandb. step: where the run goes on; later tensorboard entries are dropped."""
        self.run, self.board, self.wandb = run, None, None
        if not run.writes:
            return
        from torch.utils.tensorboard import SummaryWriter

        with writing(run.path / "tensorboard"):
            self.board = SummaryWriter(str(run.path / "tensorboard"), purge_step=step + 1)
        if tracker == "wandb":
            try:
                import wandb
            except ImportError as error:
                raise InputError(
                    "runtime.tracker wandb needs the package: pip install wandb"
                ) from error
            self.wandb = wandb.init(
                dir=run.path, name=run.path.name, config=settings, resume="allow"
            )

    def write(self, row: dict[str, Any]) -> None:
        """One row with its step."""
        if not self.run.writes:
            return
        self.run.append_metrics(row)
        numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
        with writing(self.run.path / "tensorboard"):
            for name, value in numbers.items():
                if self.board is not None:
                    self.board.add_scalar(name, value, row["step"])
        if self.wandb is not None:
            self.wandb.log(numbers, step=row["step"])

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.board is not None:
            # a full disk is reported once: not here where it is what ends the run
            trouble = (
                contextlib.suppress(OSError) if kind else writing(self.run.path / "tensorboard")
            )
            with trouble:
                self.board.close()
        if self.wandb is not None:
            self.wandb.finish()
