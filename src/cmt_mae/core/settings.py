"""Settings: what each one can be stands in its field's type, and one check holds for CLI, YAML and Python.

Words are ``Literal``; a range is part of a number's type (``Count``, ``Share``, ... below, or
``Annotated[int, Range(...)]`` for one that is needed once). Rules that join several fields are a method
``check`` of the dataclass, which begins with ``check_fields``.
"""

import ast
import inspect
import math
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import cache
from textwrap import dedent
from typing import Annotated, Any, Literal, TypeVar

from cmt_mae.core.errors import InputError
from cmt_mae.core.text import hint, one_line


@dataclass(frozen=True)
class Range:
    """From low to high, both in it unless ``above`` or ``below`` leave an end out."""

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False

    def holds(self, value: float) -> bool:
        """Whether the value lies in it."""
        over = value > self.low if self.above else value >= self.low
        return over and (value < self.high if self.below else value <= self.high)

    def words(self) -> str:
        """E.g. "from 0 to 1", "of 1 or more"."""
        if math.isinf(self.high):
            return f"above {self.low:g}" if self.above else f"of {self.low:g} or more"
        low = f"above {self.low:g}" if self.above else f"from {self.low:g}"
        end = "and below" if self.below else "up to" if self.above else "to"
        return f"{low} {end} {self.high:g}"


Count = Annotated[int, Range(1)]
CountOrNone = Annotated[int, Range(0)]
"""A number of things that may be 0, which then means none or a default."""
Amount = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, above=True)]
Share = Annotated[float, Range(0, 1)]
PartOf = Annotated[float, Range(0, 1, below=True)]
"""0 is in it, 1 is not: a share that may not be everything."""
Factor = Annotated[float, Range(0, 1, above=True)]
"""1 is in it, 0 is not."""
Port = Annotated[int, Range(0, 65535)]
Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "bf16", "fp32"]
Tracker = Literal["none", "wandb"]
Parallel = Literal["ddp", "fsdp"]
TIMEOUT_S = 300.0
"""Default time limit of a loader process's answer: below the 10 minutes after which NCCL gives a process up."""

NAMES = {float: "number", int: "whole number", str: "word"}
SAMPLES = {float: "[0.2, 1.0]", int: "[10, 20]", str: "[one, two]"}


T = TypeVar("T")
OF_PRESET: Any = None
"""Default of a field that a preset fills where it is not given (``filled``): None until then."""
RESUME_SAFE = {"resume_safe": True}
"""Metadata of a field that does not affect the result: it may change when a run is continued."""


def resume_safe(default: Any) -> Any:
    """A field with this default that does not affect the result (``RESUME_SAFE``)."""
    return field(default=default, metadata=RESUME_SAFE)


def filled(kind: type[T], preset: dict[str, Any], config: Any) -> T:
    """The numbers of a protocol: those of ``config`` that are given, else the preset's.

    kind: the dataclass of these numbers, of which the settings ``config`` are a child. Lists become tuples.
    """
    return kind(**preset | given_fields(config, kind))


def given_fields(config: Any, kind: Any) -> dict[str, Any]:
    """Of the fields of the dataclass ``kind``, those that the settings give: the others are the preset's."""
    values = {one.name: getattr(config, one.name) for one in fields(kind)}
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in values.items()
        if value is not None
    }


def walk(settings: type, prefix: str = "") -> Iterator[tuple[str, Any, Field[Any]]]:
    """Dotted name, type and field of every setting; a section comes before the settings in it."""
    kinds = kinds_of(settings)
    for one in fields(settings):
        kind = kinds[one.name]
        yield prefix + one.name, kind, one
        if is_dataclass(kind):
            yield from walk(typing.cast(type, kind), f"{prefix}{one.name}.")


@cache
def kinds_of(settings: Any) -> dict[str, Any]:
    """Field -> its type, with its range."""
    return typing.get_type_hints(settings, include_extras=True)


@cache
def resume_safe_settings(settings: Any) -> tuple[str, ...]:
    """Dotted names of the settings that do not affect the result; "section." stands for all in it."""
    return tuple(
        f"{name}." if is_dataclass(kind) else name
        for name, kind, one in walk(settings)
        if one.metadata.get("resume_safe")
    )


def check_fields(config: Any, prefix: str = "") -> None:
    """Raise InputError for the first value that its setting cannot be, in nested settings too.

    Beyond its type, no setting can be nan, infinite, an integer beyond 64 bits, or text with a zero byte. None
    stands for "left out" where it is the default.
    """
    kinds = kinds_of(config.__class__)
    for one in fields(config):
        name, kind, value = f"{prefix}{one.name}", kinds[one.name], getattr(config, one.name)
        if is_dataclass(kind) and isinstance(value, typing.cast(type, kind)):
            check_fields(value, f"{name}.")
            continue
        for part in value if isinstance(value, list | tuple) else [value]:
            refuse_meaningless(name, part)
        if not fits(kind, value) and not (value is None and one.default is None):
            raise InputError(refusal(f"--{name} is", value, kind))


def build(settings: Any, nested: dict[str, Any], prefix: str = "") -> Any:
    """A settings dataclass from nested values by name.

    Raises InputError for unknown names and for values that a setting cannot have.
    """
    kinds = kinds_of(settings)
    values: dict[str, Any] = {}
    for name, value in nested.items():
        if name not in kinds:
            near = hint(name, list(kinds))
            raise InputError(f"setting {prefix}{one_line(name, 60)} is unknown{near}")
        whole = is_dataclass(kinds[name]) and isinstance(value, dict)
        values[name] = build(kinds[name], value, f"{prefix}{name}.") if whole else value
    made = settings(**values)
    check_fields(made, prefix)
    return made


def refuse_meaningless(name: str, value: Any) -> None:
    """Raise InputError for what no setting can mean: nan, infinity, beyond 64 bits, a zero byte."""
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"--{name} is {value}: give a finite number")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise InputError(f"--{name} is {one_line(value, 40)}: give a number below 2^63")
    if isinstance(value, str) and "\0" in value:
        raise InputError(f"--{name} holds a zero byte, '{one_line(value, 60)}': remove it")


def fits(kind: Any, value: Any) -> bool:
    """Whether a setting of this type can have the value. Whole numbers are numbers; lists and tuples are one."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        ranges = [mark for mark in parts[1:] if isinstance(mark, Range)]
        return fits(parts[0], value) and all(one.holds(value) for one in ranges)
    if origin is Literal:
        return any(value == part and type(value) is type(part) for part in parts)
    if origin in (typing.Union, types.UnionType):
        return any(fits(part, value) for part in parts)
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            return False
        if origin is tuple and parts[-1] is not Ellipsis:
            return len(value) == len(parts) and all(map(fits, parts, value))
        return all(fits(parts[0], one) for one in value)
    if kind in (int, float):
        return isinstance(value, int if kind is int else int | float) and not isinstance(
            value, bool
        )
    return kind is Any or isinstance(value, origin or kind)


def refusal(where: str, value: Any, kind: Any) -> str:
    """One line: the setting, its value, what it can be. where: e.g. "--epochs is"."""
    shown = f"{value:g}" if isinstance(value, float) else one_line(value, 60)
    shown = f"'{shown}'" if isinstance(value, str) else shown
    near = hint(str(value), words_of(kind))
    return f"{where} {shown}: give {describe(kind)}{near}"


def describe(kind: Any) -> str:
    """What a setting of this type takes, in words."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return " ".join(
            [describe(parts[0]), *(m.words() for m in parts[1:] if isinstance(m, Range))]
        )
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}" if len(parts) > 1 else str(parts[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(part) if part is not type(None) else "null" for part in parts)
    if origin in (list, tuple):
        base, *marks = typing.get_args(parts[0]) or (parts[0],)
        count = f"{len(parts)} " if origin is tuple and parts[-1] is not Ellipsis else ""
        limits = "".join(f" {mark.words()}" for mark in marks if isinstance(mark, Range))
        return f"a list of {count}{NAMES.get(base, 'value')}s{limits} such as {SAMPLES.get(base, '[...]')}"
    if is_dataclass(kind):
        return f"{getattr(kind, '__name__', 'a section')}(...), its settings by name"
    return {str: "text", bool: "true or false"}.get(kind, f"a {NAMES.get(kind, 'value')}")


def words_of(kind: Any) -> list[str]:
    """The words that a setting may be, where they are listed; else nothing."""
    if typing.get_origin(kind) is Literal:
        return [str(choice) for choice in typing.get_args(kind)]
    return [word for part in typing.get_args(kind) for word in words_of(part)]


def default_of(one: Field[Any]) -> Any:
    """The value of a field that is not given; MISSING where it must be."""
    return one.default_factory() if one.default_factory is not MISSING else one.default


@cache
def docs_of(settings: Any) -> dict[str, str]:
    """Field -> the docstring below it, on one line; of inherited fields too."""
    found: dict[str, str] = {}
    for kind in reversed(settings.__mro__):
        if not is_dataclass(kind):
            continue
        (body,) = ast.parse(dedent(inspect.getsource(typing.cast(type, kind)))).body
        assert isinstance(body, ast.ClassDef)
        for here, after in zip(body.body, body.body[1:], strict=False):
            if isinstance(here, ast.AnnAssign) and isinstance(after, ast.Expr):
                text = ast.literal_eval(after.value)
                found[ast.unparse(here.target)] = " ".join(text.split())
    return found
