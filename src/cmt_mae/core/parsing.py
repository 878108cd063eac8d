"""Words of the command line -> settings: jsonargparse reads the values, core/settings.py judges them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, is_dataclass
from typing import Any, get_origin

from cmt_mae.core.errors import InputError
from cmt_mae.core.recipes import read_settings
from cmt_mae.core.settings import check_fields, walk
from cmt_mae.core.text import hint, one_line


def parse(program: str, settings: type, words: list[str], defaults: dict[str, Any]) -> Any:
    """Words -> an instance of the settings dataclass.

    defaults: nested values of recipes. Raises InputError with one line for unknown names, missing
    and bad values.
    """
    import jsonargparse

    kinds = {name: kind for name, kind, _ in walk(settings)}
    words = bare_flags(kinds, [expand(word, {}) for word in words])
    recipe = flatten(defaults)
    for name in recipe:
        if name not in kinds:
            near = hint(name, list(kinds))
            raise InputError(f"setting {one_line(name, 60)} of the recipe is unknown{near}")
    # recipes go through the parser, not set_defaults, which would not check the values' types
    given = [(name, as_word(value), True) for name, value in recipe.items()]
    given += [(name, value, False) for name, value in pairs(program, kinds, words)]
    required = [
        name
        for name, _, one in walk(settings)
        if one.default is MISSING and one.default_factory is MISSING
    ]
    if missing := [name for name in required if name not in [each[0] for each in given]]:
        raise InputError(
            f"{', '.join('--' + name for name in missing)} must be given; see {program} --help"
        )
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(settings)

    def read(given: Sequence[tuple[str, str, bool]]) -> Any:
        try:
            return parser.instantiate(
                parser.parse_args([f"--{name}={value}" for name, value, _ in given])
            )
        except (jsonargparse.ArgumentError, ValueError, TypeError, RecursionError) as error:
            return error

    config = read(given)
    if isinstance(config, Exception):  # which one was it?
        needed = [one for one in given if one[0] in required]
        for one in given:
            if isinstance(read([*needed, one]), Exception):
                raise InputError(f"{complaint(kinds, *one)}; see {program} --help") from config
        raise InputError(f"the settings cannot be read ({one_line(config, 200)})") from config
    config = settings(**vars(config))
    check_fields(config)
    return config


def pairs(program: str, kinds: Mapping[str, Any], words: list[str]) -> list[tuple[str, str]]:
    """``--a 1 --b=2`` -> [("a", "1"), ("b", "2")].

    Raises InputError for unknown names, missing values and stray words.
    """
    found: list[tuple[str, str]] = []
    rest = iter(words)
    for word in rest:
        name, equals, value = word[2:].partition("=")
        if not word.startswith("--"):
            near = hint(word.lstrip("-"), list(kinds))
            raise InputError(
                f"'{one_line(word, 60)}' belongs to no option{near}: write --NAME VALUE; see {program} --help"
            )
        if name.rstrip("+") not in kinds:
            near = hint(name, list(kinds))
            raise InputError(
                f"option --{one_line(name, 60)} is unknown{near}; see {program} --help"
            )
        if not equals:
            value = next(rest, "--")
            if value.startswith("--"):
                from cmt_mae.core.refusals import kind_in_words

                takes = kind_in_words(kinds[name.rstrip("+")])
                raise InputError(f"--{name} needs a value ({takes}); see {program} --help")
        if is_dataclass(kinds[name.rstrip("+")]) and value.startswith("{"):
            section = flatten(read_settings(value, f"--{name}"), f"{name}.")
            for inner in section:
                if inner not in kinds:
                    near = hint(inner, list(kinds))
                    raise InputError(f"setting {one_line(inner, 60)} is unknown{near}")
            found += [(inner, as_word(one)) for inner, one in section.items()]
        else:
            one = get_origin(kinds[name.rstrip("+")]) is list and value[:1] not in ("", "[")
            found.append(
                (name, f"[{value}]" if one else value)
            )  # a list of one: --student.img_size 128
    return found


def complaint(kinds: Mapping[str, Any], name: str, value: str, of_recipe: bool) -> str:
    """Why a setting cannot have this value: what, where, how to fix it."""
    from cmt_mae.core.refusals import refusal

    where = f"{name} of the recipe is" if of_recipe else f"--{name} is"
    kind = kinds[name.rstrip("+")]
    if is_dataclass(kind):
        return (
            f"{where} '{one_line(value, 60)}': give its settings one by one, as --{name}.NAME VALUE"
        )
    return refusal(where, value, kind)


def bare_flags(kinds: Mapping[str, Any], words: list[str]) -> list[str]:
    """``--paper`` alone means ``--paper=true``, for every setting that is yes or no."""
    flags = {f"--{name}" for name, kind in kinds.items() if kind is bool}
    following = [*words[1:], "--"][: len(words)]
    return [
        f"{word}=true" if word in flags and after.startswith("--") else word
        for word, after in zip(words, following, strict=True)
    ]


def as_word(value: Any) -> str:
    """A setting as a word of the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def expand(word: str, short: dict[str, str]) -> str:
    """--batch-size -> --batch_size, and short names to full ones; other words stay."""
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    name = name.replace("-", "_")
    return f"--{short.get(name, name)}{equals}{value}"


def take(words: list[str], option: str) -> tuple[str | None, list[str]]:
    """The value of an option (``--x v`` or ``--x=v``) and the words without it."""
    for place, word in enumerate(words):
        if word == option:
            if place + 1 == len(words):
                raise InputError(f"{option} needs a value")
            return words[place + 1], words[:place] + words[place + 2 :]
        if word.startswith(option + "="):
            return word.split("=", 1)[1], words[:place] + words[place + 1 :]
    return None, words


def take_flag(words: list[str], flag: str) -> tuple[bool, list[str]]:
    """Whether the flag is among the words, and the words without it."""
    return flag in words, [word for word in words if word != flag]
