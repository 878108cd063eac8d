"""`ablate` on runs of ten steps: plan, sharing of stage one, resuming, failures, the table."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from cmt_mae.core.cli import main
from cmt_mae.core.errors import InputError
from cmt_mae.core.lock import Lock
from cmt_mae.tools.ablate import AblateConfig, ablate
from cmt_mae.tools.ablate.command import Workers
from cmt_mae.tools.ablate.grid import grid_names, load_grid
from cmt_mae.tools.ablate.one import main as work_off
from cmt_mae.tools.ablate.plan import read_run_plan
from cmt_mae.tools.ablate.table import write_table
from tiny import Make, assert_same_state


@pytest.fixture
def scale(make: Make, tmp_path: Path) -> Path:
    """A recipe with the scale of the tests."""
    from cmt_mae.core.runs import plain

    content = plain(make())
    for method in ("mask", "target", "out", "seed", "alpha", "init_from"):
        content.pop(method)
    content = {k: v for k, v in content.items() if v is not None}
    path = tmp_path / "scale.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def grid_file(tmp_path: Path, content: dict[str, object]) -> str:
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def quick(images: Path, scale: Path, out: Path, experiment: str, **more: object) -> AblateConfig:
    return AblateConfig(
        out=str(out), experiment=experiment, data=str(images), recipe=str(scale), threads=1, progress=False,
        **more,  # type: ignore[arg-type]
    )  # fmt: skip


OWN = {
    "title": "own",
    "recipe": "cmt",
    "evaluate": {"knn": {"k": [3], "pools": ["mean"]}},
    "variants": {
        "a": {"settings": {"alpha": 0.3}},
        "b": {"settings": {"alpha": 1.0}},
        "c": {"settings": {"alpha": 0.0}},
    },
}


def test_stage_one_taken_from_a_sibling_is_exact(images: Path, scale: Path, tmp_path: Path) -> None:
    """Runs that begin at a sibling's switch end with the bits of runs trained from their own first step."""
    own = grid_file(tmp_path, OWN)
    out, alone = tmp_path / "out", tmp_path / "alone"
    for folder in (out, alone):
        ablate(quick(images, scale, folder, own, seeds=1, table_only=True))
    for name in ("a_s0", "b_s0", "c_s0"):
        assert work_off(out, name) == 0
        assert work_off(alone, name) == 0
        if name != "a_s0":
            status = json.loads((out / "status" / f"{name}.json").read_text())
            assert status["stage_one_from"] in ("a_s0", "b_s0")
        assert_same_state(out / "runs" / name, alone / "runs" / name)
        shutil.rmtree(alone / "runs" / name)  # so that the next one there has nobody to borrow from
    table = write_table(read_run_plan(out), out)
    assert table["runs_done"] == 3
    assert table["columns"][0]["values"].keys() == {"a", "b", "c"}
    assert "| a (baseline) |" in (out / "table.md").read_text()


def test_failing_run_is_named_and_stops_no_other(images: Path, scale: Path, tmp_path: Path) -> None:
    """Two processes; one variant cannot run. The same command again does only what is missing."""
    content = {**OWN, "variants": {"good": {}, "bad": {"settings": {"init_from": "/nowhere"}}}}
    config = quick(images, scale, tmp_path / "out", grid_file(tmp_path, content), seeds=1, jobs=2)
    with pytest.raises(InputError, match=r"1 of 2 runs failed, first bad_s0: .*nowhere"):
        ablate(config)
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert table["runs_done"] == 1
    assert list(table["failed"]) == ["bad_s0"]
    assert (
        "Failed: bad\\_s0" in (tmp_path / "out" / "table.md").read_text()
        or "bad_s0" in (tmp_path / "out" / "table.md").read_text()
    )
    before = (tmp_path / "out" / "status" / "good_s0.json").stat().st_mtime_ns
    table = ablate(AblateConfig(out=str(tmp_path / "out"), only=("good",), progress=False))
    assert table["runs_done"] == 1
    assert (tmp_path / "out" / "status" / "good_s0.json").stat().st_mtime_ns == before


def test_command_line_refuses_what_cannot_work(
    images: Path, scale: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, status 2, and nothing is left behind."""
    out = tmp_path / "out"
    words = ["ablate", "maskz", "--out", str(out), "--data", str(images), "--recipe", str(scale)]
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "'maskz' is unknown (did you mean masks?)" in line
    assert not out.exists()
    for change, said in (
        ({"index": 2, "of": 2}, "--index 2"),
        ({"evaluate": ("knnn=x",)}, "did you mean knn"),
        ({"seeds": 0}, "seeds"),
    ):
        with pytest.raises(InputError, match=said):
            ablate(quick(images, scale, out, "masks", table_only=True, **change))
        assert not out.exists()


def test_plan_grows_and_refuses_other_settings(images: Path, scale: Path, tmp_path: Path) -> None:
    """More seeds join the plan; another alpha under the same name is refused with the difference."""
    out, own = tmp_path / "out", grid_file(tmp_path, OWN)
    ablate(quick(images, scale, out, own, seeds=1, table_only=True))
    ablate(quick(images, scale, out, own, seeds=2, table_only=True))
    assert [run.name for run in read_run_plan(out).runs] == [
        "a_s0",
        "b_s0",
        "c_s0",
        "a_s1",
        "b_s1",
        "c_s1",
    ]
    other = {**OWN, "variants": {"a": {"settings": {"alpha": 0.4}}}}
    with pytest.raises(InputError, match=r"alpha: 0\.3 -> 0\.4"):
        ablate(quick(images, scale, out, grid_file(tmp_path, other), table_only=True))


@pytest.mark.parametrize("name", grid_names())
def test_built_in_grids_make_plans(name: str, images: Path, scale: Path, tmp_path: Path) -> None:
    """Every variant of every built-in experiment has settings that `pretrain` takes; rows of the paper exist."""
    ablate(quick(images, scale, tmp_path / "out", name, seeds=2, table_only=True))
    plan, grid = read_run_plan(tmp_path / "out"), load_grid(name)
    assert len(plan.runs) == 2 * len(grid.variants)
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert len(table["paper"]["numbers"]) == sum(bool(one.paper) for one in grid.variants)


def test_a_run_in_other_hands_is_left_alone(images: Path, scale: Path, tmp_path: Path) -> None:
    """While one process holds a run's lock, no other trains it; afterwards it can be had."""
    out = tmp_path / "out"
    plan = quick(images, scale, out, grid_file(tmp_path, OWN), seeds=1, table_only=True)
    ablate(plan)
    (out / "status").mkdir()
    lock = Lock(out / "status" / "a_s0.lock")
    lock.take()
    assert work_off(out, "a_s0") == 75
    assert not (out / "runs").exists()
    lock.give_back()


def test_the_parts_of_an_array_are_the_whole_plan_and_share_nothing(
    images: Path, scale: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    config = quick(images, scale, out, grid_file(tmp_path, OWN), seeds=3, table_only=True)
    ablate(config)
    plan = read_run_plan(out)
    parts = [
        [run.name for run in Workers(replace(config, index=index, of=4), plan, out).runs]
        for index in range(4)
    ]
    assert sorted(name for part in parts for name in part) == sorted(run.name for run in plan.runs)
    assert all(parts)
