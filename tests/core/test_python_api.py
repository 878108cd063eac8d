"""The Python side of the settings: recipes, texts in place of sections, help and names."""

import pydoc
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import cmt_mae
from cmt_mae import InputError, PretrainConfig
from cmt_mae.core.parsing import parse
from cmt_mae.core.recipes import load_recipes
from cmt_mae.pretraining.settings import MaskConfig


def test_a_recipe_in_python_is_the_recipe_on_the_command_line() -> None:
    config = PretrainConfig.from_recipe(
        "cmt_all,micro64", data="photos/", teacher="embedded", out="runs/a", mask={"ratio": 0.6}
    )
    words = ["--data.path=photos/", "--teacher.name=embedded", "--out=runs/a", "--mask.ratio=0.6"]
    assert config == parse("x", PretrainConfig, words, load_recipes("cmt_all,micro64"))
    config.check()
    whole = PretrainConfig.from_recipe("mae", mask=MaskConfig(ratio=0.5))
    assert whole.mask == MaskConfig(ratio=0.5)


def test_a_text_stands_for_data_and_teacher() -> None:
    config = PretrainConfig(out="runs/a", data="photos/", teacher="embedded")  # type: ignore[arg-type]
    assert (config.data.path, config.teacher.name) == ("photos/", "embedded")
    config.data = "other/"  # type: ignore[assignment]
    config.check()
    assert config.data.path == "other/"


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"dat": "x"}, "setting dat is unknown (did you mean data?)"),
        ({"mask": {"ratoi": 1}}, "setting mask.ratoi is unknown (did you mean ratio?)"),
        ({"epochs": "many"}, "--epochs is 'many': give a number above 0"),
        ({"data": 3}, "--data is 3: give DataConfig(...), its settings by name"),
        ({"data": {"path": Path("x")}}, "--data.path is x: give text"),
    ],
)
def test_wrong_types_say_the_right_form(settings: dict, line: str) -> None:
    with pytest.raises(InputError) as error:
        PretrainConfig.from_recipe("mae", **settings)
    assert str(error.value) == line


def test_names_version_and_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "cmt_mae.core.cli", raising=False)  # commands make no docstrings
    assert {"pretrain", "PretrainConfig", "__version__"} <= set(dir(cmt_mae))
    assert cmt_mae.__version__ == version("cmt-mae")
    assert (Path(cmt_mae.__file__).parent / "py.typed").exists()
    shown = pydoc.plain(pydoc.render_doc(cmt_mae.PretrainConfig))
    assert "mask.ratio = 0.75" in shown
    assert "Share of hidden patches, in (0, 1)." in shown
    assert "Numbers of neighbours" in pydoc.plain(pydoc.render_doc(cmt_mae.KnnConfig))
