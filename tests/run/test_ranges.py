"""Numbers that a setting cannot be are told by the setting's name, on the command line and in Python alike."""

from dataclasses import MISSING, fields, is_dataclass
from typing import Any

import pytest

from cmt_mae.core import cli
from cmt_mae.core.errors import InputError
from cmt_mae.core.ranges import LENGTHS, RANGES, Range, check_ranges
from cmt_mae.evaluate.knn import KnnConfig, evaluate_knn
from cmt_mae.pretraining.settings import PretrainConfig


def all_settings() -> dict[str, Any]:
    """Class name -> an instance with the defaults, of every command and of nested settings."""
    found: dict[str, Any] = {}

    def add(settings: Any) -> None:
        found[type(settings).__name__] = settings
        for field in fields(settings):
            if is_dataclass(getattr(settings, field.name)):
                add(getattr(settings, field.name))

    for entry in (*cli.COMMANDS.values(), *cli.EVALUATIONS.values()):
        kind, _ = cli.load(entry)
        bare = [f for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
        add(kind(**{f.name: "x" for f in bare}))
    return found


def test_every_range_belongs_to_a_setting_and_holds_its_default() -> None:
    known = all_settings()
    for kind, ranges in RANGES.items():
        names = {f.name for f in fields(known[kind])}
        assert set(ranges) <= names, kind
        check_ranges(known[kind])
    assert all(name in RANGES[kind] for kind, name in LENGTHS)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--optim.betas=[0.9]", "--optim.betas has 1 values: give 2"),
        ("--optim.betas=[-3, 0.95]", "--optim.betas -3 is out of range: give a number from 0 and below 1"),
        ("--decoder.heads=0", "--decoder.heads 0 is out of range: give 1 or more"),
        ("--epochs=0", "--epochs 0 is out of range: give a number above 0"),
        ("--alpha=1.2", "--alpha 1.2 is out of range: give a number from 0 to 1"),
    ],
)  # fmt: skip
def test_one_line(words: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pretrain", "--data=x", "--out=y", words]) == 2
    assert line in capsys.readouterr().err


def test_in_python_too() -> None:
    config = PretrainConfig(out="x")
    config.data.path, config.optim.betas = "y", [0.9, 1.0]
    with pytest.raises(InputError, match=r"optim\.betas 1 is out of range"):
        config.check()
    with pytest.raises(InputError, match="batch_size 0 is out of range"):
        evaluate_knn(KnnConfig(backbone="x", data="y", batch_size=0))


def test_ends_of_a_range() -> None:
    assert Range(0, 1).holds(0)
    assert Range(0, 1).holds(1)
    assert not Range(0, 1, above=True).holds(0)
    assert not Range(0, 1, below=True).holds(1)
    assert not Range(1).holds(0.99)
