"""Recipes: YAML files of settings whose head comment says what they reproduce."""

import os
from importlib import resources
from typing import Any

from cmt_mae.core.errors import InputError
from cmt_mae.core.parsing import hint, read_settings
from cmt_mae.core.text import one_line

MAX_BYTES = 1 << 20
"""A recipe of more bytes than this is none."""


def recipe_names() -> list[str]:
    """All recipes in the package, sorted."""
    files = resources.files("cmt_mae.recipes").iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def recipe_text(name: str) -> str:
    """The file of one recipe, or of a path to a YAML file. Raises InputError for unknown names."""
    if name.endswith((".yaml", ".yml")):
        try:
            if not os.path.isfile(name) and os.path.exists(name):
                raise OSError(None, "no regular file")
            with open(name, encoding="utf-8") as file:
                text = file.read(MAX_BYTES + 1)
        except (OSError, ValueError) as error:  # ValueError: not UTF-8, a zero byte in the name
            reason = getattr(error, "strerror", None) or one_line(error, 80)
            raise InputError(f"recipe {one_line(name)} cannot be read: {reason}") from error
        if len(text) > MAX_BYTES:
            raise InputError(f"recipe {one_line(name)} is over 1 MiB: this is no recipe")
        return text
    if name not in recipe_names():
        raise InputError(
            f"recipe '{one_line(name, 60)}' is unknown{hint(name, recipe_names())}: use "
            f"{', '.join(recipe_names())}, or a .yaml file"
        )
    return (resources.files("cmt_mae.recipes") / f"{name}.yaml").read_text(encoding="utf-8")


def head_comment(name: str) -> str:
    """What a recipe says of itself: its leading comment lines."""
    lines = []
    for line in recipe_text(name).splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return "\n".join(lines)


def load_recipes(names: str) -> dict[str, Any]:
    """Settings of one recipe or of several joined by commas (``mvp,micro64``): later ones have the last word."""
    merged: dict[str, Any] = {}
    for name in names.split(","):
        content = read_settings(recipe_text(name.strip()), f"recipe {one_line(name)}")
        merge(merged, content)
    return merged


def merge(into: dict[str, Any], more: dict[str, Any]) -> None:
    """Put ``more`` over ``into``, section by section."""
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value
