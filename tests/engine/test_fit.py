"""The loop of the training evaluations: exact resume after real signals and kills, skipped steps, processes."""

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from fit_toy import BATCH, STEPS_PER_EPOCH, Net, toy

from cmt_mae.core.checkpoint import list_checkpoints, load_checkpoint
from cmt_mae.core.errors import InputError, Stopped
from cmt_mae.engine.supervised import follow
from cmt_mae.engine.task import micro_batches
from programs import start

TIMED = ("images_per_second", "data_wait_share", "peak_memory_gb")


def program(out: Path, processes: int = 1, **options: Any) -> "subprocess.CompletedProcess[str]":
    return start(Path(__file__).with_name("fit_toy.py"), str(out), json.dumps(options), processes=processes)


def rows(run: Path) -> list[dict[str, Any]]:
    read = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMED} for row in read]


def state(run: Path) -> dict[str, Any]:
    """Of the newest checkpoint all but whose it is (run, settings)."""
    kept = load_checkpoint(list_checkpoints(run / "checkpoints")[-1])
    return {name: part for name, part in kept.items() if name not in ("run", "settings")}


def assert_same(one: Path, two: Path) -> None:
    first, second = state(one), state(two)

    def compare(a: Any, b: Any, where: str) -> None:
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b), where
        elif isinstance(a, dict):
            assert a.keys() == b.keys(), where
            for key in a:
                compare(a[key], b[key], f"{where}/{key}")
        elif isinstance(a, list):
            assert len(a) == len(b), where
            for number, pair in enumerate(zip(a, b, strict=True)):
                compare(*pair, f"{where}/{number}")
        else:
            assert a == b, where

    compare(first, second, "")
    assert rows(one) == rows(two)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fit") / "whole"
    evaluation, _, _ = toy(out, average=True)
    assert evaluation.details == {"step": 20}
    return out


def test_it_learns_and_logs_every_step_once(undisturbed: Path) -> None:
    found = rows(undisturbed)
    logged = [r["step"] for r in found if "loss" in r]
    assert logged == list(range(2, 21, 2))
    assert [r["step"] for r in found if "val_score" in r] == [5, 10, 15, 20]
    losses = [r["loss_toy"] for r in found if "loss" in r]
    assert losses[-1] < 0.5 * losses[0]
    assert (undisturbed / "checkpoints" / "best.pt").exists()


@pytest.mark.parametrize("at", [0, 3, 7, 19])
def test_a_signal_writes_a_checkpoint_and_the_next_start_ends_the_same(
    undisturbed: Path, tmp_path: Path, at: int
) -> None:
    with pytest.raises(Stopped, match=f"step {at + 1} of 20"):
        toy(tmp_path / "r", average=True, signal_at=(signal.SIGTERM, at))
    toy(tmp_path / "r", average=True)  # after the last step: it is still to be evaluated
    assert_same(tmp_path / "r", undisturbed)


@pytest.mark.parametrize("trouble", [{"signal_at": [9, 8]}, {"signal_in_evaluation": 10}])
def test_a_kill_loses_nothing(undisturbed: Path, tmp_path: Path, trouble: dict[str, Any]) -> None:
    killed = program(tmp_path / "r", average=True, **trouble)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    if "signal_in_evaluation" in trouble:  # as if it came between the evaluation and its checkpoint
        with open(tmp_path / "r" / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": 10, "val_score": 0.0}) + "\n")
    toy(tmp_path / "r", average=True)
    assert_same(tmp_path / "r", undisturbed)


def test_a_finished_run_is_not_trained_or_evaluated_again(undisturbed: Path) -> None:
    before = rows(undisturbed)
    evaluation, _, _ = toy(undisturbed, average=True, signal_in_evaluation=20)  # would kill us
    assert evaluation.details == {"step": 20}
    assert rows(undisturbed) == before


def test_another_backbone_or_changed_settings_are_refused(undisturbed: Path) -> None:
    with pytest.raises(InputError, match="another backbone"):
        toy(undisturbed, average=True, digest="b")
    with pytest.raises(InputError, match="seed: 0 -> 3"):
        toy(undisturbed, average=True, seed=3)


def test_accumulated_micro_batches_give_the_step_of_the_whole_batch(tmp_path: Path) -> None:
    plain = {"dropout": 0.0, "norm": False, "epochs": 1}
    _, whole, _ = toy(tmp_path / "a", **plain)
    _, parts, _ = toy(tmp_path / "b", micro=2, **plain)
    for p, q in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


def test_two_processes_train_and_log_as_one(tmp_path: Path) -> None:
    plain = {"dropout": 0.0, "norm": False, "epochs": 2}
    toy(tmp_path / "one", **plain)
    done = program(tmp_path / "two", processes=2, **plain)
    assert done.returncode == 0, done.stderr
    one, two = state(tmp_path / "one"), state(tmp_path / "two")
    for name, value in one["model"].items():
        torch.testing.assert_close(value, two["model"][name], atol=1e-5, rtol=1e-4)
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert a["step"] == b["step"]
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), rel=1e-4)


def test_all_processes_evaluate_with_the_same_batch_statistics(tmp_path: Path) -> None:
    statistics = str(tmp_path / "mean")
    done = program(tmp_path / "two", processes=2, epochs=1, statistics=statistics)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(f"{statistics}{rank}.pt") for rank in range(2))
    assert torch.equal(first, second)
    assert torch.equal(state(tmp_path / "two")["model"]["body.1.running_mean"], first)


def test_a_step_that_is_not_finite_is_skipped_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, task, _ = toy(tmp_path / "r", epochs=1, nan_at=(4,))
    kept = load_checkpoint(tmp_path / "r" / "checkpoints" / "best.pt")
    assert all(v.isfinite().all() for v in task.model.state_dict().values())  # batch statistics too
    assert sum(r.get("skipped_steps", 0) for r in rows(tmp_path / "r")) == 1
    assert "1 step(s) up to step 5 skipped, not finite: first loss at step 5" in capsys.readouterr().err
    assert kept["nonfinite_row"] == 1


def test_too_many_such_steps_stop_the_run_with_a_good_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="lower the learning rate"):
        toy(tmp_path / "r", nan_at=tuple(range(6, 20)), max_nonfinite=4)
    assert all(v.isfinite().all() for v in state(tmp_path / "r")["model"].values())


def test_the_scale_of_a_group_multiplies_the_rate(tmp_path: Path) -> None:
    _, task, _ = toy(tmp_path / "r", epochs=1, lr_scale=0.25)
    assert task.optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * STEPS_PER_EPOCH * 0.25)


def test_running_average_by_hand() -> None:
    average, model = Net(0.0), Net(0.0)
    for p in average.parameters():
        p.data.fill_(2.0)
    for p in model.parameters():
        p.data.fill_(4.0)
    model.body[1].running_mean.fill_(7.0)  # type: ignore[union-attr, operator]
    follow(average, model, 0.75)
    assert all((p == 2.5).all() for p in average.parameters())
    assert (average.body[1].running_mean == 7.0).all()  # type: ignore[union-attr, operator]


def test_batches_that_cannot_be_split_are_refused() -> None:
    assert micro_batches(BATCH, 0, 2) == (4, 1)
    assert micro_batches(BATCH, 2, 2) == (2, 2)
    assert micro_batches(BATCH, 100, 1) == (8, 1)
    for wrong in ((8, 0, 3), (8, 3, 1), (1, 0, 2)):
        with pytest.raises(InputError, match="cannot be split"):
            micro_batches(*wrong)
