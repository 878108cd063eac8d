"""Settings: what each one can be stands in its field's type, and one check holds for CLI, YAML and Python.

Words are ``Literal``; a range is part of a number's type (``Count``, ``Share``, ... below, or
``Annotated[int, Range(...)]`` for one that is needed once). Rules that join several fields are a method
``check`` of the dataclass, which begins with ``check_fields``.
"""

import math
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal

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

RESUME_SAFE = {"resume_safe": True}
"""Metadata of a field that does not affect the result: it may change when a run is continued."""


def resume_safe(default: Any) -> Any:
    """A field with this default that does not affect the result (``RESUME_SAFE``)."""
    return field(default=default, metadata=RESUME_SAFE)


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
    """Dotted names of the settings that do not affect the result; "section." means everything in it."""
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
        parts = value if isinstance(value, list | tuple) else [value]
        fine = fits(kind, value) or (value is None and one.default is None)
        if not fine or not all(map(has_meaning, parts)):
            from cmt_mae.core.refusals import refuse

            refuse(name, value, kind)


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


def has_meaning(value: Any) -> bool:
    """Whether a setting can mean this value: not nan, infinite, beyond 64 bits, or text with a zero byte."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    return not (isinstance(value, str) and "\0" in value)


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


def default_of(one: Field[Any]) -> Any:
    """The value of a field that is not given; MISSING where it must be."""
    return one.default_factory() if one.default_factory is not MISSING else one.default
