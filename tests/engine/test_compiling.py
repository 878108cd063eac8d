"""Compiled blocks compute what the blocks compute, and a machine without a compiler goes on."""

import copy
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Block

from cmt_mae.data.loader import CropSettings
from cmt_mae.engine import compiling
from cmt_mae.pretraining.assembly import build_learner
from cmt_mae.pretraining.settings import PretrainConfig
from cmt_mae.tools.bench.build import make_trainer, synthetic_batches

CPU = torch.device("cpu")


def run_settings(**more: Any) -> PretrainConfig:
    run = PretrainConfig(batch_size=4, **more)
    run.out = run.data.path = "x"
    run.student.preset, run.student.img_size, run.student.patch_size = "micro", [32], 8
    run.student.width, run.student.depth, run.student.heads = 64, 2, 2
    run.decoder.width, run.decoder.depth, run.decoder.heads = 32, 1, 2
    run.teacher.name = "embedded"
    run.runtime.device, run.precision = "cpu", "fp32"
    return run


def test_a_compiled_block_equals_the_block_gradients_included() -> None:
    torch.manual_seed(0)
    plain = Block(32, 4, qkv_bias=True)
    fast = copy.deepcopy(plain)

    class Network(torch.nn.Module):
        blocks = torch.nn.ModuleList([fast])

    assert compiling.compile_blocks([Network(), None]) == 1
    assert compiling.compile_blocks([Network()]) == 0
    results = []
    for block in (plain, fast):
        tokens = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
        tokens.requires_grad_()
        try:
            out = block(tokens)
        except Exception as error:
            reason = compiling.why_not(CPU)
            if not reason:
                raise
            pytest.skip(f"this machine cannot compile: {reason} ({type(error).__name__})")
        out.square().sum().backward()
        grads = [tokens.grad] + [p.grad for p in block.parameters()]
        results.append([out.detach(), *grads])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_compiling_keeps_names_and_copies_are_plain() -> None:
    learner = build_learner(run_settings(), None)
    names = list(learner.state_dict())
    assert compiling.compile_blocks([learner.student, learner.decoder], backend="eager") == 3
    assert list(learner.state_dict()) == names
    twin = copy.deepcopy(learner.student)
    assert all(block._compiled_call_impl is None for block in twin.blocks)  # type: ignore[union-attr]
    assert all(block._compiled_call_impl is not None for block in learner.student.blocks)


def test_steps_with_compiled_blocks_are_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both stages, with dynamo's own backend (inductor's arithmetic is in the test above), without recompiling
    over the blocks of a network or the steps."""
    monkeypatch.setattr(
        compiling, "compile_blocks", lambda nets, real=compiling.compile_blocks: real(nets, "eager")
    )
    monkeypatch.setattr(compiling, "why_not", lambda _: "")
    torch._dynamo.utils.counters.clear()
    states = []
    for compiled in (False, True):
        torch._dynamo.reset()
        run = run_settings()
        run.runtime.compile = compiled
        trainer, task = make_trainer(run)
        batches = synthetic_batches(CropSettings((32, 32)), run.mask.rule, 16, 4)
        for step in (0, 1, task.switch_step, task.switch_step + 1):
            if step in (0, task.switch_step):
                trainer.enter(step)
            trainer.step(batches, step)
        assert task.frozen_networks.momentum is not None
        done = [
            net.blocks[0]._compiled_call_impl
            for net in (task.learner.student, task.frozen_networks.momentum)
        ]  # type: ignore[index,union-attr]
        assert all((call is not None) == compiled for call in done)
        states.append({**task.learner.state_dict(), **task.frozen_networks.momentum.state_dict()})
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-5, atol=1e-6)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] <= 4  # student, decoder, teacher, momentum student
    assert not counters["graph_break"]


def test_inside_uncompiled_blocks_run_as_written() -> None:
    calls: list[int] = []

    def backend(graph: Any, _: Any) -> Any:
        calls.append(1)
        return graph.forward

    torch._dynamo.reset()
    block = Block(16, 2)
    block.compile(backend=backend)
    with compiling.uncompiled():
        block(torch.ones(1, 3, 16))
    assert not calls
    block(torch.ones(1, 3, 16))
    assert calls


def test_without_a_compiler_the_reason_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no working\n C++ compiler")

    monkeypatch.setattr(torch, "compile", broken)
    assert compiling.why_not(CPU) == "RuntimeError: no working C++ compiler"
    run = run_settings()
    run.runtime.compile = True
    trainer, task = make_trainer(run)
    trainer.enter(0)
    assert "C++" in trainer.no_compiler
    assert all(block._compiled_call_impl is None for block in task.learner.student.blocks)
