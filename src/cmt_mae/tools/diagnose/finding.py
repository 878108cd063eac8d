"""What the doctor finds: one thing that is wrong, how it shows, and how to fix it."""

from dataclasses import dataclass
from typing import Literal

Part = Literal["machine", "data", "teacher", "settings", "estimate", "run"]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    part: Part
    """Where it was found."""
    level: Literal["problem", "warning"]
    """problem: the run fails or learns little; warning: it is slower or worse than it need be."""
    what: str
    """A few words."""
    why: str
    """The numbers it follows from."""
    fix: str
    """What to do."""


def problem(part: Part, what: str, why: str, fix: str) -> Finding:
    """The run fails or learns little with it."""
    return Finding(part, "problem", what, why, fix)


def warning(part: Part, what: str, why: str, fix: str) -> Finding:
    """The run is slower or worse with it than it need be."""
    return Finding(part, "warning", what, why, fix)
