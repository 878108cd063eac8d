"""`bench` on a micro recipe, and what its numbers rest on."""

import json
import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.steps import our_trainer, settings
from PIL import Image

from cmt_mae.core.cli import main
from cmt_mae.core.errors import InputError
from cmt_mae.core.parsing import parse
from cmt_mae.core.recipes import load_recipes
from cmt_mae.pretraining.settings import PretrainConfig
from cmt_mae.tools.bench import measure
from cmt_mae.tools.bench.build import frozen_backbone
from cmt_mae.tools.bench.command import BenchConfig, bench
from cmt_mae.tools.bench.flops import flop_per_image
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
    for stage in content["stages"].values():
        rate = stage["images_per_second"]
        assert 0 < rate["low"] <= rate["median"] <= rate["high"]
        assert stage["round_seconds"] == pytest.approx(
            [4 / r for r in (rate["low"], rate["high"])], rel=1e-6
        ) or stage["round_seconds"] == pytest.approx(
            [4 / r for r in (rate["high"], rate["low"])], rel=1e-6
        )
        flop = stage["gflop_per_image"] * 1e9
        assert stage["mfu"] == pytest.approx(rate["median"] * flop / content["peak"]["flops"])
        assert stage["data_wait_share"] < 0.05
        assert 0.1 < stage["peak_memory_gb"] < 50


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


def test_the_command_prints_json_and_pixel_mae_has_one_stage_and_no_teacher(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["bench", "--recipe", "mae,micro64", "--json", *SMALL]) == 0
    printed = capsys.readouterr()
    content = json.loads(printed.out.splitlines()[-1])
    assert (content["settings"]["images"], content["teacher"]) == (4, None)
    (stage,) = content["stages"].values()
    assert stage["mfu"] > 0
    assert stage["gflop_per_image"] > 0
    assert "images/s" in printed.err


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--rounds=0", "rounds is 0: give a whole number of 1 or more"),
        ("--teacher.name=no_such_model", "no_such_model"),
    ],
)
def test_bad_settings_are_named_before_work_starts(word: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        bench(config("cmt,micro64", word))


def test_a_recipe_without_stage_two_says_so() -> None:
    with pytest.raises(InputError, match="no stage two"):
        bench(config("mae,micro64", "--stages=two"))


def run_settings(recipe: str = "cmt,micro64") -> PretrainConfig:
    run = config(recipe).run_settings()
    run.batch_size = 4
    return run


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


def test_counting_changes_nothing() -> None:
    """Of a run in stage one the momentum student of stage two is counted, and is not made by that."""
    trainer, task, batches, step = our_trainer(settings("two", "micro"), "one")
    trainer.step(batches, step)
    before = {name: value.clone() for name, value in task.learner.state_dict().items()}
    drawn = torch.get_rng_state()
    networks = (task.learner, task.frozen_networks)
    flop = [
        sum(flop_per_image(*networks, task.alphas_at(at), task.plan.n_mask).values())
        for at in (0, task.switch_step)
    ]
    assert 0 < flop[0] < flop[1]
    assert task.frozen_networks.momentum is None
    assert torch.equal(torch.get_rng_state(), drawn)
    after = task.learner.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    trainer.step(batches, step)
