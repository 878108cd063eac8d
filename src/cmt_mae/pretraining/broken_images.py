"""Images of a run that cannot be read: left out, counted, named; too many stop the run."""

from accelerate import Accelerator
from accelerate.utils import gather_object

from cmt_mae.core.errors import InputError
from cmt_mae.core.files import write_text
from cmt_mae.core.runs import RunDir

ENOUGH_SEEN = (
    1000  # images after which the share of broken ones is judged (an epoch where it is shorter)
)


class BrokenImages:
    """The broken images that this process has met."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.met: dict[int, tuple[str, str]] = {}
        """Index -> (name, reason)."""

    def note(self, bad: list[tuple[int, str, str]]) -> None:
        """(index, name, reason) of those of a batch."""
        for index, name, reason in bad:
            self.met.setdefault(index, (name, reason))

    def of_all(self) -> dict[int, tuple[str, str]]:
        """What all processes met, by index. Called by all of them."""
        found: list[tuple[int, tuple[str, str]]] = list(self.met.items())
        if self.accelerator.num_processes > 1:
            found = gather_object(found)
        return dict(found)

    def check(self, run: RunDir, *, seen: int, epoch: int, over: bool, most: float) -> None:
        """Name them in bad_images.txt; raise InputError where there are too many.

        seen: images of the data that have been read so far; epoch: of one epoch; over: the run ends here; most:
        share of ``seen`` that may be broken.
        """
        bad = self.of_all()
        if not bad:
            return
        path = run.path / "bad_images.txt"
        if run.writes:
            lines = [f"{name}\t{reason}\n" for _, (name, reason) in sorted(bad.items())]
            write_text(path, "".join(lines))
        if seen < min(epoch, ENOUGH_SEEN) and not over:
            return  # one broken image among the first eight says nothing of the data
        if len(bad) > most * seen:
            names = ", ".join(name for name, _ in list(bad.values())[:3])
            raise InputError(
                f"{len(bad)} of {seen} images cannot be read (first: {names}), more than data.max_bad "
                f"{most}: fix or delete them, all are named in {path}"
            )
