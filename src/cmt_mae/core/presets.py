"""Presets of the evaluations: numbers of a protocol that a command's settings may replace one by one."""

from dataclasses import fields
from typing import Any, TypeVar

T = TypeVar("T")
OF_PRESET: Any = None
"""Default of a field that a preset fills where it is not given (``filled``): None until then."""


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
