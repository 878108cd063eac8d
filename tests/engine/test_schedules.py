"""Schedules against the golden values of spec 12.5 and torch's own."""

import pytest
import torch

from cmt_mae.engine.optim import learning_rate, momentum


@pytest.mark.parametrize(
    ("epoch", "rate"),
    [
        (0, 0.0), (1, 6e-5), (20, 1.2e-3), (40, 2.4e-3), (100, 2.36328e-3), (400, 1.299095e-3),
        (420, 1.2e-3), (800, 0.0),
    ],
)  # fmt: skip
def test_golden_learning_rates(epoch: float, rate: float) -> None:
    assert learning_rate(epoch, 2.4e-3, 40, 800) == pytest.approx(rate, rel=1e-6, abs=1e-12)


def test_learning_rate_equals_torchs_warm_up_and_cosine() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 5))
    theirs = []
    for _ in range(5):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        warm.step()
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20, eta_min=0.1)
    for _ in range(21):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cosine.step()
    ours = [learning_rate(epoch, 0.5, 5, 25, lowest=0.1) for epoch in range(26)]
    assert ours == pytest.approx(theirs, rel=1e-9)


def test_without_warm_up_the_first_step_is_at_the_peak() -> None:
    assert learning_rate(0, 0.3, 0, 10) == 0.3


def test_golden_momenta() -> None:
    found = [momentum(share, 0.996, 1.0) for share in (0, 0.25, 0.5, 0.75, 1)]
    assert found == pytest.approx([0.996, 0.9965858, 0.998, 0.9994142, 1.0], abs=5e-8)
    assert momentum(0.0, 0.996, 1.0) == 0.996
    assert momentum(1.0, 0.996, 1.0) == 1.0


def test_other_shapes_and_the_outside_of_the_run() -> None:
    found = [momentum(share, 0.999, 0.9998, "linear") for share in (0, 0.5, 1)]
    assert found == pytest.approx([0.999, 0.9994, 0.9998], abs=1e-12)
    assert momentum(0.7, 0.99, 1.0, "constant") == 0.99
    for shape in ("linear", "cosine"):
        assert momentum(-0.1, 0.9, 1.0, shape) == pytest.approx(0.9)
        assert momentum(1.1, 0.9, 1.0, shape) == pytest.approx(1.0)
