"""AdamW's groups against timm's rule, and its step against the equations written out."""

import copy
from typing import Any

import pytest
import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from cmt_mae.engine.optim import adamw, decay_groups
from cmt_mae.method.cmtmae import StudentWithDecoder, TargetConfig
from cmt_mae.method.decoder import DecoderConfig
from cmt_mae.method.vit import StudentConfig, build_student


def learner(pos_embed: str = "sincos") -> StudentWithDecoder:
    torch.manual_seed(0)
    student = build_student(
        StudentConfig(img_size=[16], patch_size=8, width=16, depth=1, heads=2, pos_embed=pos_embed)
    )
    config = DecoderConfig(width=8, depth=1, heads=2)
    return StudentWithDecoder(student, config, TargetConfig(), {"teacher": 8, "momentum": 16})


def names(module: nn.Module, groups: list[dict[str, Any]], decay: float) -> set[str]:
    """Of the parameters with this weight decay."""
    by_id = {id(p): name for name, p in module.named_parameters()}
    return {by_id[id(p)] for g in groups if g["weight_decay"] == decay for p in g["params"]}


@pytest.mark.parametrize("pos_embed", ["sincos", "learned"])
def test_groups_are_timms_as_mae_calls_it(pos_embed: str) -> None:
    model = learner(pos_embed)
    ours, theirs = decay_groups(model, 0.05), param_groups_weight_decay(model, 0.05)
    for decay in (0.05, 0.0):
        assert names(model, ours, decay) == names(model, theirs, decay)
    decayed = names(model, ours, 0.05)
    assert {"student.cls_token", "decoder.mask_token"} <= decayed
    assert ("student.pos_embed" in decayed) == (pos_embed == "learned")
    assert "student.norm.weight" in names(model, ours, 0.0)


def test_heads_that_learn_later_are_in_the_groups_from_the_start() -> None:
    model = learner()
    everything = names(model, decay_groups(model, 0.05), 0.05)
    model.activate({"teacher"})
    assert names(model, decay_groups(model, 0.05), 0.05) == everything
    assert "heads.momentum.weight" in everything


def test_a_step_is_adamws_written_out() -> None:
    """Loshchilov and Hutter's update: decay apart from the gradient, moments without bias."""
    layer = nn.Linear(3, 2)
    start = copy.deepcopy(layer)
    optimizer = adamw(layer, 0.01, (0.9, 0.95), 0.05)
    generator = torch.Generator().manual_seed(0)
    moments: dict[str, Any] = {name: (0.0, 0.0) for name, _ in layer.named_parameters()}
    expected = {name: p.detach().double() for name, p in start.named_parameters()}
    for step in (1, 2, 3):
        for name, parameter in layer.named_parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient
            first, second = moments[name]
            first = 0.9 * first + 0.1 * gradient.double()
            second = 0.95 * second + 0.05 * gradient.double() ** 2
            moments[name] = (first, second)
            decay = 0.05 if name == "weight" else 0.0
            unbiased = (second / (1 - 0.95**step)) ** 0.5 + 1e-8
            update = first / (1 - 0.9**step) / unbiased
            expected[name] = expected[name] * (1 - 0.01 * decay) - 0.01 * update
        optimizer.step()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(parameter.double(), expected[name], atol=1e-6, rtol=0)


def test_a_step_marked_not_finite_is_as_if_never_taken() -> None:
    """What the loop relies on: `found_inf` 1 skips the step, its count and its moments."""
    layers = [nn.Linear(4, 4) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    optimizers: list[Any] = [adamw(layer, 0.1, (0.9, 0.95), 0.05) for layer in layers]

    def step(which: int, gradient: float, skipped: float) -> None:
        for parameter in layers[which].parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        optimizers[which].found_inf = torch.tensor(skipped)
        optimizers[which].step()

    step(0, 0.5, 0.0)
    step(1, 0.5, 0.0)
    step(0, float("nan"), 1.0)  # only here
    step(0, -0.2, 0.0)
    step(1, -0.2, 0.0)
    for ours, other in zip(layers[0].parameters(), layers[1].parameters(), strict=True):
        assert torch.equal(ours, other)
    assert torch.isfinite(layers[0].weight).all()
