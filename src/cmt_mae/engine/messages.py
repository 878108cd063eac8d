"""What a run says on stderr, once for all its processes."""

import sys

from accelerate import Accelerator

from cmt_mae.core.runs import RunDir
from cmt_mae.core.text import printable


def say(accelerator: Accelerator, text: str) -> None:
    """One line on stderr, from the main process."""
    if accelerator.is_main_process:
        print(printable(text), file=sys.stderr)


def warn(accelerator: Accelerator, run: RunDir, step: int, text: str) -> None:
    """One line on stderr, and in the run's warnings.jsonl for its report."""
    say(accelerator, f"warning: {text}")
    run.append_warning(step, text)
