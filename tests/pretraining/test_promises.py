"""What a run promises beside its loop: nothing lost, nobody's functions mixed up, longer runs, lost readers."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cmt_mae.core.checkpoint import load_last
from cmt_mae.core.errors import InputError
from cmt_mae.engine.optim import learning_rate, momentum
from cmt_mae.engine.progress import Forecast
from cmt_mae.tools.pretrain import pretrain
from tiny import Make, as_words, assert_same_state, final_state, rows, start, write_teacher


def test_a_run_whose_checkpoints_are_gone_is_not_trained_anew(make: Make) -> None:
    config = make()
    pretrain(config)
    run = Path(config.out)
    before = {p: p.read_bytes() for p in (run / "metrics.jsonl", run / "backbone.safetensors")}
    settings = (run / "config.yaml").read_text()
    shutil.rmtree(run / "checkpoints")
    for seed in (0, 1):  # with other settings too
        config.seed = seed
        with pytest.raises(InputError, match=r"whose checkpoints are gone.*backbone\.safetensors"):
            pretrain(config)
    assert all(p.read_bytes() == content for p, content in before.items())
    assert (run / "config.yaml").read_text() == settings


def test_a_missing_run_json_is_told(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    config = make()
    pretrain(config)
    (Path(config.out) / "run.json").unlink()
    pretrain(config)
    assert "warning: " in (told := capsys.readouterr().err)
    assert "run.json is missing: data and teacher are not compared" in told


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(make: Make) -> None:
    config = make(runtime__checkpoint_every=100.0, epochs=60.0)
    process = start(["pretrain", *as_words(config)])
    run = Path(config.out)
    while process.poll() is None and not (run / "metrics.jsonl").exists():
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert rows(run)
    config.epochs = 2.0
    assert pretrain(config)["step"] == 10


def test_another_teacher_at_the_same_path_is_refused(make: Make, tmp_path: Path) -> None:
    own = write_teacher(tmp_path / "own.safetensors", noise=0.0)
    config = make(teacher__name=str(own))
    pretrain(config)
    write_teacher(own, noise=0.1)
    with pytest.raises(InputError, match="started with another teacher"):
        pretrain(config)


def test_a_finished_run_is_extended_exactly(make: Make) -> None:
    """Ten steps, then ten more with a warm-up and cosine of their own, stopped in between or not."""
    config = make("whole")
    pretrain(config)
    shutil.copytree(config.out, Path(config.out).with_name("broken"))
    longer = make("whole", epochs=4.0)
    with pytest.raises(InputError, match=r"finished its 2 epochs: --extend .* --init_from"):
        pretrain(longer)
    longer.runtime.extend = True
    pretrain(longer)
    added = rows(Path(config.out))[10:]
    assert [row["step"] for row in added] == list(range(11, 21))
    assert all(row["stage"] == 2 for row in added)
    peak = config.optim.blr * 8 / 256
    for row in added:
        at = learning_rate((row["step"] - 1) / 5 - 2, peak, 0.2, 2.0)
        assert row["lr"] == pytest.approx(at)
    state = load_last(Path(config.out) / "checkpoints")
    assert state is not None
    assert state["settings"]["extended"] == [2.0]
    broken = make("broken", epochs=4.0, runtime__extend=True)
    process = start(["pretrain", *as_words(broken)])
    while process.poll() is None and len(rows(Path(broken.out))) < 13:
        time.sleep(0.002)
    process.terminate()
    process.wait()
    pretrain(broken)
    assert_same_state(Path(longer.out), Path(broken.out))
    assert momentum(0.0, 0.996, 1.0) == 0.996  # the moving average begins anew as well


def nearest(scores: Tensor | None, noise: Tensor, grid: tuple[int, int]) -> Tensor:
    """Hide what is least attended, ties by chance."""
    assert scores is not None
    assert noise.shape == scores.shape == (len(scores), grid[0] * grid[1])
    return -scores + 1e-6 * noise


def brightness(images: Tensor) -> Tensor:
    """Mean of each patch of 8 x 8 and its negative."""
    means = torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), 8).flatten(2).transpose(1, 2)
    return torch.cat([means, -means], 2)


def test_a_mask_rule_of_ones_own_is_used_recorded_and_wanted_again(make: Make) -> None:
    named = make("named", mask__rule="low")
    own = make("own", mask__rule="low")
    pretrain(named)
    pretrain(own, mask_rule=nearest)
    for a, b in zip(rows(Path(named.out)), rows(Path(own.out)), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)  # "low" hides the same patches
    facts = json.loads((Path(own.out) / "run.json").read_text())
    assert facts["functions"]["mask_rule"].startswith("nearest ")
    with pytest.raises(InputError, match=r"mask_rule nearest .*, now it is by name"):
        pretrain(own)
    with pytest.raises(InputError, match="now it is nearest"):
        pretrain(named, mask_rule=nearest)
    pretrain(own, mask_rule=nearest)


def test_a_target_of_ones_own(make: Make) -> None:
    config = make(target__source="pixel", mask__rule="random", target__norm="none")
    pretrain(config, target=brightness)
    assert final_state(Path(config.out))["/learner/heads.pixel.weight"].shape[0] == 2
    assert all("loss_pixel" in row for row in rows(Path(config.out)))
    with pytest.raises(InputError, match=r"set target\.source collab to pixel"):
        pretrain(make("other"), target=brightness)
    wrong = make("wrong", target__source="pixel", mask__rule="random")
    with pytest.raises(InputError, match=r"it must give \(1, 16, channels\)"):
        pretrain(wrong, target=lambda images: images)


@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_is_a_request_to_stop_unless_ignored(make: Make, ignored: bool) -> None:
    """SIGHUP, and stderr whose reader is gone: a finished run exits 0, a stopped one 75, its loader with it."""
    config = make(epochs=8.0 if ignored else 200.0, data__workers=1)
    words = [sys.executable, "-m", "cmt_mae", "pretrain", *as_words(config)]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.close()  # before the first line
    run = Path(config.out)
    while process.poll() is None and not (run / "metrics.jsonl").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=120) == (0 if ignored else 75)
    step = final_state(run)["/step"]
    assert step == rows(run)[-1]["step"]
    assert (step == 40) == ignored


def test_more_than_a_day_on_a_cpu_is_refused_before_it_starts(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make()
    monkeypatch.setattr("cmt_mae.tools.pretrain.SURELY_A_DAY_LESS", 0.0)
    monkeypatch.setattr("cmt_mae.tools.hooks.peak_flops", lambda *_: {"flops": 1.0})
    with pytest.raises(InputError, match=r"about .* days: take a recipe of a smaller scale.*--yes"):
        pretrain(config)
    assert not Path(config.out).exists()
    config.runtime.yes = True
    assert pretrain(config)["step"] == 10


def test_the_end_is_told_once_after_a_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("cmt_mae.engine.progress.time.perf_counter", lambda: now[0])
    forecast, said = Forecast(0, 1000), []
    for step in range(1, 30):
        now[0] += 30.0 if step == 1 else 2.0  # the first step is slow
        said.append(forecast.text(step))
    (text,) = filter(None, said)
    assert text.startswith("995 steps to go at 2 s each: about 33 min, until ")


def test_without_a_terminal_a_line_tells_how_far_it_is(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cmt_mae.engine.progress.LINE_SECONDS", 0.0)
    pretrain(make(runtime__progress=True))
    said = capsys.readouterr().err
    assert "stage 2 epoch 2.0/2 loss" in said
    assert " of 10" in said, "how far, of how many steps"
