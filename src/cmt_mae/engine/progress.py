"""The progress bar of long work."""

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


class RateColumn(ProgressColumn):
    """Images a second, over the last steps."""

    def render(self, task: Task) -> Text:
        """``1234 img/s``, or nothing yet."""
        speed = task.finished_speed or task.speed
        return Text(
            f"{speed * task.fields['images_per_step']:.0f} img/s" if speed else "", no_wrap=True
        )


def training_bar(show: bool) -> Progress:
    """A bar on stderr with stage, epoch, losses, rate and remaining time; silent when not shown.

    ``add_task`` needs the field ``images_per_step``.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        RateColumn(),
        TimeRemainingColumn(compact=True),
        console=Console(stderr=True),
        disable=not show,
        refresh_per_second=2,
    )
