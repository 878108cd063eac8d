"""Text from outside, such as names of files, made fit to be printed."""

import difflib
from collections.abc import Sequence


def printable(text: str) -> str:
    """One line without control characters, which could move a terminal's cursor or change its title."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(text: object, limit: int = 300) -> str:
    """All white space as single blanks, nothing that is not printable, cut after ``limit`` characters."""
    line = printable(" ".join(str(text).split()))
    return line if len(line) <= limit else line[:limit] + "..."


def duration(seconds: float) -> str:
    """``42 s``, ``12 min``, ``3.4 h``, ``2.1 days``."""
    for size, unit, digits in ((86400, "days", 1), (3600, "h", 1), (60, "min", 0)):
        if seconds >= 2 * size or (unit == "h" and seconds >= size):
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds:.0f} s"


def hint(word: str, known: Sequence[str]) -> str:
    """`` (did you mean x?)`` for the known word that is nearest, or nothing where none is near."""
    near = difflib.get_close_matches(word[:200], known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def pixels_of(size: Sequence[int]) -> str:
    """``48 px``, ``48 x 64 px`` of height and width."""
    sides = list(dict.fromkeys(size)) if len(size) == 2 else list(size)
    return f"{' x '.join(map(str, sides))} px"
