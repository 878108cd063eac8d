"""Recipes: YAML files of settings whose head comment says what they reproduce."""

from importlib import resources
from typing import Any

import yaml

from cmt_mae.errors import InputError


def recipe_names() -> list[str]:
    """All recipes in the package, sorted."""
    files = resources.files("cmt_mae.recipes").iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def recipe_text(name: str) -> str:
    """The file of one recipe, or of a path to a YAML file. Raises InputError for unknown names."""
    if name.endswith((".yaml", ".yml")):
        try:
            with open(name, encoding="utf-8") as file:
                return file.read()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"recipe {name} cannot be read: {error}") from error
    if name not in recipe_names():
        raise InputError(
            f"recipe '{name}' is unknown: use {', '.join(recipe_names())}, or a .yaml file"
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
        try:
            content = yaml.safe_load(recipe_text(name.strip()))
        except yaml.YAMLError as error:
            raise InputError(
                f"recipe {name} is no valid YAML: {' '.join(str(error).split())}"
            ) from error
        if not isinstance(content, dict):
            raise InputError(f"recipe {name} holds no settings: write lines such as 'epochs: 100'")
        merge(merged, content)
    return merged


def merge(into: dict[str, Any], more: dict[str, Any]) -> None:
    """Put ``more`` over ``into``, section by section."""
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value
