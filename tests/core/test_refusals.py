"""What the command line says when settings do not fit: what, where, how to fix it; who says it under torchrun."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from cmt_mae.core.cli import main
from cmt_mae.core.errors import InputError
from cmt_mae.core.parsing import parse
from cmt_mae.core.recipes import load_recipes, read_settings
from cmt_mae.core.result_table import show_result
from cmt_mae.evaluate.result import Result


@dataclass
class Part:
    """A section."""

    share: float = 0.5
    """Of it."""
    sizes: list[int] = field(default_factory=list)
    """Some."""


@dataclass
class Whole:
    """Settings of a test."""

    place: str
    """Needed."""
    part: Part = field(default_factory=Part)
    count: int = 1
    """How many."""
    pair: tuple[int, int] = (1, 2)
    """Two."""
    kind: Literal["apple", "pear"] | None = None
    """Which."""
    loud: bool = False
    """Or not."""


def said(*words: str, **defaults: Any) -> str:
    with pytest.raises(InputError) as caught:
        parse("prog", Whole, ["--place=x", *words], defaults)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--count", "many"], "--count is 'many': give a whole number"),
        (["--part.share=x"], "--part.share is 'x': give a number"),
        (["--part", "{share: x}"], "--part.share is 'x': give a number"),
        (["--part", "{shore: 1}"], "setting part.shore is unknown (did you mean part.share?)"),
        (["--part", "7"], "--part is '7': give its settings one by one, as --part.NAME VALUE"),
        (["--part.sizes=[a]"], "--part.sizes is '[a]': give a list of whole numbers such as [10, 20]"),
        (["--pair=[1]"], "--pair is '[1]': give a list of 2 whole numbers such as [10, 20]"),
        (["--kind=aple"], "--kind is 'aple': give one of apple, pear or null (did you mean apple?)"),
        (["--loud=maybe"], "--loud is 'maybe': give true or false"),
        (["--count"], "--count needs a value (a whole number)"),
        (["--cuont=3"], "option --cuont is unknown (did you mean count?)"),
        (["extra"], "'extra' belongs to no option: write --NAME VALUE"),
        (["--part.share=.nan"], "--part.share is nan: give a finite number"),
        (["--part.share=1e999"], "--part.share is inf: give a finite number"),
        (["--count=9999999999999999999"], "--count is 9999999999999999999: give a number below 2^63"),
        (["--count", "1", "--count", "\x1b[2J"], r"--count is '\x1b[2J': give a whole number"),
    ],
)  # fmt: skip
def test_one_line_says_what_where_and_how_to_fix_it(words: list[str], text: str) -> None:
    assert said(*words).removesuffix("; see prog --help") == text


def test_what_is_missing_and_what_a_recipe_holds() -> None:
    with pytest.raises(InputError, match=r"^--place must be given; see prog --help$"):
        parse("prog", Whole, [], {})
    assert said(count="many").startswith("count of the recipe is 'many': give a whole number")
    assert (
        said(part={"shore": 1})
        == "setting part.shore of the recipe is unknown (did you mean part.share?)"
    )
    assert parse("prog", Whole, ["--count=2"], {"place": "x", "count": "3"}).count == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: !!python/object/apply:os.system [x]", "no valid YAML"),
        ("a: !!python/name:os.system", "no valid YAML"),
        ("a: &x [1]\nb: *x", "anchor '*x'"),
        ("a: &x [*x]", "anchor '*x'"),
        ("a: 2020-01-01", "is a date: put it in quotes"),
        ("a: 2020-99-99", "no valid YAML"),
        ("1: 2", "'1' is no name"),
        ("- 1", "holds no settings"),
        ("", "holds no settings"),
        ("[" * 1_000_000, "over 20 deep"),
        ("{b: " * 800, "over 20 deep"),
        ("a: \x1b", "no valid YAML"),
        ("a: !!set {b}", "is a set"),
        ("a: !!binary aGk=", "is a bytes"),
    ],
)
def test_yaml_of_settings_constructs_nothing(text: str, says: str) -> None:
    with pytest.raises(InputError) as caught:
        read_settings(text, "here")
    assert says in str(caught.value)
    assert str(caught.value).startswith("here")
    assert "\n" not in str(caught.value)


def test_recipes_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    (tmp_path / "large.yaml").write_text("#" * (1 << 21))
    for name in ("pipe", "zero", "large", "none", "x\0"):
        with pytest.raises(InputError, match=r"^recipe "):
            load_recipes(str(tmp_path / f"{name}.yaml"))


def test_a_fault_of_ours_is_one_line_and_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fault(_: object) -> None:
        raise KeyError("a\nb\x1b")

    monkeypatch.setattr("cmt_mae.core.cli.dispatch", fault)
    assert main(["pack"]) == 1
    line = capsys.readouterr().err
    assert line.startswith("cmt-mae: a fault of cmt-mae, KeyError")
    assert line.count("\n") == 1
    assert "\x1b" not in line
    monkeypatch.setenv("CMT_MAE_DEBUG", "1")
    assert main(["pack"]) == 1
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("CMT_MAE_DEBUG", "0")
    for error in (
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
    ):
        monkeypatch.setattr(
            "cmt_mae.core.cli.dispatch", lambda _, error=error: (_ for _ in ()).throw(error)
        )
        assert main(["pack"]) == 2
        assert "out of memory" in capsys.readouterr().err
    missing = PermissionError(13, "Permission denied", "/a/b")
    monkeypatch.setattr("cmt_mae.core.cli.dispatch", lambda _: (_ for _ in ()).throw(missing))
    assert main(["pack"]) == 2
    assert (
        capsys.readouterr().err
        == "cmt-mae: /a/b: Permission denied; check the path and its permissions\n"
    )


def test_a_result_with_markup_in_its_names_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    name = "[/x][red]\x1b[2J"
    result = Result(
        task="davis", metrics={name: 1.0}, protocol={"name": name, "headline": name, name: name},
        backbone={"name": name}, data={}, seed=0,
        details={"sequences": [{"name": name, "objects": [1], "J&F": 1.0, "J_mean": 1.0, "F_mean": 1.0}]},
    )  # fmt: skip
    show_result(result)
    assert "protocol:" not in (brief := capsys.readouterr().err)
    assert "--protocols shows every setting" in brief
    show_result(result, whole=True)
    text = capsys.readouterr().err
    assert "\x1b" not in text
    assert text.count(r"[/x][red]\x1b[2J") >= 3


def test_under_torchrun_one_line_for_all_ranks(tmp_path: Path) -> None:
    """torchrun ends the others as soon as rank 0 has failed, before they speak."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\nfrom cmt_mae.core.cli import main\nsys.exit(main(['recipes', 'nowhere']))\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, str(program)], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("cmt-mae: ")]
    assert len(lines) == 1
    assert "recipe 'nowhere' is unknown" in lines[0]


def test_a_rank_that_fails_alone_speaks_after_a_while(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    for rank, times in (("0", 0), ("1", 1)):
        monkeypatch.setenv("RANK", rank)
        assert main(["recipes", "nowhere"]) == 2
        assert len(waited) == times
        assert capsys.readouterr().err.count("cmt-mae: ") == 1


def test_results_stay_in_their_folder(tmp_path: Path) -> None:
    result = Result(
        task="../../x", metrics={"a": 1.0}, protocol={"name": "../..", "headline": "a"},
        backbone={}, data={}, seed=0,
    )  # fmt: skip
    assert result.save(tmp_path / "a").parent == tmp_path / "a" / "results"
    assert json.loads(next((tmp_path / "a" / "results").iterdir()).read_text())["task"] == "../../x"
