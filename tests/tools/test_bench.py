"""`bench` on a micro recipe, and what its numbers rest on."""

import json
import mmap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cmt_mae.core.cli import main
from cmt_mae.core.errors import InputError
from cmt_mae.core.parsing import parse
from cmt_mae.core.recipes import load_recipes
from cmt_mae.data.loader import CropSettings
from cmt_mae.pretraining.settings import PretrainConfig
from cmt_mae.tools.bench import measure
from cmt_mae.tools.bench.build import frozen_backbone, make_trainer, synthetic_batches
from cmt_mae.tools.bench.command import BenchConfig, bench
from cmt_mae.tools.bench.peak import peak_flops

SMALL = [
    "--student.img_size=[32]", "--student.depth=2", "--decoder.depth=1", "--teacher.name=embedded",
    "--images=4", "--rounds=2", "--steps=1",
]  # fmt: skip


def config(recipe: str = "cmt,micro64", *words: str) -> BenchConfig:
    made: BenchConfig = parse("test", BenchConfig, [*SMALL, *words], load_recipes(recipe))
    return made


def test_both_stages_of_a_micro_recipe(tmp_path: Path) -> None:
    content = bench(config("cmt,micro64", f"--out={tmp_path}", "--peak=measured"))
    assert json.loads((tmp_path / "bench.json").read_text()) == json.loads(
        json.dumps(content, default=str)
    )
    assert content["versions"]["torch"] == torch.__version__.split("+")[0]
    assert content["hardware"]["threads"] == torch.get_num_threads()
    assert content["images_per_step"] == 4
    assert content["data"] == "synthetic"
    assert "measured" in content["peak"]["how"]
    assert set(content["stages"]) == {"one", "two"}
    for name, stage in content["stages"].items():
        rate = stage["images_per_second"]
        assert 0 < rate["low"] <= rate["median"] <= rate["high"]
        assert stage["round_seconds"] == pytest.approx(
            [4 / r for r in (rate["low"], rate["high"])], rel=1e-6
        ) or stage["round_seconds"] == pytest.approx(
            [4 / r for r in (rate["high"], rate["low"])], rel=1e-6
        )
        flop = stage["gflop_per_image"] * 1e9
        assert stage["mfu"] == pytest.approx(rate["median"] * flop / content["peak"]["flops"])
        assert flop == pytest.approx(2e9 * sum(stage["gmac_by_part"].values()))
        assert stage["gflop_per_image_plain"] > stage["gflop_per_image"]
        assert stage["data_wait_share"] < 0.05
        assert 0.1 < stage["peak_memory_gb"] < 50
        shares = stage["shares"]
        assert tuple(shares) == measure.PARTS
        assert sum(shares.values()) == pytest.approx(1)
        used = {"teacher", "mask", "targets", "encoder", "decoder", "backward", "optimizer"}
        assert all(shares[part] > 0 for part in used)
        assert (
            shares["other"] < 0.9
        )  # a machine that is busy elsewhere stretches what is between the parts
        in_two = name == "two"
        assert (shares["momentum"] > 0) == in_two
        assert (shares["ema"] > 0) == in_two


def test_pixel_mae_has_one_stage_and_no_teacher(capsys: pytest.CaptureFixture[str]) -> None:
    content = bench(config("mae,micro64"))
    assert content["teacher"] is None
    (stage,) = content["stages"].values()
    assert stage["shares"]["teacher"] == stage["shares"]["momentum"] == 0
    shown = capsys.readouterr().err
    assert "images/s" in shown
    assert "backward" in shown
    assert "momentum" not in shown


def test_real_images_through_the_loader(tmp_path: Path) -> None:
    for number in range(6):
        picture = torch.randint(0, 256, (48, 64, 3), dtype=torch.uint8).numpy()
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
    words = (f"--data.path={tmp_path}", "--data.workers=0", "--stages=one")
    content = bench(config("cmt,micro64", *words))
    assert content["data"] == str(tmp_path)
    assert list(content["stages"]) == ["one"]
    assert content["stages"]["one"]["data_wait_share"] > 0
    with pytest.raises(InputError, match="6 images, fewer than a step of 7"):
        bench(config("cmt,micro64", *words, "--images=7"))


def test_the_command_takes_recipes_and_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "--recipe", "mae,micro64", "--json", *SMALL]
    assert main(words) == 0
    content = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert content["settings"]["images"] == 4
    assert content["stages"]["one"]["mfu"] > 0


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--rounds=0", "rounds is 0: give a whole number of 1 or more"),
        ("--stages=three", "stages is 'three': give one of both, one, two"),
        ("--peak=guess", "peak is 'guess': give one of auto, measured"),
        ("--alpha=2", "alpha is 2: give a number from 0 to 1"),
        ("--teacher.name=no_such_model", "no_such_model"),
    ],
)
def test_bad_settings_are_named_before_work_starts(word: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        bench(config("cmt,micro64", word))


def test_a_recipe_without_stage_two_says_so() -> None:
    with pytest.raises(InputError, match="no stage two"):
        bench(config("mae,micro64", "--stages=two"))


def test_watching_a_step_changes_neither_its_result_nor_its_modules() -> None:
    """The same two steps with and without clocks end with the same weights, and the clocks come off."""
    weights = []
    for watch in (False, True):
        run = run_settings()
        trainer, task = make_trainer(run)
        step = task.switch_step
        trainer.enter(step)
        batches = synthetic_batches(CropSettings((32, 32)), run.mask.rule, 16, 4)
        owners = (trainer, task, task.frozen_networks, measure.cmtmae, measure.frozen)
        untouched = [dict(vars(owner)) for owner in owners]
        if watch:
            # one step before it counts, and one that does
            measure.shares(trainer, batches, step, 1)
        else:
            for _ in range(2):
                trainer.step(batches, step)
        after = [dict(vars(owner)) for owner in owners]
        assert [set(d) for d in after] == [set(d) for d in untouched]
        assert after[0]["model"] is untouched[0]["model"]
        assert after[4]["sample_mask"] is untouched[4]["sample_mask"]
        weights.append(task.learner.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def run_settings(recipe: str = "cmt,micro64") -> PretrainConfig:
    run = config(recipe).run_settings()
    run.batch_size = 4
    return run


def test_spans_count_themselves_only() -> None:
    spans = measure.Spans(torch.device("cpu"))
    with spans.span("outer"):
        time.sleep(0.02)
        with spans.span("inner"):
            time.sleep(0.05)
        time.sleep(0.02)
    assert spans.seconds["inner"] == pytest.approx(0.05, abs=0.03)
    assert spans.seconds["outer"] == pytest.approx(0.04, abs=0.03)
    assert spans.seconds["outer"] < 0.08


def test_a_teacher_that_would_be_downloaded_is_random_but_has_its_shape() -> None:
    run = run_settings("cmt")
    run.teacher.name = "vit_xsmall_patch16_clip_224.tinyclip_yfcc15m"
    run.student.img_size = [64]
    backbone = frozen_backbone(run)
    model: Any = backbone.model
    assert "random weights" in backbone.source
    assert backbone.proj is not None
    assert backbone.proj.shape == (512, 256)
    assert backbone.img_size == (64, 64)
    assert len(model.blocks) == 10
    again = frozen_backbone(run)
    assert again.digest == backbone.digest  # drawn from the seed


def test_the_peak_of_memory_starts_anew() -> None:
    device = torch.device("cpu")
    if not measure.forget_peak(device):
        pytest.skip("this system does not let a process forget its peak of memory")
    before = measure.peak_gb(device)
    # a mapping of its own: what is freed by malloc may stay with the process (training/memory.py)
    with mmap.mmap(-1, 400_000_000) as block:
        block.write(bytes(1) * len(block))
        high = measure.peak_gb(device)
    assert high - before >= 0.35
    measure.forget_peak(device)
    assert measure.peak_gb(device) < high - 0.3


def test_a_known_gpu_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    found = peak_flops(torch.device("cuda"), "bf16")
    assert found["flops"] == 989e12
    assert "data sheet of H100" in found["how"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 PCIe")
    assert peak_flops(torch.device("cuda"), "bf16")["flops"] == 756e12
