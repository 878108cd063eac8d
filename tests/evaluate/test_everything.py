"""All tasks that the data allow: what is found, what is run again, what a failure costs."""

import json
import math
import os
import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest

from cmt_mae.core.errors import InputError, Stopped
from cmt_mae.core.help import docs_of
from cmt_mae.data.sample import write_ade20k, write_coco, write_davis
from cmt_mae.evaluate import everything, knn, linear
from cmt_mae.evaluate.everything import EvaluateAllConfig, evaluate_all
from cmt_mae.evaluate.layouts import find_data, folder_fingerprint, layout_of
from cmt_mae.evaluate.result import Result
from cmt_mae.tools.report.compare import METRICS, CompareConfig, compare
from tiny import tiny_vit


@pytest.fixture
def root(tmp_path, pictures):
    """A folder with one labelled data set, and one without any use."""
    root = tmp_path / "data"
    root.mkdir()
    (root / "colours").symlink_to(pictures)
    (root / "notes").mkdir()
    (root / ".hidden").mkdir()
    return root


@pytest.fixture
def config(root, vit, tmp_path):
    def make(**changes):
        settings = {"tasks": ("knn", "linear"), "device": "cpu", "workers": 0}
        settings |= {"backbone": vit, "data_root": str(root), "out": str(tmp_path / "out")}
        return EvaluateAllConfig(**(settings | changes))

    return make


@pytest.fixture
def calls(monkeypatch):
    """Tasks in the order in which they were really called; they still do their work."""
    called: list[str] = []
    for module, name in ((knn, "evaluate_knn"), (linear, "evaluate_linear")):
        real = getattr(module, name)

        def spy(settings, real=real, name=name):
            called.append(name.removeprefix("evaluate_"))
            return real(settings)

        monkeypatch.setattr(module, name, spy)
    return called


@pytest.fixture(autouse=True)
def few_epochs(monkeypatch):
    """The linear probe of these tests trains for one epoch."""
    task = replace(everything.TASKS["linear"], quick={"protocol": "mae", "epochs": 1})
    monkeypatch.setitem(everything.TASKS, "linear", task)


def test_each_result_is_that_of_its_own_command(config, vit, pictures, tmp_path, capsys, calls):
    results = evaluate_all(config())
    assert [result.task for result in results] == calls == ["knn", "linear"]
    alone = knn.evaluate_knn(knn.KnnConfig(backbone=vit, data=pictures, device="cpu", workers=0))
    assert results[0].metrics == alone.metrics
    assert results[0].identity() == alone.identity()
    saved = sorted((tmp_path / "out" / "results").glob("*.json"))
    assert [Result.load(path).metrics for path in saved] == [r.metrics for r in results]
    said = capsys.readouterr().err
    assert "[1/2] knn on" in said
    assert f"cmt-mae compare {tmp_path / 'out'}" in said
    assert f"skipped {config().data_root}/notes: no train and val split" in said
    assert ".hidden" not in said


def test_again_measures_only_what_is_missing(config, calls, tmp_path, capsys):
    first = evaluate_all(config())
    calls.clear()
    assert evaluate_all(config()) == first
    assert calls == []
    assert "(measured before)" in capsys.readouterr().err
    next((tmp_path / "out" / "results").glob("knn-*.json")).write_text("{")  # a damaged file
    evaluate_all(config())
    assert calls == ["knn"]
    evaluate_all(config(workers=1, device="auto"))  # these change no number
    assert calls == ["knn"]
    evaluate_all(config(seed=1))
    assert calls == ["knn", "knn", "linear"]


def test_other_weights_and_other_data_are_measured(
    config, calls, root, tmp_path, pictures
):
    one = evaluate_all(config(tasks=("knn",)))
    two = evaluate_all(
        config(tasks=("knn",), backbone=tiny_vit(tmp_path / "b.safetensors", seed=5))
    )
    assert one[0].backbone["digest"] != two[0].backbone["digest"]
    (root / "colours").unlink()
    shutil.copytree(pictures, root / "moved")
    assert evaluate_all(config(tasks=("knn",)))[0].identity() == one[0].identity()
    assert calls == ["knn", "knn"]  # the same data at another place
    next((root / "moved" / "val" / "red").iterdir()).unlink()
    three = evaluate_all(config(tasks=("knn",)))
    assert three[0].data["fingerprint"] != one[0].data["fingerprint"]
    assert calls == ["knn", "knn", "knn"]
    assert len(list((tmp_path / "out" / "results").glob("*.json"))) == 3


@pytest.mark.parametrize("error", [InputError("k is wrong\nhere"), RuntimeError("a fault")])
def test_a_failing_task_loses_no_other(config, monkeypatch, tmp_path, capsys, calls, error):
    real = knn.evaluate_knn

    def fail(*_):
        raise error

    monkeypatch.setattr(knn, "evaluate_knn", fail)
    with pytest.raises(InputError) as told:
        evaluate_all(config())
    assert calls == ["linear"]
    assert len(list((tmp_path / "out" / "results").glob("linear-*.json"))) == 1
    assert str(told.value).startswith(
        f"1 of 2 evaluations failed (knn on {config().data_root}/colours: "
    )
    assert "\n" not in str(told.value)
    kind = "" if isinstance(error, InputError) else "RuntimeError: "
    assert f"colours: {kind}{' '.join(str(error).split())})" in str(told.value)
    assert ("Traceback" in capsys.readouterr().err) == isinstance(error, RuntimeError)
    monkeypatch.setattr(knn, "evaluate_knn", real)
    assert len(evaluate_all(config())) == 2
    assert calls == ["linear", "knn"]


@pytest.mark.parametrize("end", [Stopped("checkpoint written"), KeyboardInterrupt()])
def test_a_stop_ends_all_and_keeps_what_is_there(config, monkeypatch, tmp_path, end, calls):
    real = linear.evaluate_linear

    def stop(*_):
        raise end

    monkeypatch.setattr(linear, "evaluate_linear", stop)
    with pytest.raises(type(end)):
        evaluate_all(config())
    assert len(list((tmp_path / "out" / "results").glob("*.json"))) == 1
    monkeypatch.setattr(linear, "evaluate_linear", real)
    evaluate_all(config())
    assert calls == ["knn", "linear"]


def layout(folder: Path, *files: str) -> None:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("")


def test_layouts(tmp_path, pictures):
    layout(tmp_path / "a_coco", "annotations/instances_val2017.json", "val2017/1.jpg")
    layout(tmp_path / "b_ade", "images/training/1.jpg", "annotations/training/1.png")
    layout(tmp_path / "c_davis", "JPEGImages/480p/a/0.jpg", "Annotations/480p/a/0.png")
    (tmp_path / "d_labelled").symlink_to(pictures)
    layout(tmp_path / "e_unlabelled", "train/1.png", "val/1.png")
    layout(tmp_path / "f_photos", "1.jpg")
    assert [layout_of(p) for p in sorted(tmp_path.iterdir())] == [
        "coco",
        "ade20k",
        "davis",
        "labelled",
        "labelled",
        None,
    ]
    found, notes = find_data(tmp_path, {"labelled"})
    assert [one.path.name for one in found] == ["d_labelled"]
    assert [note.split(":")[0] for note in notes] == [
        str(tmp_path / name) for name in ("a_coco", "b_ade", "c_davis", "e_unlabelled", "f_photos")
    ]
    assert "no wanted task" in notes[0]
    assert "has no label" in notes[3]
    (itself,), _ = find_data(tmp_path / "d_labelled", {"labelled"})
    assert itself.path == tmp_path / "d_labelled"


def test_fingerprint_of_a_folder(tmp_path):
    layout(tmp_path, "a/x.json", "a/y.png")
    before = folder_fingerprint(tmp_path)
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    assert folder_fingerprint(tmp_path) == before
    (tmp_path / "a" / "x.json").write_text("1")
    one = folder_fingerprint(tmp_path)
    (tmp_path / "a" / "x.json").write_text("2")  # the same size
    assert len({before, one, folder_fingerprint(tmp_path)}) == 3
    os.symlink(tmp_path / "gone", tmp_path / "dangling.json")
    folder_fingerprint(tmp_path)


def test_the_run_directory_is_the_default_place(config, vit, tmp_path, calls):
    with pytest.raises(InputError, match="give --out"):
        evaluate_all(config(out=None))
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(vit, run / "backbone.safetensors")
    (run / "config.yaml").write_text("")
    evaluate_all(config(backbone=str(run), out=None, tasks=("knn",)))
    assert len(list((run / "results").glob("*.json"))) == 1
    ledger = json.loads((run / "evaluate_all.json").read_text())
    assert [entry["task"] for entry in ledger.values()] == ["knn"]
    (run / "evaluate_all.json").write_text("[]")  # damaged: everything is measured again
    evaluate_all(config(backbone=str(run), out=None, tasks=("knn",)))
    assert calls == ["knn", "knn"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("lineer",)}, r"task 'lineer' is unknown \(did you mean linear\?\)"),
        ({"tasks": ()}, "no task is left"),
        ({"preset": "fast"}, "preset is 'fast': give one of quick, paper"),
        ({"data_root": "nowhere"}, "nowhere: no such folder"),
        ({"backbone": "nothing"}, "no such file, run directory or timm model"),
        ({"device": "tpu"}, "unknown device"),
    ],
)
def test_bad_settings_before_any_work(config, tmp_path, calls, changes, message):
    with pytest.raises(InputError, match=message):
        evaluate_all(config(**changes))
    assert calls == []
    assert not (tmp_path / "out").exists()


def test_nothing_to_evaluate_on_says_what_was_looked_for(config, root):
    (root / "colours").unlink()
    with pytest.raises(InputError, match="nothing to evaluate on") as told:
        evaluate_all(config())
    assert "notes: no train and val split" in str(told.value)
    assert "knn: no labelled data" in str(told.value)
    assert "\n" not in str(told.value)


SMALL = {
    "davis": {"size": 64, "pictures": 0},
    "finetune": {"epochs": 1, "pictures": 0},
    "ade20k": {"iterations": 2, "crop_size": 32, "channels": 8, "batch_size": 2, "pictures": 0},
    "coco": {"epochs": 1.0, "channels": 16, "hidden": 16, "proposals": 20, "pictures": 0},
}
"""Settings that make the quick presets quicker still."""


def test_all_six_tasks_on_generated_scenes(tmp_path, root, config, deep_vit, monkeypatch, capsys):
    write_coco(root / "scenes-coco", 4, 2)
    write_ade20k(root / "scenes-ade", 2, 2)
    write_davis(root / "scenes-davis", 1, 3)
    for name, more in SMALL.items():
        task = everything.TASKS[name]
        monkeypatch.setitem(everything.TASKS, name, replace(task, quick={**task.quick, **more}))
    whole = config(backbone=deep_vit, tasks=None)
    results = evaluate_all(whole)
    assert [r.task for r in results] == ["knn", "linear", "davis", "finetune", "coco", "ade20k"]
    assert set(everything.TASKS) == set(METRICS)
    out = tmp_path / "out"
    assert len(list((out / "results").glob("*.json"))) == 6
    trainings = sorted(path.name.rsplit("-", 1)[0] for path in (out / "evaluations").iterdir())
    assert trainings == [
        "ade20k-scenes-ade-quick",
        "coco-scenes-coco-quick",
        "finetune-colours-quick",
    ]

    # one table has them all, and only once, though trainings keep a copy of their result
    content = compare(CompareConfig(runs=[str(out)]))
    (row,) = content["rows"]
    cells = {(cell["task"], cell["metric"]): cell for cell in row["cells"]}
    assert set(cells) == {(task, metric) for task, metrics in METRICS.items() for metric in metrics}
    assert all(cell["n"] <= 1 for cell in row["cells"])
    for result in results:
        shown = cells[result.task, METRICS[result.task][0]]["value"]
        assert shown == (None if math.isnan(result.headline) else result.headline)
    assert content["notes"] == []

    # nothing is done twice; and without the ledger a training that is over is only measured again
    capsys.readouterr()
    assert [r.identity() for r in evaluate_all(whole)] == [r.identity() for r in results]
    assert capsys.readouterr().err.count("(measured before)") == 6
    (out / everything.LEDGER).unlink()
    again = evaluate_all(config(backbone=deep_vit, tasks=("finetune",)))
    said = capsys.readouterr().err
    assert "at step 1 of 1" in said
    assert again[0].metrics == results[3].metrics


def test_every_preset_makes_settings(config, tmp_path):
    """Names of settings and presets are those that the tasks know."""
    backbone = everything.load_backbone(config().backbone)
    for preset in ("quick", "paper"):
        for name, task in everything.TASKS.items():
            given = config(preset=preset, zero_label="class")
            job = everything.make_job(name, tmp_path, given, backbone, tmp_path)
            assert getattr(job.config, "zero_label", "class") == "class"
            assert (job.config.device, job.config.seed) == ("cpu", 0)
            assert job.config.out == str(tmp_path) or task.trains


def test_a_new_setting_changes_no_key_of_an_old_ledger():
    """What keys were made of before there were zero_label, val_share, compile and so on."""
    frozen = {"k", "temperature", "pools", "size", "precision", "batch_size", "cache", "seed"}
    assert set(everything.settings_in_key(knn.KnnConfig("a", "b"))) == frozen
    assert set(everything.settings_in_key(knn.KnnConfig("a", "b", val_share=0.2))) == {*frozen, "val_share"}
    counts = {"finetune": 31, "ade20k": 28, "coco": 52, "davis": 31}
    for name, count in counts.items():
        settings = everything.TASKS[name].load_settings()(backbone="a", data="b")
        assert len(everything.settings_in_key(settings)) == count, name


@pytest.mark.parametrize("name", everything.TASKS)
def test_every_setting_is_explained(name: str):
    """--help is made of the text under each field."""
    settings = everything.TASKS[name].load_settings()
    explained = docs_of(settings)
    assert [one.name for one in fields(settings) if not explained.get(one.name)] == []
