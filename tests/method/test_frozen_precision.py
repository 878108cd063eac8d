"""Teacher and momentum student run wholly in bf16, the moving average stays in fp32."""

import copy
from typing import Any

import pytest
import torch

from cmt_mae.data.loader import CropSettings
from cmt_mae.engine.trainer import Trainer
from cmt_mae.method import frozen
from cmt_mae.pretraining.settings import PretrainConfig
from cmt_mae.pretraining.task import Pretraining
from cmt_mae.tools.bench.build import make_trainer, synthetic_batches


def stage_two(frozen: str, precision: str = "fp32") -> tuple[Trainer, Pretraining]:
    run = PretrainConfig(batch_size=4, frozen_precision=frozen, precision=precision, out="x")
    run.data.path = "x"
    run.student.preset, run.student.img_size, run.student.patch_size = "micro", [32], 8
    run.decoder.width, run.decoder.depth, run.decoder.heads = 32, 1, 2
    run.teacher.name, run.runtime.device = "embedded", "cpu"
    trainer, task = make_trainer(run)
    trainer.enter(task.switch_step)
    return trainer, task


def batches() -> Any:
    return synthetic_batches(CropSettings((32, 32)), "sampled_high", 16, 4)


def guided(task: Pretraining) -> tuple[Any, dict[str, torch.Tensor]]:
    batch = next(batches())
    images, _ = task.to_device(batch)
    alphas, n_mask = task.alphas_at(task.switch_step), task.plan.n_mask
    with task.accelerator.autocast():
        mask, targets, _ = task.frozen_networks(images, batch["noise"], n_mask, alphas)
    return mask, targets


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_targets_are_near_those_of_fp32_and_the_stream_is_bf16(precision: str) -> None:
    (_, plain), (_, low) = stage_two("auto"), stage_two("bf16", precision)
    mask, wanted = guided(plain)
    seen: list[torch.dtype] = []
    assert low.frozen_networks.teacher is not None
    for network in (low.frozen_networks.teacher.model, low.frozen_networks.momentum_runs()):
        network.blocks[1].norm2.register_forward_hook(
            lambda _, args, out: seen.extend([args[0].dtype, out.dtype])
        )  # type: ignore[index,union-attr]
    real = frozen.sample_mask
    try:  # the same hidden patches, so that the targets can be compared
        frozen.sample_mask = lambda *_, **__: mask
        _, found = guided(low)
    finally:
        frozen.sample_mask = real
    assert seen == [torch.bfloat16] * 4
    for name, target in wanted.items():
        assert found[name].dtype == torch.float32  # the loss stays in fp32
        error = (found[name] - target).norm() / target.norm()
        assert 1e-4 < error < 0.05, (name, error)


def test_small_movements_of_the_average_are_not_lost() -> None:
    """With m = 0.9999 a bf16 average would never move: one step is less than half a unit of bf16."""
    _, task = stage_two("bf16")
    guides, student = task.frozen_networks, task.learner.student
    assert guides.momentum is not None
    start = copy.deepcopy(guides.momentum)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1)
    for _ in range(100):
        guides.update_momentum(student, 0.9999)
    moved = 0.1 * (1 - 0.9999**100)
    pairs = zip(guides.momentum.named_parameters(), start.parameters(), strict=True)
    for (name, now), before in pairs:
        assert now.dtype == torch.float32
        torch.testing.assert_close(
            now - before, torch.full_like(now, moved), rtol=1e-3, atol=2e-6, msg=name
        )
    for low, exact in zip(
        guides.momentum_runs().parameters(), guides.momentum.parameters(), strict=True
    ):
        assert low.dtype == torch.bfloat16
        assert torch.equal(low, exact.bfloat16())


def test_the_copy_is_right_after_a_resume() -> None:
    first, task = stage_two("bf16")
    step = task.switch_step
    source = batches()
    for number in range(2):
        first.step(source, step + number)
    state = copy.deepcopy(first.state_dict())
    assert all(v.dtype == torch.float32 for v in state["momentum"].values())
    second, _ = stage_two("bf16")
    second.load_state_dict(state)
    second.enter(step + 2)
    for trainer in (first, second):
        trainer.step(source, step + 2)
    one, other = first.state_dict(), second.state_dict()
    for part in ("learner", "momentum"):
        assert all(torch.equal(one[part][n], other[part][n]) for n in one[part])


def test_teachers_with_rotary_positions_run_in_bf16() -> None:
    run = PretrainConfig(batch_size=2, frozen_precision="bf16", precision="fp32", out="x")
    run.data.path = "x"
    run.student.preset, run.student.img_size = "micro", [64]
    run.teacher.name, run.runtime.device = "eva02_tiny_patch14_224.mim_in22k", "cpu"
    run.decoder.depth = 1
    trainer, _ = make_trainer(run)
    trainer.enter(0)
    source = synthetic_batches(CropSettings((64, 64)), run.mask.rule, 16, 2)
    trainer.step(source, 0)
    means, bad = trainer.meters.read()
    assert not bad
    assert 0.5 < means["loss"] < 3
