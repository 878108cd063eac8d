"""Why a setting cannot have a value, in one line: the value, what the setting can be, the word that was meant."""

import math
import types
import typing
from dataclasses import is_dataclass
from typing import Annotated, Any, Literal

from cmt_mae.core.errors import InputError
from cmt_mae.core.text import hint, one_line

NAMES = {float: "number", int: "whole number", str: "word"}
SAMPLES = {float: "[0.2, 1.0]", int: "[10, 20]", str: "[one, two]"}


def refuse(name: str, value: Any, kind: Any) -> None:
    """Raise InputError for a value that the setting ``name`` of this type cannot have."""
    for part in value if isinstance(value, list | tuple) else [value]:
        refuse_meaningless(name, part)
    raise InputError(refusal(f"--{name} is", value, kind))


def refuse_meaningless(name: str, value: Any) -> None:
    """Raise InputError for what no setting can mean: nan, infinity, beyond 64 bits, a zero byte."""
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"--{name} is {value}: give a finite number")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise InputError(f"--{name} is {one_line(value, 40)}: give a number below 2^63")
    if isinstance(value, str) and "\0" in value:
        raise InputError(f"--{name} holds a zero byte, '{one_line(value, 60)}': remove it")


def range_words(limits: Any) -> str:
    """Of a ``Range``: e.g. "from 0 to 1", "of 1 or more"."""
    if math.isinf(limits.high):
        return f"above {limits.low:g}" if limits.above else f"of {limits.low:g} or more"
    low = f"above {limits.low:g}" if limits.above else f"from {limits.low:g}"
    end = "and below" if limits.below else "up to" if limits.above else "to"
    return f"{low} {end} {limits.high:g}"


def refusal(where: str, value: Any, kind: Any) -> str:
    """One line: the setting, its value, what it can be. where: e.g. "--epochs is"."""
    shown = f"{value:g}" if isinstance(value, float) else one_line(value, 60)
    shown = f"'{shown}'" if isinstance(value, str) else shown
    near = hint(str(value), words_allowed(kind))
    return f"{where} {shown}: give {kind_in_words(kind)}{near}"


def kind_in_words(kind: Any) -> str:
    """What a setting of this type takes, in words. (The only dataclasses in a type's marks are Ranges.)"""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return " ".join(
            [kind_in_words(parts[0]), *(range_words(m) for m in parts[1:] if is_dataclass(m))]
        )
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}" if len(parts) > 1 else str(parts[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(
            kind_in_words(part) if part is not type(None) else "null" for part in parts
        )
    if origin in (list, tuple):
        base, *marks = typing.get_args(parts[0]) or (parts[0],)
        count = f"{len(parts)} " if origin is tuple and parts[-1] is not Ellipsis else ""
        limits = "".join(f" {range_words(mark)}" for mark in marks if is_dataclass(mark))
        return f"a list of {count}{NAMES.get(base, 'value')}s{limits} such as {SAMPLES.get(base, '[...]')}"
    if is_dataclass(kind):
        return f"{getattr(kind, '__name__', 'a section')}(...), its settings by name"
    return {str: "text", bool: "true or false"}.get(kind, f"a {NAMES.get(kind, 'value')}")


def words_allowed(kind: Any) -> list[str]:
    """The words that a setting may be, where they are listed; else nothing."""
    if typing.get_origin(kind) is Literal:
        return [str(choice) for choice in typing.get_args(kind)]
    return [word for part in typing.get_args(kind) for word in words_allowed(part)]
