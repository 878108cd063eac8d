"""Colours of features against scikit-learn; neighbours by hand."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.metrics import r2_score

from cmt_mae.tools.inspect.colours import explained, fit_basis, similar_to
from cmt_mae.tools.inspect.neighbours import Gallery, chunks, nearest


def test_axes_are_scikit_learns() -> None:
    tokens = torch.randn(5, 12, 7, generator=torch.Generator().manual_seed(0)) * torch.arange(
        1.0, 8.0
    )
    basis = fit_basis(tokens)
    oracle = PCA(3).fit(tokens.flatten(0, 1).numpy())
    for axis, wanted in zip(basis.axes.T.numpy(), oracle.components_, strict=True):
        assert abs(float(axis @ wanted)) == pytest.approx(1, abs=1e-4)
        assert axis[np.abs(axis).argmax()] > 0
    colours = basis.colours(tokens)
    assert colours.shape == (5, 12, 3)
    assert 0 <= colours.min() < 0.05
    assert 0.95 < colours.max() <= 1
    first = (tokens - tokens.flatten(0, 1).mean(0)) @ basis.axes[:, 0]
    assert torch.corrcoef(torch.stack([first.flatten(), colours[..., 0].flatten()]))[0, 1] > 0.99


def test_flat_features_are_grey_where_there_is_nothing() -> None:
    """Features on one line use one colour; the other two stay in the middle."""
    tokens = torch.linspace(-1, 1, 20)[:, None] * torch.ones(1, 4)
    colours = fit_basis(tokens).colours(tokens)
    assert colours[:, 0].std() > 0.2
    assert fit_basis(torch.ones(6, 4)).colours(torch.ones(6, 4)).unique().tolist() == [0.5]


def test_share_explained_is_r2() -> None:
    generator = torch.Generator().manual_seed(1)
    target, said = torch.randn(30, 5, generator=generator), torch.randn(30, 5, generator=generator)
    wanted = r2_score(target, said, multioutput="variance_weighted")
    mean = target.mean(0)
    assert explained(said, target, mean) == pytest.approx(wanted, abs=1e-5)
    assert explained(mean.expand(30, 5), target, mean) == pytest.approx(0, abs=1e-6)


def test_patches_like_one() -> None:
    tokens = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 3.0], [-1.0, 0.0]]])
    found = similar_to(tokens, 0)
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.0, 0.5**0.5, -1.0]]))


def test_neighbours_by_hand() -> None:
    """b is asked for: not itself (known by its name), then a, then c; angles are those around the mean."""
    angles = torch.tensor([0.0, 0.2, 0.5, 2.0])
    angles = torch.cat([angles, angles + torch.pi])  # their mean is 0
    vectors = torch.stack([angles.cos(), angles.sin()], dim=1) + torch.tensor([50.0, 20.0])
    names = [f"x/{letter}" for letter in "abcdefgh"]
    gallery = Gallery(names, [""] * 8, torch.zeros(8, 3, 2, 2), {"student": vectors})
    numbers, cosines = nearest(gallery, "student", vectors[1:2], ["b"], 2)
    assert numbers.tolist() == [[0, 2]]
    torch.testing.assert_close(cosines, torch.tensor([[0.2, 0.3]]).cos(), atol=1e-4, rtol=0)
    numbers, _ = nearest(gallery, "student", vectors[1:2], ["another"], 9)
    assert numbers[0, :3].tolist() == [1, 0, 2]
    assert [len(some) for some in chunks(range(70))] == [32, 32, 6]  # type: ignore[arg-type]
