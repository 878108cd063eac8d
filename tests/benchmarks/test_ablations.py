"""What `python -m benchmarks.ablations` does around `cmt-mae ablate`."""

from pathlib import Path

from benchmarks.ablations import adopt, key_of, make_digits

from cmt_mae.tools.ablate.grid import Grid, Variant
from cmt_mae.tools.ablate.one import write_status
from cmt_mae.tools.ablate.plan import Evaluation, make_plan, settle


def planned(work: Path, experiment: str, variants: list[Variant]) -> None:
    """The plan of an experiment in its folder."""
    grid = Grid(experiment, experiment, variants[0].name, variants)
    plan = make_plan(
        grid, out=work / experiment, data="photos", recipe="nano48", seeds=1,
        evaluations=[Evaluation("knn", "photos")], further={"teacher": {"name": "embedded"}},
    )  # fmt: skip
    settle(plan, work / experiment)


def test_equal_runs_are_taken_from_other_experiments_and_no_others(tmp_path: Path) -> None:
    ours, half = Variant("both", "cmt"), Variant("half", "cmt", {"alpha": 0.5})
    planned(tmp_path, "components", [ours, half])
    for name in ("both_s0", "half_s0"):
        run = tmp_path / "components" / "runs" / name
        run.mkdir(parents=True)
        (run / "weights").write_text(name)
    write_status(tmp_path / "components", "both_s0", {"state": "done"})  # half_s0 is not done
    rows = [
        Variant("alpha_0.3", "cmt", {"alpha": 0.3}), Variant("alpha_0.5", "cmt", {"alpha": 0.5}),
        Variant("untrained", "cmt", train=False),
    ]  # fmt: skip
    planned(tmp_path, "alpha", rows)
    adopt(tmp_path, "alpha")
    found = sorted(path.name for path in (tmp_path / "alpha" / "runs").iterdir())
    assert found == ["alpha_0.3_s0"]
    assert (tmp_path / "alpha" / "runs" / "alpha_0.3_s0" / "weights").read_text() == "both_s0"


def test_place_and_machine_make_no_other_run() -> None:
    one = {"out": "a", "alpha": 0.3, "runtime": {"micro_batch": 8}}
    other = {"out": "b", "alpha": 0.3, "runtime": {"micro_batch": 16}}
    assert key_of(one, True) == key_of(other, True)
    assert key_of(one, True) != key_of(one, False)
    assert key_of(one, True) != key_of({**one, "alpha": 0.5}, True)


def test_digits_are_a_labelled_folder(tmp_path: Path) -> None:
    folder = make_digits(tmp_path)
    assert len(list(folder.glob("train/?/*.png"))) == 1348
    assert len(list(folder.glob("val/?/*.png"))) == 449
    assert sorted(path.name for path in (folder / "val").iterdir()) == list("0123456789")
