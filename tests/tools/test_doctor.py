"""`cmt-mae doctor`: finds what is wrong, says nothing of what is right, and is right about what it counts."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from benchmarks.sick_runs import HEALTHY, SICK, settings_of
from timm.layers import QuickGELU

from cmt_mae.backbones.save import save_backbone
from cmt_mae.core.cli import main
from cmt_mae.core.errors import InputError
from cmt_mae.core.recipes import load_recipes
from cmt_mae.core.run_reader import RunRecord
from cmt_mae.core.runs import plain
from cmt_mae.data.sample import write_coco
from cmt_mae.pretraining import assembly
from cmt_mae.pretraining.plan import make_plan
from cmt_mae.pretraining.settings import PretrainConfig
from cmt_mae.tools.bench.build import make_trainer, synthetic_batches
from cmt_mae.tools.diagnose import machine
from cmt_mae.tools.diagnose.aim import check_aim
from cmt_mae.tools.diagnose.command import DoctorConfig, doctor
from cmt_mae.tools.diagnose.estimate import Size, at, estimate, kept_gb
from cmt_mae.tools.diagnose.finding import Finding
from cmt_mae.tools.diagnose.run import diagnose
from cmt_mae.tools.diagnose.settings import check_pixels, check_settings
from cmt_mae.tools.diagnose.teacher import check_teacher
from cmt_mae.tools.pretrain import pretrain
from tiny import Make, write_teacher

RECORDED = json.loads(Path(__file__).with_name("recorded_runs.json").read_text())
"""Metrics of real small runs, healthy and sick: `python -m benchmarks.sick_runs`, its recorded.json."""


def flat_teacher(folder: Path) -> str:
    """Weights as timm draws them: its attention is even."""
    return str(write_teacher(folder / "flat.safetensors", noise=0.0))


def names(found: list[Finding]) -> list[str]:
    """What was found."""
    return [one.what for one in found]


def run_of(name: str) -> RunRecord:
    """A recorded run."""
    known = RECORDED[name]
    knn = [{"step": step, "knn_top1": value} for step, value in known["knn"]]
    return RunRecord(
        Path("run"),
        name,
        config=plain(settings_of(name)),
        facts={"plan": known["plan"], "data": {"images": known["images"]}},
        rows=sorted([*known["rows"], *knn], key=lambda row: row["step"]),
        bad_images=[("x.jpg", "broken")] * known["bad"],
    )


def planned(config: PretrainConfig, images: int) -> RunRecord:
    """A run-to-be."""
    plan = vars(make_plan(config, images, 1))
    return RunRecord(Path("run"), "planned", config=plain(config), facts={"plan": plan})


# --- runs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_recorded_run_is_quiet_at_every_moment(name: str) -> None:
    run = run_of(name)
    for length in range(1, len(run.rows) + 1):
        early = dataclasses.replace(run, rows=run.rows[:length])
        assert names(diagnose(early)) == [], length


BY_IMAGES = "one image 256 times"
"""Its crops differ, so its metrics are those of a healthy run: the images themselves tell (next section)."""


@pytest.mark.parametrize("name", [one for one in SICK if one in RECORDED and one != BY_IMAGES])
def test_sick_recorded_run_gets_its_cause(name: str) -> None:
    """From metrics and settings alone; the whole doctor also looks at images and teacher."""
    found = diagnose(run_of(name))
    expected = SICK[name][2]
    assert any(one.what.startswith(expected) for one in found), names(found)


def healthy(knn: tuple[tuple[int, float], ...] = (), **changes: Any) -> RunRecord:
    """The healthy run with numbers of its last lines changed, and k-NN by step in place of its own."""
    run = run_of("cmt")
    rows = [dict(row) for row in run.rows if "loss" in row]
    for row in rows[-len(rows) // 3 :]:
        row.update(changes)
    rows += [{"step": step, "knn_top1": value} for step, value in knn]
    return dataclasses.replace(run, rows=rows)


def later(run: RunRecord, **changes: float) -> RunRecord:
    """With every line 220 steps later, and changed."""
    rows = [{**row, "step": 20 * (i + 11), **changes} for i, row in enumerate(run.rows)]
    return dataclasses.replace(run, rows=rows)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"loss_teacher": 0.9}, "learning rate too high"),
        ({"image_mean": -2.2}, "normalisation wrong"),
        ({"entropy_teacher": 0.999}, "teacher attends to nothing"),
        ({"class_mass_teacher": 0.98}, "attention stays on the class token"),
        ({"image_share_teacher": 0.01}, "images say nothing"),
        ({"skipped_steps": 4}, "steps that are not finite"),
        ({"spread_student": 0.001}, "signs of collapse"),
        ({"data_wait_share": 0.9}, "waiting for data"),
    ],
)
def test_each_rule_of_a_run(changes: dict[str, float], expected: str) -> None:
    assert names(diagnose(healthy(**changes))) == [expected]


def test_flat_knn_and_losses_that_stay_are_signs_only_without_a_cause() -> None:
    knn = ((50, 30.0), (100, 29.0), (220, 30.2))
    assert names(diagnose(healthy(knn))) == ["k-NN does not rise"]
    assert names(diagnose(healthy(knn, image_mean=9.0))) == ["normalisation wrong"]
    zero = later(healthy(), loss_teacher=0.99)
    assert names(diagnose(zero)) == ["no better than predicting 0"]
    mean = later(healthy(), spread_prediction_teacher=0.01)
    assert names(diagnose(mean)) == ["predicts the mean"]


def test_live_run_by_the_command_line(
    make: Make, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A real run with a learning rate a thousand times too high and a teacher of random weights."""
    config = make(optim__blr=30.0, teacher__name=flat_teacher(tmp_path))
    pretrain(config)
    capsys.readouterr()
    assert main(["doctor", config.out, "--json"]) == 1  # it found problems
    said = capsys.readouterr()
    report = json.loads(said.out)
    found = [one["what"] for one in report["findings"]]
    for expected in (
        "learning rate too high",
        "too few steps",
        "teacher attends to nothing",
        "too few images",
    ):
        assert expected in found, found
    assert report["run"]["state"] == "finished"
    assert report["run"]["step"] == report["run"]["total_steps"] == 10
    assert report["data"]["splits"]["train"]["images"] == 40
    assert (
        f"{len([f for f in report['findings'] if f['level'] == 'problem'])} problem(s)"
        in report["summary"]
    )
    assert "how to fix it: --optim.blr" in " ".join(said.err.split())
    assert main(["doctor", str(tmp_path / "none")]) == 2
    assert "no such run directory" in capsys.readouterr().err


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["cmt_vitb16", "cmt_vitl16", "demo", "mae", "data2vec", "attmask", "milan"]
)
def test_published_recipes_are_not_scolded(name: str) -> None:
    from cmt_mae.core.parsing import parse

    config = parse("test", PretrainConfig, [], load_recipes(name))
    images = 2000 if name == "demo" else 1_281_167
    assert check_settings(planned(config, images)) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"optim__blr": 8.0}, "learning rate too high"),
        ({"optim__blr": 1e-8}, "learning rate too low"),
        ({"optim__warmup_epochs": 600.0}, "warm-up too long"),
        ({"optim__weight_decay": 50.0}, "weight decay too high"),
        ({"mask__ratio": 0.05}, "mask ratio too low"),
        ({"student__img_size": [64], "mask__ratio": 0.984}, "mask ratio too high"),
        ({"data__mean": [123.0] * 3, "data__std": [58.0] * 3}, "normalisation wrong"),
        ({"epochs": 1}, "too few steps"),
    ],
)
def test_each_rule_of_settings(make: Make, changes: dict[str, Any], expected: str) -> None:
    settled = {"epochs": 1000, "optim__warmup_epochs": 50.0, "batch_size": 16} | changes
    config = make(**settled)
    assert expected in names(check_settings(planned(config, 40)))
    fine = make(epochs=1000, optim__warmup_epochs=50.0, batch_size=16)
    assert check_settings(planned(fine, 40)) == []


def test_normalisation_is_compared_with_the_images(make: Make) -> None:
    split = {
        "images": 5000,
        "height": [1, 1, 1],
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "shorter_side": [64] * 3,
    }
    right = planned(make(data__mean=[0.45] * 3, data__std=[0.22] * 3), 40)
    assert check_pixels(right, 64, split) == []
    wrong = planned(make(data__mean=[0.0] * 3, data__std=[0.02] * 3), 40)
    assert names(check_pixels(wrong, 64, split)) == ["normalisation wrong"]
    assert names(check_pixels(right, 64, {**split, "images": 64})) == ["too few images"]
    assert names(check_pixels(right, 64, {**split, "shorter_side": [8, 16, 40]})) == [
        "images smaller than the crop"
    ]


def test_a_batch_larger_than_the_data_is_a_finding_and_the_rest_is_told(make: Make) -> None:
    config = make(batch_size=64)
    words = {one.name: getattr(config, one.name) for one in dataclasses.fields(PretrainConfig)}
    report = doctor(DoctorConfig(**words, recipe="tiny"))
    assert "settings and images do not fit" in [one["what"] for one in report["findings"]]
    assert "estimate" not in report
    assert report["data"]["splits"]["train"]["images"] == 40


# --- teacher -------------------------------------------------------------------------------------


def test_embedded_teacher_is_right_and_random_weights_attend_to_nothing(
    make: Make, tmp_path: Path
) -> None:
    config = make(student__img_size=[64], student__patch_size=8, teacher__name="embedded")
    facts, found = check_teacher(config, None)
    assert found == []
    assert facts["known_features"]["recorded"]
    assert facts["known_features"]["largest_difference"] < 1e-4
    assert facts["activation"] == ["GELU"]
    facts, found = check_teacher(make(teacher__name=flat_teacher(tmp_path)), None)
    assert names(found) == ["teacher attends to nothing"]
    assert facts["attention_entropy"] > 0.99
    facts, found = check_teacher(make(teacher__name="no_such_model"), None)
    assert names(found) == ["the teacher cannot be loaded"]


def test_a_network_with_another_activation_is_refused_by_its_known_features(
    make: Make, tmp_path: Path
) -> None:
    """The same weights, written by a network with QuickGELU and rebuilt with GELU: only the features tell."""
    torch.manual_seed(0)
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **kwargs)
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.fc1.weight.mul_(30)
    for name in ("right", "wrong"):
        save_backbone(
            tmp_path / f"{name}.safetensors", model, architecture="vit_tiny_patch16_224", kwargs=kwargs,
            mean=(0.5,) * 3, std=(0.5,) * 3, img_size=32, licence="none", source="test",
        )  # fmt: skip
        for block in model.blocks:
            block.mlp.act = QuickGELU()
    right, _ = check_teacher(make(teacher__name=str(tmp_path / "right.safetensors")), None)
    assert right["known_features"]["largest_difference"] < 1e-4
    wrong, found = check_teacher(make(teacher__name=str(tmp_path / "wrong.safetensors")), None)
    assert names(found) == ["the teacher cannot be loaded"]
    assert "self-check failed" in wrong["error"]


def test_objects_say_whether_a_guided_mask_can_do_anything(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Random weights do not see objects; the report has chance's neighbours and one line.

    Of sample pictures, which a user's may be quite unlike, no finding is made.
    """
    write_coco(tmp_path / "objects", 1, 20)
    facts, found = check_aim(make(), None, str(tmp_path / "objects"))
    assert not facts["works"]
    assert names(found) == ["the mask does not see objects"]
    assert check_aim(make(), None, "sample")[1] == []
    assert abs(facts["maps"]["teacher"]["auc"] - 0.5) < 0.15
    assert facts["maps"]["a spot in the middle"]["auc"] > 0.5
    random_rule, found = check_aim(make(mask__rule="random"), None, "sample")
    assert (random_rule, found) == ({"verdict": "mask rule random is not guided"}, [])
    config = make("seen", student__img_size=[64], student__patch_size=8, teacher__name="embedded")
    words = {one.name: getattr(config, one.name) for one in dataclasses.fields(PretrainConfig)}
    report = doctor(DoctorConfig(**words, objects="sample", machine=False, estimate=False, recipe="x"))
    assert set(report["aim"]["maps"]) >= {"teacher", "a spot in the middle"}
    assert "guided mask" in capsys.readouterr().err


# --- estimate ------------------------------------------------------------------------------------


def size(images: int, seconds: float) -> Size:
    """A measured step."""
    return Size(images, seconds, seconds, seconds, 0.0, 2.0, 0.1)


def test_line_through_two_sizes_by_hand() -> None:
    sizes = [size(4, 1.0), size(8, 1.5)]
    assert at(sizes, 32, lambda one: one.seconds) == pytest.approx(1.5 + 24 * 0.125)
    assert at(sizes, 8, lambda one: one.seconds) == 1.5
    assert at(sizes[:1], 32, lambda one: one.seconds) == 8.0
    falling = [size(4, 2.0), size(8, 1.5)]
    assert at(falling, 32, lambda one: one.seconds) == 1.5, "noise makes no images cheaper"


def test_what_a_step_keeps_grows_with_its_images(make: Make) -> None:
    kept = {}
    for images in (2, 4):
        trainer, task = make_trainer(make(batch_size=images))
        crops = assembly.crop_settings(make(), task.frozen_networks.teacher)
        batches = synthetic_batches(crops, "sampled_high", task.plan.n_patches, images)
        trainer.enter(0)
        kept[images] = kept_gb(trainer, task, next(batches), 0)
    assert kept[4] == pytest.approx(2 * kept[2], rel=0.1)
    tokens, width = 5, 16  # 4 visible patches and the class token
    assert kept[2] * 1e9 > 2 * tokens * width * 4 * 10, "two blocks keep at least five tensors each"


def test_estimate_of_a_run_beside_the_run_itself(make: Make, tmp_path: Path) -> None:
    config = make("later", epochs=2, runtime__checkpoint_every=1.0)
    words = {one.name: getattr(config, one.name) for one in dataclasses.fields(PretrainConfig)}
    report = doctor(DoctorConfig(**words, seconds=2.0, recipe="tiny"))
    told = report["estimate"]
    assert (told["total_steps"], told["stage_one_steps"]) == (10, 5)
    assert {name: one["steps"] for name, one in told["stages"].items()} == {"one": 5, "two": 5}
    assert not any(one["extrapolated"] for one in told["stages"].values())
    assert [one.name for one in tmp_path.iterdir()] == [], "nothing is left behind"
    pretrain(config)
    (first, second) = sorted((Path(config.out) / "checkpoints").glob("*.pt"))
    assert second.stat().st_size / 1e9 == pytest.approx(told["checkpoint"]["gb"], rel=0.05)
    assert told["checkpoint"]["written"] == 2
    assert first.exists()


def test_a_step_too_large_to_measure_is_followed_along_a_line(make: Make) -> None:
    config = make(batch_size=512, epochs=1)
    facts = estimate(config, None, 5120, 0.2)
    stage = facts["stages"]["one"]
    assert stage["extrapolated"]
    assert stage["measured_images"][-1] < 512
    assert stage["step_seconds"] >= 0.99 * stage["measured_seconds"][-1]
    assert facts["total_steps"] == 10


# --- machine -------------------------------------------------------------------------------------


def test_machine_alone_by_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", "--device", "cpu"]) == 0
    report = json.loads(capsys.readouterr().out)
    facts = report["machine"]
    assert set(report) == {"machine", "findings", "problems", "summary"}
    assert facts["device"] == "cpu"
    assert facts["disk"]["free_gb"] > 0
    assert facts["versions"]["torch"] == torch.__version__.split("+")[0]
    assert main(["doctor", "--sample=-1"]) == 2


def test_container_limits_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    free = machine.usable_cores()
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert machine.usable_cores() == 0.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert machine.usable_cores() == free
    (tmp_path / "memory.max").write_text("1000000000\n")
    (tmp_path / "memory.current").write_text("250000000\n")
    assert machine.memory() == {"total_gb": 1.0, "free_gb": 0.75}


def test_a_disk_that_refuses_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(machine.tempfile, "NamedTemporaryFile", refuse)
    assert machine.disk(tmp_path)["error"] == "No space left on device"
    facts, _ = machine.check_machine("cpu", "fp32", str(tmp_path / "x" / "y"))
    assert facts["disk"]["folder"] == str(tmp_path)
    assert "the disk cannot be written" in names(machine.judge(facts))
    absent = "mps" if torch.cuda.is_available() else "cuda"
    with pytest.raises(InputError, match="is not available on this machine"):
        machine.check_machine(absent, "fp32", "")
