"""The loop: two stages, what is written, resume, kills, signals, processes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file

from cmt_mae.core.checkpoint import load_last
from cmt_mae.core.errors import InputError, Stopped
from cmt_mae.engine.trainer import Trainer
from cmt_mae.pretraining.assembly import IMAGENET, Statistics
from cmt_mae.pretraining.task import Pretraining
from cmt_mae.tools.pretrain import pretrain
from tiny import EVERY, Make, as_words, assert_same_state, final_state, rows, start, tiny_run

TIMES = ("images_per_second", "data_wait_share", "peak_memory_gb")


def comparable(run: Path) -> list[dict[str, float]]:
    """Metrics without what depends on the clock."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows(run)]


def test_two_stages_write_a_whole_run_directory(cmt_run: Path) -> None:
    metrics = rows(cmt_run)
    assert [row["step"] for row in metrics] == list(range(1, 11))
    assert [row["stage"] for row in metrics] == [1] * 5 + [2] * 5
    assert all("loss_momentum" not in row for row in metrics[:5])
    for row in metrics[5:]:
        both = 0.3 * row["loss_momentum"] + 0.7 * row["loss_teacher"]
        assert row["loss"] == pytest.approx(both, rel=1e-5)
        assert {"overlap", "entropy_teacher", "entropy_momentum", "entropy_collab"} <= row.keys()
    assert yaml.safe_load((cmt_run / "config.yaml").read_text())["alpha"] == 0.3
    facts = json.loads((cmt_run / "run.json").read_text())
    assert facts["data"]["images"] == 40
    assert facts["teacher"]["licence"] == "none"
    pictures = {p.name for p in (cmt_run / "pictures").iterdir()}
    assert pictures == {"attention_step_00000005.png", "attention_step_00000010.png"}
    assert list((cmt_run / "tensorboard").iterdir())
    state = load_last(cmt_run / "checkpoints")
    assert state is not None
    assert (state["run"], state["settings"]["mask"]["ratio"]) == ("cmt", 0.75)  # whose it is


def test_backbone_loads_in_bare_timm_with_the_students_weights(make: Make, cmt_run: Path) -> None:
    name, kwargs = make().student.architecture()
    model = timm.create_model(name, num_classes=0, **kwargs)
    model.load_state_dict(load_file(cmt_run / "backbone.safetensors"), strict=True)
    state = final_state(cmt_run)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[f"/learner/student.{key}"])
    average = load_file(cmt_run / "backbone_momentum.safetensors")
    assert not torch.equal(average["blocks.0.attn.qkv.weight"], model.blocks[0].attn.qkv.weight)


def test_momentum_student_and_its_head_start_at_the_switch(make: Make) -> None:
    """With m = 1 the momentum student stays what it was at the switch; its head did not learn before."""
    config = make(momentum__start=1.0, momentum__schedule="constant", runtime__checkpoint_every=0.2,
                  runtime__keep_last=20)  # fmt: skip
    pretrain(config)
    folder = Path(config.out) / "checkpoints"
    first, switch, next_, end = (
        torch.load(folder / f"step_{step:08d}.pt", weights_only=True) for step in (1, 5, 6, 10)
    )
    assert switch["momentum"] is None
    for key, value in end["momentum"].items():
        assert torch.equal(value, switch["learner"][f"student.{key}"])
    heads = [state["learner"]["heads.momentum.weight"] for state in (first, switch, next_)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[1], heads[2])  # the learning rate is not 0 there


@pytest.fixture(scope="module")
def whole_runs(
    images: Path, teacher_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[bool], Path]:
    """Unbroken runs with accumulation, and with or without what is off by default; a window of meters is open
    at most steps."""
    done: dict[bool, Path] = {}

    def whole(every: bool) -> Path:
        if every not in done:
            done[every] = tmp_path_factory.mktemp("whole") / f"run_{every}"
            pretrain(tiny_run(done[every], images, teacher_file, **ODD, **(EVERY if every else {})))
        return done[every]

    return whole


ODD = {"student__drop_path": 0.2, "runtime__log_every": 4, "runtime__micro_batch": 4}


@pytest.mark.parametrize(("stop_at", "every"), [(1, False), (5, False), (9, False), (3, True), (6, True)])
def test_a_stopped_run_continues_bit_for_bit(
    make: Make, whole_runs: Callable[[bool], Path], stop_at: int, every: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    broken = make("broken", **ODD, **(EVERY if every else {}))
    real = Trainer.step

    def interrupted(self: Trainer, batches: object, step: int) -> None:
        real(self, batches, step)  # type: ignore[arg-type]
        if step + 1 == stop_at:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Trainer, "step", interrupted)
    with pytest.raises(Stopped, match=f"step {stop_at} of 10"):
        pretrain(broken)
    monkeypatch.undo()
    pretrain(broken)
    assert_same_state(whole_runs(every), Path(broken.out))
    assert comparable(whole_runs(every)) == comparable(Path(broken.out))


def test_kill_9_at_any_moment_changes_nothing(make: Make) -> None:
    changes = {"epochs": 6.0, "runtime__checkpoint_every": 0.4}
    whole, killed = make("whole", **changes), make("killed", **changes)
    pretrain(whole)
    run, kills = Path(killed.out), 0
    # 30 steps, the switch at 15: killed early in stage one, about the switch, and in stage two
    for at_least in (3, 15, 24):
        process = start(["pretrain", *as_words(killed)])
        while process.poll() is None:
            if (run / "metrics.jsonl").exists() and len(rows_if_whole(run)) >= at_least:
                process.kill()
                break
            time.sleep(0.002)
        process.wait(timeout=60)
        kills += process.returncode == -signal.SIGKILL
    assert kills >= 2, "the run ended before it could be killed"
    pretrain(killed)
    assert_same_state(Path(whole.out), run)
    assert comparable(Path(whole.out)) == comparable(run)
    assert not list((run / "checkpoints").glob("*.tmp*")) or kills


def rows_if_whole(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text().splitlines()


def test_a_run_in_use_is_refused_and_a_sigterm_checkpoints_and_exits_75(make: Make) -> None:
    config = make(epochs=400.0)
    process = start(["pretrain", *as_words(config)])
    run = Path(config.out)
    while process.poll() is None and not (run / "metrics.jsonl").exists():
        time.sleep(0.01)
    try:
        with pytest.raises(InputError, match=f"in use by pid {process.pid} on"):
            pretrain(config)
    finally:
        process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "run the same command to continue" in errors.splitlines()[-1]
    assert final_state(run)["/step"] == rows(run)[-1]["step"]


def test_two_processes_equal_one(make: Make) -> None:
    """Under torchrun, with every setting on that looks at other images or at the whole batch."""
    whole_batch = {"epochs": 3.0, "target__centre": True, "mask__other_image": True}
    one, two = make("one", **whole_batch), make("two", **whole_batch)
    pretrain(one)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "cmt_mae"]
    done = subprocess.run(
        [sys.executable, *torchrun, "pretrain", *as_words(two)], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = rows(Path(one.out)), rows(Path(two.out))
    assert len(first) == len(second) == 15
    for a, b in zip(first, second, strict=True):
        for name in ("loss", "loss_teacher", "loss_momentum", "gradient_norm", "overlap"):
            assert (name in a) == (name in b)
            if name in a:
                assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), (a["step"], name)
    student_one = load_file(Path(one.out) / "backbone.safetensors")
    student_two = load_file(Path(two.out) / "backbone.safetensors")
    for key, value in student_one.items():
        other = student_two[key]
        # the keys' bias has no effect, so Adam blows up its rounding errors
        if key.endswith("qkv.bias"):
            value, other = (torch.cat([t[:16], t[32:]]) for t in (value, other))
        torch.testing.assert_close(value, other, rtol=1e-3, atol=1e-4)


def test_a_finished_run_does_nothing_more_and_changed_settings_are_refused(make: Make) -> None:
    config = make()
    pretrain(config)
    before = (Path(config.out) / "metrics.jsonl").read_text()
    config.mask.ratio, config.runtime.log_every = 0.5, 7
    with pytest.raises(InputError, match=r"mask\.ratio: 0\.75 -> 0\.5") as error:
        pretrain(config)
    assert "log_every" not in str(error.value)
    config.mask.ratio = 0.75
    assert pretrain(config)["step"] == 10  # settings of the runtime may change
    assert (Path(config.out) / "metrics.jsonl").read_text() == before


def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, hurt = make("whole"), make("hurt", runtime__checkpoint_every=0.8)
    pretrain(whole)
    pretrain(hurt)
    newest = sorted((Path(hurt.out) / "checkpoints").glob("step_*.pt"))[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    pretrain(hurt)
    assert "damaged" in capsys.readouterr().err
    assert_same_state(Path(whole.out), Path(hurt.out))


def test_init_from_a_run_takes_student_decoder_and_heads(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    first = make("first", mask__source="teacher", target__source="teacher")
    pretrain(first)
    second = make("second", mask__source="teacher", target__source="teacher", init_from=first.out)
    trained = torch.load(
        sorted((Path(first.out) / "checkpoints").glob("*.pt"))[-1], weights_only=True
    )
    learner = started(second)
    for key, value in trained["learner"].items():
        assert torch.equal(learner[key], value), key
    assert "was trained on images with mean" not in capsys.readouterr().err
    half = ((0.5,) * 3, (0.5,) * 3)
    started(second, half)
    assert "was trained on images with mean [0.485, 0.456, 0.406]" in capsys.readouterr().err
    # a stage-one run has no head for the momentum student: only the student is taken over
    third = make("third", init_from=first.out, stage1_epochs=0.0)
    learner = started(third)
    assert torch.equal(learner["student.norm.weight"], trained["learner"]["student.norm.weight"])
    assert not torch.equal(
        learner["decoder.embed.weight"], trained["learner"]["decoder.embed.weight"]
    )
    assert "was trained on images with mean" not in capsys.readouterr().err
    started(third, half)
    assert "was trained on images with mean [0.485, 0.456, 0.406]" in capsys.readouterr().err


def started(config: object, seen: Statistics = IMAGENET) -> dict[str, torch.Tensor]:
    from cmt_mae.pretraining import assembly

    stats = assembly.IMAGENET
    teacher, _ = assembly.build_teacher(config, stats)  # type: ignore[arg-type]
    return assembly.build_learner(config, teacher, stats=seen).state_dict()  # type: ignore[arg-type]


def test_online_knn_is_logged_and_the_best_checkpoint_kept(make: Make, images: Path) -> None:
    config = make(runtime__probe_data=str(images), runtime__probe_every=1.0)
    pretrain(config)
    measured = [row for row in rows(Path(config.out)) if "knn_top1" in row]
    assert [row["step"] for row in measured] == [0, 5, 10]  # 0: the untrained student
    assert all(0 <= row["knn_top1"] <= 100 for row in measured)
    best = torch.load(Path(config.out) / "checkpoints" / "best.pt", weights_only=True)
    top = max(measured[1:], key=lambda row: row["knn_top1"])
    assert best["step"] == top["step"]


def test_a_nonfinite_loss_skips_the_step_and_is_named(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make(runtime__max_nonfinite=3)
    real = Pretraining.to_device

    def poisoned(self: Pretraining, batch: object) -> object:
        images, second = real(self, batch)  # type: ignore[arg-type]
        return images * float("nan"), second

    monkeypatch.setattr(Pretraining, "to_device", poisoned)
    tasks: list[Pretraining] = []
    begin = Pretraining.begin
    monkeypatch.setattr(
        Pretraining, "begin", lambda self, *a: (tasks.append(self), begin(self, *a))[1]
    )
    with pytest.raises(InputError, match="3 steps in a row up to step 3"):
        pretrain(config)
    assert "not finite" in capsys.readouterr().err
    kept = [json.loads(t) for t in (Path(config.out) / "warnings.jsonl").read_text().splitlines()]
    assert [line["step"] for line in kept] == [1, 2, 3, 3]
    assert "1 step(s) up to step 1 skipped, not finite: first image at step 1" in kept[0]["text"]
    assert kept[-1]["text"].startswith("the run ended: 3 steps in a row up to step 3")
    for name, value in tasks[0].learner.named_parameters():
        assert torch.isfinite(value).all(), name
