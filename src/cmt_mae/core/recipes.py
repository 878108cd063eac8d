"""Recipes: YAML files of settings whose head comment says what they reproduce. The package's are in recipes/."""

import os
from importlib import resources
from typing import Any

import yaml

from cmt_mae.core.errors import InputError
from cmt_mae.core.text import hint, one_line

MAX_BYTES = 1 << 20
"""A recipe of more bytes than this is none."""
MAX_DEPTH = 20
FOLDER = resources.files("cmt_mae") / "recipes"


def recipe_names() -> list[str]:
    """All recipes in the package, sorted."""
    files = FOLDER.iterdir()
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
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


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


def read_settings(text: str, where: str) -> dict[str, Any]:
    """YAML of settings: sections, lists, texts, numbers, yes and no; nothing is constructed beyond them.

    Raises InputError, beginning with ``where``, for tags (!!python/...), anchors (a few lines of them
    can stand for gigabytes), dates, keys that are no text, and what is no YAML.
    """
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:  # PyYAML's time grows with the square of it
                raise InputError(f"{where} has sections over {MAX_DEPTH} deep: no settings are")
            if isinstance(event, yaml.AliasEvent):
                raise InputError(f"{where} uses the anchor '*{event.anchor}': write the value out")
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: 2020-99-99
        raise InputError(f"{where} is no valid YAML of settings: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{where} holds no settings: write lines such as 'epochs: 100'")
    refuse_foreign(content, where)
    return content


def refuse_foreign(value: Any, where: str) -> None:
    """Raise InputError for anything that is no setting, e.g. a date or a key that is a number."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise InputError(f"{where}: '{one_line(key, 60)}' is no name of a setting")
            refuse_foreign(inner, where)
    elif isinstance(value, list):
        for inner in value:
            refuse_foreign(inner, where)
    elif not isinstance(value, str | int | float | None):
        raise InputError(
            f"{where}: '{one_line(value, 60)}' is a {type(value).__name__}: put it in quotes"
        )
