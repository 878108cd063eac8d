"""What the three evaluations that train share: exact resume after real signals, and bad input told first."""

import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trainings import assert_same_end, program, rows, run, saved

from cmt_mae.core.errors import InputError, Stopped

Trainings = dict[str, dict[str, Any]]


@pytest.mark.parametrize(
    ("name", "changes"),
    [("finetune", {"workers": 1}), ("ade20k", {"save_memory": True}), ("coco", {})],
)
def test_stopped_killed_and_continued_it_ends_the_same(
    trainings: Trainings, undisturbed: Callable[[str], Path], tmp_path: Path, name: str, changes: Any
) -> None:
    """A SIGTERM, then kill -9 of a process, then to the end, at last with settings that may not move a number."""
    given = trainings[name] | {"out": str(tmp_path / "run")}
    with pytest.raises(Stopped, match=r"stopped at step [1-3] of 6"):
        run(name, kill_at=(signal.SIGTERM, 2), **given)
    killed = program(name, {**given, "kill_at": [signal.SIGKILL, 3]})
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert max(row["step"] for row in rows(given["out"])) < 6
    result = run(name, **given | changes)
    assert_same_end(undisturbed(name), given["out"])
    assert str(run(name, **given).metrics) == str(result.metrics)  # nothing is left to do
    with pytest.raises(InputError, match=r"other settings \(.*seed: 0 -> 1"):
        run(name, **given | {"seed": 1})
    assert saved(given["out"]).metrics.keys() == result.metrics.keys()


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("finetune", {"preset": "best"}, "preset is 'best': give one of"),
    ("finetune", {"few_shot": "many"}, "neither a share"),
    ("finetune", {"frozen_layers": 9}, "frozen_layers 9: the backbone has 3 blocks"),
    ("finetune", {"rand_augment": "strong"}, "is no RandAugment of timm"),
    ("finetune", {"micro_batch": 1}, "and 1 is odd"),
    ("finetune", {"batch_size": 9, "micro_batch": 4}, "cannot be split"),
    ("finetune", {"epochs": 3, "warmup_epochs": 3.0}, "leaves none of 3 to train"),
    ("finetune", {"size": 33}, "does not split into patches"),
    ("finetune", {"backbone": "vit_nothing"}, "no such file"),
    ("finetune", {"backbone": ""}, "no backbone"),
    ("finetune", {"data": "/nowhere"}, "/nowhere"),
    ("finetune", {"out": None}, "give --out"),
    ("finetune", {"device": "tpu"}, "give one of auto, cpu"),
    ("ade20k", {"preset": "best"}, "preset is 'best': give one of paper, paper_ft, mae, quick"),
    ("ade20k", {"backbone": ""}, "no backbone"),
    ("ade20k", {"data": "/nowhere"}, "no such folder"),
    ("ade20k", {"batch_size": 10}, "a batch of 10 and 9 training images"),
    ("ade20k", {"batch_size": 1}, "batch norm needs 2 or more images"),
    ("ade20k", {"micro_batch": 1}, "batch norm needs 2 or more images"),
    ("ade20k", {"micro_batch": 3}, "cannot be split"),
    ("ade20k", {"warmup": 6}, "leaves none of 6 to train"),
    ("ade20k", {"stride": 33}, "leave gaps"),
    ("ade20k", {"longer_side": 20}, "may not be below"),
    ("ade20k", {"classes": "2"}, "label 3 is out of range"),
    ("coco", {"preset": "3x"}, "preset is '3x': give one of"),
    ("coco", {"backbone": ""}, "no backbone"),
    ("coco", {"data": "/nowhere"}, "is no folder"),
    ("coco", {"batch_size": 16}, "12 training images are fewer than a batch of 16"),
    ("coco", {"micro_batch": 3}, "cannot be split into 1 process"),
    ("coco", {"augment": "lsj", "lsj_size": 32}, "do not fit into lsj_size 32"),
    ("coco", {"anchors": (8, 16)}, "give a list of 5"),
    ("coco", {"lsj_scale": (2.0, 0.1)}, "give the smaller one first"),
    ("coco", {"out": None}, "give --out FOLDER"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "wanted"), WRONG)
def test_impossible_settings_cost_one_line_and_leave_nothing(
    trainings: Trainings, tmp_path: Path, name: str, changes: dict[str, Any], wanted: str
) -> None:
    """What one setting alone cannot be is tested for all commands in core/test_ranges.py."""
    with pytest.raises(InputError, match=re.escape(wanted)) as caught:
        run(name, **{**trainings[name], "out": str(tmp_path / "run"), **changes})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "spoilt", "wanted"),
    [
        ("finetune", "train/green/2.png", r"green/2\.png.*(fix|remove)"),
        ("finetune", "val/green/2.png", r"green/2\.png.*(fix|remove)"),
        ("ade20k", "annotations/training/04.png", r"04\.png: no mask that can be read"),
        ("coco", "annotations/instances_val2017.json", r"instances_val2017\.json"),
    ],
)
def test_a_broken_file_is_named(
    trainings: Trainings, tmp_path: Path, name: str, spoilt: str, wanted: str
) -> None:
    """Other faults of the data: data/test_ade20k.py and data/test_coco.py."""
    shutil.copytree(trainings[name]["data"], tmp_path / "data")
    (tmp_path / "data" / spoilt).write_bytes(b"\x89PNG broken")
    given = trainings[name] | {"data": str(tmp_path / "data"), "out": str(tmp_path / "run")}
    with pytest.raises(InputError, match=wanted) as caught:
        run(name, **given)
    assert "\n" not in str(caught.value)
    assert name == "finetune" or not (tmp_path / "run").exists()  # which reads an image as it needs it
