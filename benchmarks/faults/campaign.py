"""What every part of the fault campaign is given, and what it says."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SHARED = Path(__file__).resolve().parents[3] / "shared"


@dataclass(frozen=True)
class Options:
    """How large a campaign is, and where it works."""

    folder: Path
    """Scratch folder of this part; exists and is empty."""
    quick: bool = False
    """A few trials of each kind: does the campaign itself work? (used by the tests)"""
    seed: int = 0
    """Of everything random in it."""
    shared: Path = SHARED
    """Real data; parts that need it say so in their figures where it is missing."""


@dataclass
class Verdict:
    """What a part found."""

    promise: str
    """The sentence that was put to the test."""
    trials: int = 0
    """How often."""
    failures: list[str] = field(default_factory=list)
    """One line for each trial that broke the promise, enough to repeat it."""
    figures: dict[str, Any] = field(default_factory=dict)
    """Counts and sizes behind it: plain values."""
