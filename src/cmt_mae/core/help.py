"""What ``--help`` and ``--help-all`` print: names, meanings and defaults come from the settings dataclasses."""

import inspect
import shutil
import textwrap
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, is_dataclass
from typing import Annotated, Any, Literal

from cmt_mae.core.parsing import as_word
from cmt_mae.core.settings import default_of, docs_of, walk

LEFT = 26  # columns of the options' names
VALUES = {
    "recipe": "NAME[,NAME]", "data": "PATH", "data_root": "PATH", "out": "PATH", "teacher": "NAME",
    "backbone": "NAME", "probe_data": "PATH", "init_from": "NAME", "images": "PATH", "run": "RUN",
}  # fmt: skip
"""What stands for the value of an option; of others its type does."""


def show_help(
    usage: str,
    settings: type,
    *,
    short: Mapping[str, str],
    first: Sequence[str] = (),
    extra: Mapping[str, str] | None = None,
    default: str = "default",
) -> str:
    """The page of a command.

    usage: the line after "usage: ". short: short name -> dotted name. first: the options of the first page, by
    their short names; none: all. extra: options that are no settings -> meaning. default: how a default is
    called.
    """
    names = {name: alias for alias, name in short.items()}
    rows = {
        " ".join(["--" + name, *([VALUES[name]] if name in VALUES else [])]): text
        for name, text in (extra or {}).items()
        if not first or name in first
    }
    for name, kind, one in walk(settings):
        shown = names.get(name, name)
        if is_dataclass(kind) or (first and shown not in first):
            continue
        holder, _, last = name.rpartition(".")
        owner = kind_of_section(settings, holder)
        value = default_of(one)
        told = "" if value in (MISSING, None, "", [], ()) else f" ({default}: {as_word(value)})"
        rows[f"--{shown} {value_word(shown, kind)}"] = docs_of(owner).get(last, "") + told
    order = {f"--{name}": place for place, name in enumerate(first or ["recipe"])}
    others = len(order)
    order["--json"] = others + 1
    rows = dict(sorted(rows.items(), key=lambda row: order.get(row[0].split()[0], others)))
    width = min(120, shutil.get_terminal_size().columns)
    lines = [f"usage: {usage}", "", *textwrap.wrap(summary(settings), width), ""]
    for name, text in rows.items():
        block = textwrap.wrap(text, width - LEFT - 2) or [""]
        if len(name) >= LEFT:
            lines.append(f"  {name}")
        else:
            block[0] = f"  {name:{LEFT}}{block[0]}"
            lines.append(block.pop(0))
        lines += [" " * (LEFT + 2) + line for line in block]
    if first:
        lines += ["", "More settings: --help-all"]
    return "\n".join(lines)


def list_settings(settings: Any) -> str:
    """Name, value and meaning of every setting, one a paragraph, for ``help()`` in Python."""
    lines = []
    for name, kind, one in walk(settings):
        if not is_dataclass(kind):
            holder, _, last = name.rpartition(".")
            text = docs_of(kind_of_section(settings, holder)).get(last, "")
            value = default_of(one)
            told = "" if value is MISSING else f" = {value!r}"
            lines += [
                f"    {name}{told}",
                *textwrap.wrap(text, 92, initial_indent=" " * 8, subsequent_indent=" " * 8),
            ]
    return "\n".join(lines)


def summary(settings: type) -> str:
    """The docstring of a settings dataclass on one line."""
    return " ".join((inspect.getdoc(settings) or "").split())


def kind_of_section(settings: type, holder: str) -> type:
    """The dataclass below a dotted name."""
    kinds = {name: kind for name, kind, _ in walk(settings)}
    return typing.cast(type, kinds[holder]) if holder else settings


def value_word(name: str, kind: Any) -> str:
    """E.g. N for a whole number, PATH, A|B for two words."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return value_word(name, parts[0])
    if origin is Literal:
        words = "|".join(map(str, parts))
        return words if len(words) <= LEFT else "WORD"
    if origin in (list, tuple):
        word = value_word(name, parts[0])
        return (
            f"[{word},...]"
            if origin is list or parts[-1] is Ellipsis
            else f"[{','.join([word] * len(parts))}]"
        )
    if parts:
        return "|".join(value_word(name, part) for part in parts if part is not type(None))
    return {int: "N", float: "X", bool: "true|false"}.get(kind, VALUES.get(name, "TEXT"))
