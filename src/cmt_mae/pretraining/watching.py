"""What may go wrong in a run: told while it happens, and the run stopped where going on makes no sense."""

import sys
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from cmt_mae.core.errors import InputError
from cmt_mae.core.files import write_text
from cmt_mae.core.runs import RunDir
from cmt_mae.core.text import printable
from cmt_mae.engine.collapse import signs
from cmt_mae.engine.finiteness import bad_weights, first_part
from cmt_mae.engine.meters import Bad
from cmt_mae.pretraining.settings import PretrainConfig
from cmt_mae.pretraining.stepping import Stepper

ENOUGH_SEEN = (
    1000  # images after which the share of broken ones is judged (an epoch where it is shorter)
)


def say(accelerator: Accelerator, text: str) -> None:
    """One line on stderr, from the main process."""
    if accelerator.is_main_process:
        print(printable(text), file=sys.stderr)


class Watch:
    """Collapse, numbers that are not finite and broken images of one run; called by all processes alike."""

    def __init__(
        self,
        config: PretrainConfig,
        accelerator: Accelerator,
        stepper: Stepper,
        n_images: int,
        run: RunDir,
    ) -> None:
        """n_images: of the training data."""
        self.config, self.accelerator, self.stepper = config, accelerator, stepper
        self.n_images, self.run = n_images, run
        self.bad: dict[int, tuple[str, str]] = {}
        """Broken images this process met: index -> (name, reason)."""
        self.alarms: set[str] = set()  # signs of collapse that have been told

    def warn(self, step: int, text: str) -> None:
        """One line on stderr, and in the run's warnings.jsonl for its report."""
        say(self.accelerator, f"warning: {text}")
        self.run.append_warning(step, text)

    def collapse(self, row: dict[str, Any], step: int) -> None:
        """Warn where features or attention say nothing about the images any more, once until it is over."""
        now = {sign.split()[0]: sign for sign in signs(row)}
        new = [sign for name, sign in now.items() if name not in self.alarms]
        if new:
            self.warn(
                step,
                f"signs of collapse at step {step}: {', '.join(new)}: lower optim.blr, or look at the images and "
                "the teacher",
            )
        self.alarms = set(now)

    def numbers(self, nonfinite: dict[str, Bad], skipped: int, step: int) -> None:
        """Name what was not finite and where it began; raise InputError where it does not end."""
        row = int(self.stepper.nonfinite_row.item())
        culprit = self.culprit(nonfinite) if nonfinite else "gradient"
        if nonfinite:
            numbers = ", ".join(f"{name} ({bad.count})" for name, bad in nonfinite.items())
            self.warn(
                step,
                f"{skipped} step(s) up to step {step} skipped, not finite: first {culprit}; all: {numbers}",
            )
        if row >= self.config.runtime.max_nonfinite:
            raise InputError(
                f"{row} steps in a row up to step {step} had a loss or gradient that is not finite (first: "
                f"{culprit}); the last checkpoint in {self.run.path} is good: lower optim.blr or set optim.clip"
            )

    def culprit(self, nonfinite: dict[str, Bad]) -> str:
        """The first part of the first such step that was not finite, with the parameter where there is one."""
        step, part, number = first_part(nonfinite)
        gradient = self.stepper.bad_gradient_name()
        weights = self.bad_weights()
        of = f" of {gradient}" if part == "gradient" and gradient else ""
        held = f", weight {weights[0]} ({len(weights)} in all)" if weights else ""
        return f"{part}{of} at step {step} ({number}{held})"

    def bad_weights(self) -> list[str]:
        """Weights that hold nan or inf, in any process; called by all of them."""
        guides, learner = self.stepper.guides, self.stepper.learner
        names = bad_weights(
            {"learner": learner, "teacher": guides.teacher, "momentum": guides.momentum}
        )
        if self.accelerator.num_processes > 1:
            names = gather_object(names)
        return list(dict.fromkeys(names))

    def images(self, step: int) -> None:
        """Name broken images in bad_images.txt; raise InputError where there are too many."""
        bad = self.all_bad()
        if not bad:
            return
        if self.run.writes:
            lines = [f"{name}\t{reason}\n" for _, (name, reason) in sorted(bad.items())]
            write_text(self.run.path / "bad_images.txt", "".join(lines))
        plan, size = self.stepper.plan, self.config.batch_size
        seen = min(self.n_images, step * size)
        if seen < min(plan.steps_per_epoch * size, ENOUGH_SEEN) and step < plan.total_steps:
            return  # one broken image among the first eight says nothing of the data
        if len(bad) > self.config.data.max_bad * seen:
            names = ", ".join(name for name, _ in list(bad.values())[:3])
            raise InputError(
                f"{len(bad)} of {seen} images cannot be read (first: {names}), more than data.max_bad "
                f"{self.config.data.max_bad}: mend or delete them, all are named in "
                f"{self.run.path / 'bad_images.txt'}"
            )

    def all_bad(self) -> dict[int, tuple[str, str]]:
        """Broken images that any process met so far: index -> (name, reason)."""
        found: list[tuple[int, tuple[str, str]]] = list(self.bad.items())
        if self.accelerator.num_processes > 1:
            found = gather_object(found)
        return dict(found)
