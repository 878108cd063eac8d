"""Words of the command line without an option's name, or several behind one: RUN ..., --images A B."""

import json
from collections.abc import Sequence

from cmt_mae.core.errors import InputError
from cmt_mae.core.text import one_line

FLAGS = ("--paper", "--open")
"""Yes-or-no settings of commands that take words without an option."""


def as_options(command: str, words: list[str]) -> list[str]:
    """The words of a command with every value behind its option's name."""
    if command in ("compare", "report", "app"):
        words = with_positional(words, "runs")
    if command == "explain":
        words = with_lists(words, ("images", "results"), ("what", "formats", "checkpoints", "size"))
    if command == "app":
        words = with_lists(words, ("backbones", "teachers"), ())
    if command in ("watch", "doctor"):
        words = with_positional(words, "run", many=False)
    if command == "ablate":
        words = with_positional(words, "experiment", many=False)
    return words


def with_positional(words: list[str], name: str, many: bool = True) -> list[str]:
    """``a b --x 1 --flag`` -> ``--name=["a", "b"] --x 1 --flag``; a bare flag is one word.

    many: a list of words; else one, ``--name=a``. Values of options follow them with a space or an equals
    sign; those in FLAGS take none. Raises InputError for two words where one belongs.
    """
    kept: list[str] = []
    found: list[str] = []
    for word in words:
        waiting = kept and kept[-1].startswith("--") and "=" not in kept[-1]
        if word.startswith("-"):
            kept.append(word)
        elif waiting and kept[-1] not in FLAGS:
            kept[-1] = f"{kept[-1]}={word}"
        else:
            found.append(word)
    if not many and len(found) > 1:
        raise InputError(f"'{one_line(found[1], 60)}' is one word too many: one {name} only")
    if not found:
        return kept
    return [f"--{name}={json.dumps(found) if many else found[0]}", *kept]


def with_lists(words: list[str], whole: Sequence[str], divided: Sequence[str]) -> list[str]:
    """``--images a b`` -> ``--images=["a", "b"]`` for settings that are lists; a list in brackets stays.

    divided: names whose values also end at a comma, ``--what heads,masks``. Numbers become numbers.
    """
    kept: list[str] = []
    taking = ""
    values: dict[str, list[str]] = {}
    for word in words:
        if not word.startswith("--"):
            (values[taking] if taking else kept).append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        taking = name if name in (*whole, *divided) and not value.startswith("[") else ""
        if taking:
            values[taking] = [value] if equals else []
            taking = "" if equals else taking
        else:
            kept.append(word)
    for name, found in values.items():
        if len(found) == 1 and found[0].startswith("["):
            kept.append(f"--{name}={found[0]}")
            continue
        parts = found if name in whole else [p for one in found for p in one.split(",") if p]
        plain = [int(p) if p.lstrip("-").isdecimal() and name in divided else p for p in parts]
        kept.append(f"--{name}={json.dumps(plain)}")
    return kept
