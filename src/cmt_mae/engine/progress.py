"""The progress bar of long work, or plain lines where there is no terminal."""

import time
from datetime import datetime, timedelta
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from cmt_mae.core.text import duration, printable


class RateColumn(ProgressColumn):
    """Images a second, over the last steps."""

    def render(self, task: Task) -> Text:
        """``1234 img/s``, or nothing yet."""
        speed = task.finished_speed or task.speed
        return Text(
            f"{speed * task.fields['images_per_step']:.0f} img/s" if speed else "", no_wrap=True
        )


def training_bar(show: bool) -> Progress:
    """A bar on stderr with stage, epoch, losses, rate and remaining time, or lines where that is no terminal.

    ``add_task`` needs the field ``images_per_step``. Silent when not shown.
    """
    return _bar(show, 10, (RateColumn(),), refresh_per_second=2)


def _bar(show: bool, width: int, more: tuple[ProgressColumn, ...], **options: Any) -> Progress:
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        return _Lines(console=console, auto_refresh=False, disable=not show)
    text, count = TextColumn("{task.description}", markup=False), MofNCompleteColumn()
    remaining = TimeRemainingColumn(compact=True)
    columns = (text, BarColumn(bar_width=width), count, *more, remaining)
    return Progress(*columns, console=console, disable=not show, **options)


LINE_SECONDS = 5.0
"""Between two lines about a work's progress in a file or pipe."""


class _Lines(Progress):
    """Prints ``description: 120 of 400, 3 min left`` to the console every LINE_SECONDS, and no bar."""

    last = 0.0

    def start(self) -> None:
        """Nothing is drawn; the first line comes after LINE_SECONDS."""
        self.last = time.monotonic()

    def stop(self) -> None:
        """Nor here."""

    def refresh(self) -> None:
        """Nor here."""

    def update(self, task_id: Any, **changes: Any) -> None:
        """As rich's, and the line if it is time."""
        super().update(task_id, **changes)
        self._say(task_id)

    def advance(self, task_id: Any, advance: float = 1) -> None:
        """As rich's, and the line if it is time."""
        super().advance(task_id, advance)
        self._say(task_id)

    def _say(self, task_id: Any) -> None:
        if self.disable or time.monotonic() - self.last < LINE_SECONDS:
            return
        self.last = time.monotonic()
        task = self._tasks[task_id]
        total = "" if task.total is None else f" of {task.total:.0f}"
        remaining = task.time_remaining
        left = "" if not remaining else f", {duration(remaining)} left"
        what = printable(task.description) or "so far"
        self.console.out(f"{what}: {task.completed:.0f}{total}{left}")


def evaluation_progress(show: bool) -> Progress:
    """What an evaluation says on stderr about how far it is: a bar, or lines where that is no terminal."""
    return _bar(show, 20, (), transient=True)


class Forecast:
    """Says once, after a few steps, when a training will end."""

    WARM, SECONDS, LONG = 2, 5.0, 60.0

    def __init__(self, step: int, total: int) -> None:
        """step: done before this start."""
        self.total, self.warm = total, step + self.WARM
        self._since = 0.0
        self._said = False

    def text(self, step: int) -> str:
        """What to say after this step; "" before it can be known, and for the rest of the run."""
        now = time.perf_counter()
        if step == self.warm:
            self._since = now
        elapsed = now - self._since
        if self._said or step <= self.warm or elapsed < self.SECONDS:
            return ""
        self._said = True
        each = elapsed / (step - self.warm)
        left = each * (self.total - step)
        if left < self.LONG:
            return ""
        end = datetime.now() + timedelta(seconds=left)
        return (
            f"{self.total - step} steps to go at {each:.2g} s each: about {duration(left)}, until "
            f"{end:%a %d %b %H:%M}"
        )
