"""The command line contract: exit status, one line of error, --json, names of options, recipes."""

import importlib
import json
import shutil
import subprocess
import sys
from dataclasses import is_dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import cmt_mae
from cmt_mae.core.bare_words import with_lists, with_positional
from cmt_mae.core.cli import COMMANDS, EVALUATIONS, SHORT, main
from cmt_mae.core.parsing import parse
from cmt_mae.core.recipes import head_comment, load_recipes, recipe_names
from cmt_mae.core.settings import walk
from cmt_mae.data.steps import order
from cmt_mae.pretraining.settings import PretrainConfig
from cmt_mae.tools.report.compare import CompareConfig
from tiny import Make, as_words

PUBLISHED = [
    "mae", "simmim_mask", "maskfeat", "mvp", "milan", "attmask", "data2vec", "cm_only", "ct_only",
    "teacher_guided", "cmt", "cmt_all", "cmt_vitb16", "cmt_vitl16", "imagenette_vits16", "demo", "micro64",
]  # fmt: skip


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run a command that must end with status 2 and exactly one line of error, and no traceback."""
    assert main(list(words)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cmt-mae: ")]
    assert len(errors) == 1, errors
    assert "Traceback" not in errors[0]
    return errors[0]


def test_module_and_script_run_and_show_help() -> None:
    for command in (["-m", "cmt_mae", "--help"], ["-m", "cmt_mae", "recipes"]):
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert "cmt" in done.stdout


def test_help_of_pretrain_tells_every_setting_with_its_meaning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["pretrain", "--help"]) == 0
    first = capsys.readouterr().out
    options = [line.split()[0] for line in first.splitlines() if line.startswith("  --")]
    assert options[0] == "--recipe"
    assert 10 <= len(options) <= 15
    for part in ("--data PATH", "--teacher NAME", "micro64", "without a recipe: 4096", "--help-all"):
        assert part in first
    assert main(["pretrain", "--help-all"]) == 0
    everything = capsys.readouterr().out
    for name, kind, _ in walk(PretrainConfig):
        shown = {full: short for short, full in SHORT.items()}.get(name, name)
        assert f"--{shown} " in everything or is_dataclass(kind), name
    assert "Share of hidden patches" in everything


@pytest.mark.parametrize("words", [[name] for name in COMMANDS] + [["evaluate", e] for e in EVALUATIONS])
def test_help_of_every_command_is_short_and_says_how_it_is_called(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: cmt-mae {' '.join(words)} ")
    assert "Annotated" not in text
    assert "configuration file" not in text
    assert main([*words, "--help-all"]) == 0
    everything = capsys.readouterr().out
    first, every = (
        {line.split()[0] for line in page.splitlines() if line.startswith("  --")}
        for page in (text, everything)
    )
    assert first <= every
    assert len(first) <= 16


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_recipe_parses_checks_and_says_what_it_is(name: str) -> None:
    content = load_recipes(name)
    content.update(out="run", data={**content.get("data", {}), "path": "somewhere"})
    config = parse("test", PretrainConfig, [], content)
    config.check()
    config.student.architecture()
    head = head_comment(name)
    for word in (
        "iffers from",
        "Hours: ",
        "Hardware: ",
        "Command: cmt-mae pretrain|Command: torchrun",
    ):
        assert any(part in head for part in word.split("|")), (name, word)
    # of relatives "Follows": a recipe's head claims no more than the code does
    assert any(word in head for word in ("eproduces", "Comparator", "Follows")), name


def test_all_recipes_of_the_package_are_known_here_or_extra() -> None:
    assert set(PUBLISHED) <= set(recipe_names())


def test_paper_recipe_is_the_papers_setting() -> None:
    config = parse("test", PretrainConfig, [], load_recipes("cmt_vitb16"))
    assert (config.epochs, config.batch_size, config.alpha, config.mask.ratio) == (
        800,
        4096,
        0.3,
        0.75,
    )
    assert (config.optim.blr, config.optim.weight_decay, config.stage_one()) == (1.5e-4, 0.05, 400)
    assert config.optim.blr * config.batch_size / 256 == pytest.approx(2.4e-3)
    assert config.teacher.name == "vit_base_patch16_clip_quickgelu_224.openai"


def test_recipes_join_and_later_ones_win(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("epochs: 3\nmask: {ratio: 0.6}\n")
    merged = load_recipes(f"mvp,micro64,{own}")
    assert merged["epochs"] == 3
    assert merged["mask"] == {"rule": "random", "ratio": 0.6}
    assert merged["student"]["preset"] == "micro"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pretrian"], "did you mean pretrain"),
        (["pretrain", "--recipe", "nope", "--data", "x"], "recipe 'nope' is unknown"),
        (["pretrain", "--mask.ratoi", "0.5"], "--mask.ratoi is unknown (did you mean mask.ratio?)"),
        (["pretrain", "--epochs", "many"], "epochs"),
        (["pretrain", "--zzzz", "1"], "--zzzz is unknown; see"),
        (["pretrain", "--recipe"], "needs a value"),
        (["pretrain", "--out", "x"], "no images: give --data"),
        (["pretrain", "--data", "x"], "no folder for the run: give --out"),
        (["demo", "--epochs", "-1"], "--epochs is -1: give a number above 0"),
        (["demo", "--images", "5"], "--images 5 is too few"),
        (["evaluate", "nope"], "use knn, linear"),
        (["evaluate", "knn", "--backbone", "x"], "data"),
    ],
)
def test_bad_words_give_one_line_and_status_2(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in fails(capsys, *words)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"mask__ratio": 1.5}, "mask.ratio 1.5 is impossible"),
        ({"mask__ratio": 0.999}, "leaves 0 visible"),
        ({"student__img_size": [30]}, "30x30 is not a multiple of student.patch_size 8"),
        ({"batch_size": 64}, "fewer than --batch-size 64"),
        ({"batch_size": 8, "runtime__micro_batch": 3}, "a multiple of 3"),
        ({"data__path": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"teacher__name": "vit_gigantic_17"}, "vit_gigantic_17"),
        ({"teacher__name": "/nowhere/teacher.pth"}, "/nowhere/teacher.pth"),
        ({"stage1_epochs": 9.0}, "longer than epochs"),
        ({"init_from": "/nowhere/run"}, "/nowhere/run"),
        ({"mask__source": "momentum", "target__source": "pixel"}, "set stage1_epochs to 0"),
        ({"data__scale": [0.9, 0.2]}, "data.scale"),
        ({"target__source": "pixel", "target__tokens": "all+cls"}, "use masked or all"),
        ({"student__in_chans": 5}, "5 are wanted"),
    ],
)
def test_bad_settings_give_one_line_and_leave_nothing_behind(
    changes: dict[str, object], expected: str, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make(**changes)
    assert expected in fails(capsys, "pretrain", *as_words(config))
    assert not Path(config.out).exists()


def test_folder_of_something_else_is_refused(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make()
    Path(config.out).mkdir()
    (Path(config.out) / "thesis.txt").write_text("years of work")
    assert "is not empty and holds no run" in fails(capsys, "pretrain", *as_words(config))
    assert [p.name for p in Path(config.out).iterdir()] == ["thesis.txt"]


def test_images_that_are_none(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    config = make(data__path=str(empty))
    assert "empty" in fails(capsys, "pretrain", *as_words(config))
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(10):
        (texts / f"{number}.jpg").write_text("I am no picture")
    config = make(out="other", data__path=str(texts))
    line = fails(capsys, "pretrain", *as_words(config))
    assert ".jpg" in line


def test_broken_images_are_named_skipped_and_stop_the_run_when_too_many(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of 40 are less than 6 %, though one of them is among the first 8."""
    folder = tmp_path / "photos"
    folder.mkdir()
    noise = np.random.default_rng(0)
    for number in range(40):
        pixels = noise.integers(0, 255, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.jpg")
    config = make(data__path=str(folder), data__max_bad=0.06)
    first, last = order(40, config.seed, 0)[[0, -1]].tolist()
    (folder / f"{first:02d}.jpg").write_text("I am no picture")
    cut = folder / f"{last:02d}.jpg"
    cut.write_bytes(cut.read_bytes()[:300])
    assert main(["pretrain", *as_words(config)]) == 0
    named = (Path(config.out) / "bad_images.txt").read_text()
    assert sorted(line.split("\t")[0] for line in named.splitlines()) == sorted(
        f"{number:02d}.jpg" for number in (first, last)
    )
    capsys.readouterr()
    config = make(out="strict", data__path=str(folder), data__max_bad=0.01)
    line = fails(capsys, "pretrain", *as_words(config))
    assert "more than data.max_bad 0.01" in line
    assert "bad_images.txt" in line


def test_evaluate_json_is_the_last_line_of_stdout(
    cmt_run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(cmt_run, tmp_path / "run")
    words = ["--backbone", str(run), "--data", str(images), "--device=cpu", "--workers=0", "--json"]
    for task, more in (("knn", ["--k", "[3,5]"]), ("linear", ["--protocol", "mae", "--epochs", "20"])):
        assert main(["evaluate", task, *words, *more]) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert result["task"] == task
        assert result["protocol"]["headline"] in result["metrics"]
        assert len(result["backbone"]["digest"]) == 64
    assert len(list((run / "results").glob("*.json"))) == 2


def test_export_and_pack_through_the_command_line(
    cmt_run: Path, images: Path, tmp_path: Path
) -> None:
    out, target = str(tmp_path / "exported"), tmp_path / "packed16"
    assert main(["export", "--backbone", str(cmt_run), "--format", "hf", "--out", out]) == 0
    assert (tmp_path / "exported" / "config.json").exists()
    words = ["pack", "--data", str(images), "--out", str(target), "--size", "16", "--workers", "0"]
    assert main(words) == 0
    assert np.load(target / "train" / "images.npy", mmap_mode="r").shape == (40, 16, 16, 3)


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--debug", "pretrain", "--out", "x"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_config_of_a_run_is_a_recipe(make: Make) -> None:
    """config.yaml is complete: it parses back to the same settings."""
    config = make(alpha=0.7)
    from cmt_mae.core.runs import plain

    again = parse("test", PretrainConfig, [], yaml.safe_load(yaml.safe_dump(plain(config))))
    assert again == config


def test_public_functions_stay_functions_whatever_was_imported_before() -> None:
    """A module of the same name would take the function's place once it is imported."""
    modules = {
        name: importlib.import_module(f"cmt_mae.{home}") for name, home in cmt_mae._HOMES.items()
    }
    for name, module in modules.items():
        assert getattr(cmt_mae, name) is getattr(module, name), name
        assert callable(getattr(cmt_mae, name)), name


def test_bare_flags_and_positional_words() -> None:
    assert with_positional(["a", "--paper", "b", "--format", "json"], "runs") == [
        '--runs=["a", "b"]', "--paper", "--format=json",
    ]  # fmt: skip
    assert with_positional(["--help"], "runs") == ["--help"]
    assert with_lists(["--tasks", "knn,linear", "davis", "--seed", "1"], (), ("tasks",)) == [
        "--seed", "1", '--tasks=["knn", "linear", "davis"]',
    ]  # fmt: skip
    config = parse("test", CompareConfig, ['--runs=["a"]', "--paper"], {})
    assert config.paper is True
    config = parse("test", CompareConfig, ["--paper", "false", '--runs=["a"]'], {})
    assert config.paper is False
