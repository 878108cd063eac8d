"""Words of the command line -> a settings dataclass; what does not fit is told in one line of our own."""

import difflib
import json
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import yaml

from cmt_mae.core.errors import InputError
from cmt_mae.core.ranges import check_ranges
from cmt_mae.core.text import one_line

WORDS_OF = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}
MAX_DEPTH = 20
PLURALS = {float: "numbers", int: "whole numbers", str: "words"}
SAMPLES = {float: "[0.2, 1.0]", int: "[10, 20]", str: "[one, two]"}


def parse(program: str, settings: type, words: list[str], defaults: dict[str, Any]) -> Any:
    """Words -> an instance of the settings dataclass; None after --help.

    defaults: nested values of recipes. Raises InputError with one line for unknown names, missing
    and bad values; numbers that are not finite or beyond 64 bits are bad for every setting.
    """
    import jsonargparse

    parser = make_parser(program, settings)
    kinds = types_of(parser)
    words = [expand(word, {}) for word in words]
    if any(word in ("--help", "-h") or word.startswith("--help=") for word in words):
        parser.print_help()
        return None
    for word in words:
        name = word[2:].split("=", 1)[0]
        if word.startswith("--") and name.rstrip("+") not in kinds:
            near = hint(name, list(kinds))
            raise InputError(
                f"option --{one_line(name, 60)} is unknown{near}; see {program} --help"
            )
    words = bare_flags(kinds, words)
    recipe = flatten(defaults)
    for name in recipe:
        if name not in kinds or name == "help":
            near = hint(name, list(kinds))
            raise InputError(f"setting {one_line(name, 60)} of the recipe is unknown{near}")
    try:
        # recipes go through the parser, not set_defaults, which would not check the values' types
        all_words = [f"--{name}={as_word(value)}" for name, value in recipe.items()] + words
        config = settings(**vars(parser.instantiate(parser.parse_args(all_words))))
    except (jsonargparse.ArgumentError, ValueError, TypeError, RecursionError) as error:
        text = complaint(str(error), kinds, words, recipe)
        raise InputError(f"{text}; see {program} --help") from error
    check_values(config)
    check_ranges(config)
    return config


def make_parser(program: str, settings: type) -> Any:
    """jsonargparse's parser of a settings dataclass."""
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(prog=program, exit_on_error=False)
    parser.add_class_arguments(settings)
    return parser


def types_of(parser: Any) -> dict[str, Any]:
    """Dotted name -> type of every setting, None for a section (a dataclass of its own) and for help."""
    return {action.dest: getattr(action, "_typehint", None) for action in parser._actions}


def complaint(text: str, kinds: Mapping[str, Any], words: list[str], recipe: dict[str, Any]) -> str:
    """jsonargparse's message in our words: what, where, the mend.

    kinds: type of each setting. words, recipe: where its value may come from.
    """
    if match := re.search(r"arguments are required: (.*)", text, re.DOTALL):
        missing = ", ".join(f"--{name.strip()}" for name in match[1].split(","))
        return f"{missing} must be given"
    if match := re.search(r"argument (?:-\w/)?--(\S+?):? expected", text):
        return f"--{match[1]} needs a value ({describe(kinds.get(match[1]))})"
    if match := re.search(r"nrecognized arguments: (\S*)", text):
        near = hint(match[1].lstrip("-"), list(kinds))
        return f"'{one_line(match[1], 60)}' belongs to no option{near}: write --NAME VALUE"
    if match := re.search(r"Group '([^']*)' does not accept option '([^']*)'", text):
        name = f"{match[1]}.{match[2]}"
        return f"setting {one_line(name, 60)} is unknown{hint(name, list(kinds))}"
    keys = [key for key in re.findall(r'[Kk]ey "([^"]*)"', text) if key in kinds]
    if not keys:
        return f"the settings cannot be read ({one_line(text, 200)})"
    name = keys[-1]
    value = value_of(name, words)
    where = f"--{name} is"
    if value is None and name in recipe:
        where, value = f"{name} of the recipe is", as_word(recipe[name])
    if value is None:  # part of a section that was given as a whole
        given = re.findall(r"(?:Got|Given) value: ?(.*)", text)
        value = given[-1] if given else ""
    if is_dataclass(kinds[name]) or kinds[name] is None:
        return (
            f"{where} '{one_line(value, 60)}': give its settings one by one, as --{name}.NAME VALUE"
        )
    near = hint(value, choices_of(kinds[name]))
    return f"{where} '{one_line(value, 60)}': give {describe(kinds[name])}{near}"


def value_of(name: str, words: list[str]) -> str | None:
    """The last value that the words give to a setting."""
    found = None
    for word, after in zip(words, [*words[1:], ""], strict=True):
        option, equals, value = word.partition("=")
        if option.rstrip("+") == f"--{name}":
            found = value if equals else after
    return found


def choices_of(kind: Any) -> list[str]:
    """The words that a setting may take, where they are listed; else nothing."""
    if typing.get_origin(kind) is typing.Literal:
        return [str(choice) for choice in typing.get_args(kind)]
    return [word for part in typing.get_args(kind) for word in choices_of(part)]


def describe(kind: Any) -> str:
    """What a setting of this type takes, in words."""
    if kind in WORDS_OF:
        return WORDS_OF[kind]
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(part) if part is not type(None) else "null" for part in parts)
    if origin in (list, tuple) and parts and parts[0] in PLURALS:
        fixed = origin is tuple and parts[-1] is not Ellipsis
        count = f"{len(parts)} " if fixed else ""
        return f"a list of {count}{PLURALS[parts[0]]} such as {SAMPLES[parts[0]]}"
    return "another value"


def check_values(config: Any, prefix: str = "") -> None:
    """Raise InputError for what no setting can mean: nan, infinity, beyond 64 bits, a zero byte."""
    for field in fields(config):
        name, value = f"{prefix}{field.name}", getattr(config, field.name)
        if is_dataclass(value):
            check_values(value, f"{name}.")
        for one in value if isinstance(value, list | tuple) else [value]:
            if isinstance(one, float) and not math.isfinite(one):
                raise InputError(f"--{name} is {one}: give a finite number")
            if isinstance(one, int) and not -(2**63) <= one < 2**63:
                raise InputError(f"--{name} is {one_line(one, 40)}: give a number below 2^63")
            if isinstance(one, str) and "\0" in one:
                raise InputError(f"--{name} holds a zero byte, '{one_line(one, 60)}': remove it")


def bare_flags(kinds: Mapping[str, Any], words: list[str]) -> list[str]:
    """``--paper`` alone means ``--paper=true``, for every setting that is yes or no."""
    flags = {f"--{name}" for name, kind in kinds.items() if kind is bool}
    following = [*words[1:], "--"][: len(words)]
    return [
        f"{word}=true" if word in flags and after.startswith("--") else word
        for word, after in zip(words, following, strict=True)
    ]


FLAGS = ("--paper", "--open")
"""Yes-or-no settings of commands that take words without an option."""


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


def hint(word: str, known: Sequence[str]) -> str:
    """`` (did you mean x?)`` or nothing."""
    near = difflib.get_close_matches(word[:200], known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""
