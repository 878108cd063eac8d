"""What a setting cannot be is told by its name, from the command line, a recipe and Python alike."""

import re
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import pytest

from cmt_mae.core import cli
from cmt_mae.core.errors import InputError
from cmt_mae.core.parsing import parse
from cmt_mae.core.settings import (
    Count,
    PartOf,
    Share,
    check_fields,
    resume_safe_settings,
    walk,
)
from cmt_mae.evaluate.detection.protocols import CocoConfig
from cmt_mae.evaluate.knn import KnnConfig, evaluate_knn
from cmt_mae.pretraining.settings import PretrainConfig


@dataclass
class Inner:
    share: Share = 0.5
    pair: tuple[PartOf, PartOf] = (0.0, 0.5)


@dataclass
class Sample:
    """One field of every kind."""

    count: Count | None = None
    word: Literal["red", "green"] = "red"
    text: str = ""
    flag: bool = False
    many: list[Count] = field(default_factory=list)
    inner: Inner = field(default_factory=Inner)


WRONG = [
    ("count", 0, "--count is 0: give a whole number of 1 or more or null"),
    ("count", 1.5, "--count is 1.5: give a whole number of 1 or more or null"),
    ("word", "grean", "--word is 'grean': give one of red, green (did you mean green?)"),
    ("flag", 2, "--flag is 2: give true or false"),
    ("many", [1, 0], "--many is [1, 0]: give a list of whole numbers of 1 or more such as [10, 20]"),
    ("inner.share", 1.2, "--inner.share is 1.2: give a number from 0 to 1"),
    ("inner.pair", [0.9], "--inner.pair is [0.9]: give a list of 2 numbers from 0 and below 1"),
    ("inner.pair", [0.9, 1.0], "--inner.pair is [0.9, 1.0]: give a list of 2 numbers from 0 and"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "line"), WRONG)
def test_one_line_from_words_recipe_and_python(name: str, value: Any, line: str) -> None:
    head, _, last = name.rpartition(".")
    config = Sample()
    setattr(config.inner if head else config, last, value)
    with pytest.raises(InputError) as python:
        check_fields(config)
    assert str(python.value).startswith(line)
    wanted = line.split(": ", 1)[1]
    with pytest.raises(InputError) as words:
        parse("test", Sample, [f"--{name}={value}"], {})
    assert f"--{name} is" in str(words.value)
    assert wanted in str(words.value)
    nested = {head: {last: value}} if head else {last: value}
    with pytest.raises(InputError) as recipe:
        parse("test", Sample, [], nested)
    assert f"{name}" in str(recipe.value)
    assert wanted in str(recipe.value)


def test_types_of_python_values() -> None:
    for name, value, wanted in (
        ("text", Path("a"), "give text"),
        ("text", None, "give text"),
        ("inner", {"share": 1}, "give Inner"),
        ("count", float("inf"), "--count is inf: give a finite number"),
        ("many", 3, "give a list of whole numbers"),
        ("count", True, "give a whole number"),
        ("count", 2**63, "give a number below 2^63"),
        ("text", "a\0b", "remove it"),
    ):
        with pytest.raises(InputError, match=wanted.replace("^", r"\^")):
            check_fields(Sample(**{name: value}))
    check_fields(Sample(count=3, many=[1, 2], inner=Inner(share=1, pair=(0, 0.5))))


def test_every_default_is_in_its_range() -> None:
    for entry in (*cli.COMMANDS.values(), *cli.EVALUATIONS.values()):
        kind, _ = cli.load(entry)
        bare = [f for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
        check_fields(kind(**{f.name: ["x"] if f.name == "runs" else "x" for f in bare}))


def test_functions_say_it() -> None:
    config = PretrainConfig(out="x")
    config.data.path, config.optim.betas = "y", [0.9, 1.0]  # type: ignore[assignment]
    with pytest.raises(InputError, match=r"optim\.betas is \[0\.9, 1\.0\]"):
        config.check()
    with pytest.raises(InputError, match="batch_size is 0"):
        evaluate_knn(KnnConfig(backbone="x", data="y", batch_size=0))


def test_settings_that_may_change_on_resume() -> None:
    safe = set(resume_safe_settings(PretrainConfig))
    assert safe >= {
        "runtime.", "out", "data.path", "data.workers", "data.timeout_s", "data.max_bad", "teacher.cache_folder",
    }  # fmt: skip
    affect = ("epochs", "seed", "mask.ratio", "data.scale", "teacher.name", "precision", "init_from")
    assert not [name for name in affect if name.startswith(tuple(safe))]
    assert {"workers", "data", "progress"} <= set(resume_safe_settings(CocoConfig))
    assert not {"lr", "preset", "seed", "key", "precision"} & set(resume_safe_settings(CocoConfig))


def test_no_setting_takes_what_is_no_value_of_it() -> None:
    """Every setting of every command refuses an object of a foreign type by its name, and says what it takes."""
    for entry in (*cli.COMMANDS.values(), *cli.EVALUATIONS.values()):
        kind, _ = cli.load(entry)
        bare = [f for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
        for name, wanted, _ in walk(kind):
            config = kind(**{f.name: ["x"] if f.name == "runs" else "x" for f in bare})
            section: Any = config
            *sections, last = name.split(".")
            for one in sections:
                section = getattr(section, one)
            setattr(section, last, b"bytes")
            with pytest.raises(InputError, match=re.escape(f"--{name} is b'bytes': give ")) as error:
                check_fields(config)
            assert "give another value" not in str(error.value), (name, wanted)
