import pytest
import torch
from torch import nn

from cmt_mae.evaluate.lars import LARS


def steps(value, gradient, **settings):
    """The parameter after one and two steps with the same gradient, in float64."""
    p = nn.Parameter(torch.tensor(value, dtype=torch.float64))
    optimizer = LARS([p], **settings)
    after = []
    for _ in range(2):
        p.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        after.append(p.detach().clone())
    return after


def test_golden_numbers():
    """Specification 12.5: |p| = 5, |g| = 2, so the ratio of the first step is .001 * 5 / 2."""
    first, second = steps([[3.0, 4.0]], [[0.0, 2.0]], lr=0.1)
    torch.testing.assert_close(first, torch.tensor([[3, 3.9995]], dtype=torch.float64))
    expected = torch.tensor([[3, 3.9985500399991]], dtype=torch.float64)
    torch.testing.assert_close(second, expected, rtol=0, atol=1e-12)


def test_one_dimension_is_plain_momentum():
    first, second = steps([1.0], [0.5], lr=0.1, weight_decay=0.3)
    assert first.item() == pytest.approx(0.95, abs=1e-12)
    assert second.item() == pytest.approx(0.855, abs=1e-12)


def test_weight_decay_enters_the_ratio():
    """d = g + .5 p = [1.5, 4]; |d| = sqrt(18.25); p - .1 * .001 * 5 / |d| * d."""
    first, _ = steps([[3.0, 4.0]], [[0.0, 2.0]], lr=0.1, weight_decay=0.5)
    d = torch.tensor([[1.5, 4.0]], dtype=torch.float64)
    expected = torch.tensor([[3.0, 4.0]], dtype=torch.float64) - 5e-4 / 18.25**0.5 * d
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-12)


def test_zero_weights_and_zero_gradients():
    first, _ = steps([[0.0, 0.0]], [[1.0, 0.0]], lr=0.1)  # the ratio is 1
    torch.testing.assert_close(first, torch.tensor([[-0.1, 0.0]], dtype=torch.float64))
    first, second = steps([[3.0, 4.0]], [[0.0, 0.0]], lr=0.1)
    assert first.tolist() == second.tolist() == [[3.0, 4.0]]
