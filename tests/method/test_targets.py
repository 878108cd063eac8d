"""Targets and losses against hand-worked numbers, torch's modules and transformers' MAE."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import r2_score
from torch import Tensor
from torch.nn import functional as F
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from cmt_mae.core.errors import InputError
from cmt_mae.method.targets import (
    RunningMeans,
    at_least_fp32,
    combine_losses,
    distance,
    effective_rank,
    entropy,
    explained_share,
    image_share,
    normalise_target,
    overlap,
    patchify,
    some_rows,
    spread,
    unpatchify,
)

RAMP = torch.tensor([1.0, 2.0, 3.0, 4.0])


def close(ours: Tensor, wanted: Tensor | list[float], atol: float = 1e-6) -> None:
    torch.testing.assert_close(ours, torch.as_tensor(wanted), atol=atol, rtol=0)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- patches -----------------------------------------------------------------------------------


def test_patches_are_in_transformers_order() -> None:
    config = ViTMAEConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        image_size=24, patch_size=8, decoder_hidden_size=8, decoder_num_hidden_layers=1,
        decoder_num_attention_heads=1, decoder_intermediate_size=8,
    )  # fmt: skip
    images = random(2, 3, 24, 24)
    assert torch.equal(patchify(images, 8), ViTMAEForPreTraining(config).patchify(images))


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 5),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    patch=st.integers(1, 5),
)
def test_any_patch_is_cut_from_its_place(
    batch: int, channels: int, rows: int, columns: int, patch: int
) -> None:
    images = random(batch, channels, rows * patch, columns * patch)
    patches = patchify(images, patch)
    row, column = rows - 1, columns // 2
    piece = images[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
    wanted = piece.permute(0, 2, 3, 1).flatten(1)  # channels last within a patch
    assert torch.equal(patches[:, row * columns + column], wanted)
    assert torch.equal(unpatchify(patches, patch, (rows, columns)), images)


# --- normalisation (spec 12.5) -------------------------------------------------------------------


def test_normalised_targets_by_hand() -> None:
    close(normalise_target(RAMP, "layer_norm"), [-1.3416354, -0.4472118, 0.4472118, 1.3416354])
    close(normalise_target(RAMP, "mae"), [-1.1618947, -0.3872982, 0.3872982, 1.1618947])
    close(normalise_target(RAMP, "l2"), RAMP / math.sqrt(30))
    assert torch.equal(normalise_target(RAMP, "none"), RAMP)


def test_targets_are_at_least_fp32() -> None:
    for given_type, kept in (
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        tensor = random(2, 8).to(given_type)
        assert at_least_fp32(tensor).dtype == kept
        for norm in ("layer_norm", "mae", "l2", "none"):
            assert normalise_target(tensor, norm).dtype == kept
        assert distance(tensor, at_least_fp32(tensor)).dtype == kept


# --- losses (spec 12.5) ----------------------------------------------------------------------------


def test_nothing_predicted_costs_one() -> None:
    target = normalise_target(random(2, 7, 512), "layer_norm")
    assert distance(torch.zeros(2, 7, 512), target).item() == pytest.approx(0.99999, abs=1e-5)
    small = normalise_target(random(2, 7, 8), "layer_norm")  # widths weigh alike
    assert distance(torch.zeros(2, 7, 8), small).item() == pytest.approx(0.9999, abs=1e-4)


ZEROS = [0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("prediction", "target", "options", "wanted"),
    [
        (ZEROS, RAMP, {}, 30 / 4),  # squares 1 + 4 + 9 + 16
        (ZEROS, RAMP, {"reduce": "sum"}, 30.0),
        ([1.0, -2.0, 3.0], ZEROS[:3], {"loss": "l1"}, 2.0),
        ([1.0, -2.0, 3.0], ZEROS[:3], {"loss": "l1", "reduce": "sum"}, 6.0),
        *[([error], [0.0], {"loss": "smooth_l1", "beta": beta}, cost)
          for beta, costs in ((2.0, (0.25, 1, 2)), (1.0, (0.5, 1.5, 2.5)))
          for error, cost in zip((1.0, 2.0, 3.0), costs, strict=True)],
        ([3.0], [0.0], {"loss": "smooth_l1"}, 2.0),  # the default beta is data2vec's 2
    ],
)  # fmt: skip
def test_losses_by_hand(prediction: Any, target: Any, options: dict[str, Any], wanted: float) -> None:
    """Of one token, and of six of which the others cost nothing."""
    given, right = (torch.as_tensor(part).view(1, 1, -1) for part in (prediction, target))
    assert distance(given, right, norm="none", **options).item() == pytest.approx(wanted)
    padded = [torch.cat([part, torch.zeros(1, 5, part.shape[-1])], 1) for part in (given, right)]
    assert distance(*padded, norm="none", **options).item() == pytest.approx(wanted / 6)


def test_unit_lengths_give_two_less_two_cosines() -> None:
    prediction, raw = random(2, 5, 16), random(2, 5, 16, seed=1)
    target = normalise_target(raw, "l2")
    cosine = F.cosine_similarity(prediction, raw, dim=-1)
    found = distance(prediction, target, norm="l2", reduce="sum")
    close(found, (2 - 2 * cosine).mean())
    close(distance(9 * prediction, target, norm="l2", reduce="sum"), found)  # length has no say


@pytest.mark.parametrize("norm", ["l2", "none", "layer_norm"])
def test_cosine_loss_is_one_less_cosine(norm: str) -> None:
    prediction, raw = random(2, 5, 16), random(2, 5, 16, seed=1)
    target = normalise_target(raw, norm)
    wanted = F.cosine_embedding_loss(prediction.flatten(0, 1), target.flatten(0, 1), torch.ones(10))
    close(distance(prediction, target, loss="cosine", norm=norm), wanted)
    # the sign: nearer predictions cost less (EVA's MAE variant has it wrong)
    assert distance(target, target, loss="cosine", norm=norm).item() == pytest.approx(0, abs=1e-6)
    assert distance(-target, target, loss="cosine", norm=norm).item() == pytest.approx(2, abs=1e-6)


def test_equation_4() -> None:
    student, teacher = torch.tensor(1.0), torch.tensor(2.0)
    assert combine_losses(student, teacher, 0.3).item() == pytest.approx(1.7)
    assert combine_losses(student, teacher, 0.0).item() == 2.0
    assert combine_losses(student, teacher, 1.0).item() == 1.0


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InputError, match=r"target\.norm 'batch' is unknown"):
        normalise_target(RAMP, "batch")
    with pytest.raises(InputError, match=r"target\.loss 'huber' is unknown"):
        distance(RAMP, RAMP, loss="huber")
    with pytest.raises(InputError, match=r"target\.reduce 'max' is unknown"):
        distance(RAMP, RAMP, reduce="max")


# --- what is logged --------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [49, 50, 64, 196, 197, 256])
def test_some_rows_come_from_everywhere(tokens: int) -> None:
    """Not from the same patches of every image, however many an image has; every image is there."""
    images = 64
    numbers = torch.arange(images * tokens)[:, None]
    chosen = some_rows(numbers, 512).flatten()
    assert len(chosen) == 512 == len(set(chosen.tolist()))
    places = len(set((chosen % tokens).tolist()))
    assert places >= 0.8 * tokens
    assert set((chosen // tokens).tolist()) == set(range(images))
    assert some_rows(numbers, len(numbers)) is numbers


def test_spread_sees_collapse() -> None:
    features = torch.zeros(2, 2, 2)
    features[..., 1] = torch.tensor([[0.0, 2.0], [4.0, 6.0]])
    # channel 0 never moves; channel 1 is 0, 2, 4, 6 with standard deviation sqrt(20 / 4)
    assert spread(features).item() == pytest.approx(math.sqrt(20 / 4) / 2, rel=1e-6)
    assert spread(random(1, 1, 8).expand(4, 6, 8)).item() == pytest.approx(0, abs=1e-6)
    assert spread(random(1, 1, 8)).item() == 0  # one token: nothing spreads, and it is no nan


def test_effective_rank_by_hand() -> None:
    line = torch.tensor([[1.0, 2.0], [2.0, 4.0], [5.0, 10.0]])[None]
    assert effective_rank(line).item() == pytest.approx(1.0, rel=1e-5)
    # four corners of a box 2 x 6 about the origin: variances 1 and 9, (1 + 9)^2 / (1 + 81)
    box = torch.tensor([[1.0, 3.0], [1.0, -3.0], [-1.0, 3.0], [-1.0, -3.0]])[None]
    assert effective_rank(box).item() == pytest.approx(100 / 82, rel=1e-5)
    assert effective_rank(7 * box + 100).item() == pytest.approx(100 / 82, rel=1e-4)
    assert effective_rank(torch.ones(2, 3, 4)).item() == 0
    even = torch.eye(8)[None].repeat(1, 100, 1)  # 800 tokens, of which 256 at most are taken
    assert effective_rank(even).item() == pytest.approx(7.0, rel=0.05)


def test_image_share_by_hand() -> None:
    """Two images, two places: 0 and 2 at the first, 5 and 9 at the second."""
    features = torch.tensor([[[0.0], [5.0]], [[2.0], [9.0]]])
    # within places 2 + 8 with 4 - 2 degrees; in all 0, 5, 2, 9 about 4: 16 + 1 + 4 + 25 with 3
    assert image_share(features, None, 2).item() == pytest.approx((10 / 2) / (46 / 3), rel=1e-6)
    swapped = torch.stack([features[0], features[1].flip(0)])
    ids = torch.tensor([[0, 1], [1, 0]])
    assert image_share(swapped, ids, 7).item() == pytest.approx(15 / 46, rel=1e-6)
    places = random(1, 6, 8).expand(4, 6, 8)  # every image looks the same
    assert image_share(places, None, 6).item() == pytest.approx(0, abs=1e-6)
    assert image_share(1e18 * random(64, 6, 8), None, 6).item() == pytest.approx(1, abs=0.05)
    assert image_share(random(1, 6, 8), None, 6).item() == 1  # one image: cannot be told


def test_entropy_by_hand() -> None:
    maps = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    assert entropy(maps[:1]).item() == pytest.approx(1.0)
    assert entropy(maps[1:2]).item() == pytest.approx(0.5)
    assert entropy(maps[2:]).item() == pytest.approx(0.0, abs=1e-6)
    assert entropy(maps).item() == pytest.approx(0.5)


def test_overlap_by_hand() -> None:
    first = torch.tensor([[4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0]])
    second = torch.tensor([[4.0, 1.0, 3.0, 2.0], [1.0, 2.0, 3.0, 4.0]])
    assert overlap(first, second, 2).item() == pytest.approx(0.25)  # one of two, none of two
    assert overlap(first, first, 3).item() == 1.0
    assert overlap(first, second, 4).item() == 1.0


def test_explained_share_by_hand() -> None:
    """Mean squares of scikit-learn's r2_score, for all tokens at once and against a given constant."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(4, 6, 5, generator=generator)
    prediction = target + 0.5 * torch.randn(4, 6, 5, generator=generator)
    rows, guess = target.flatten(0, 1), prediction.flatten(0, 1)
    constant = rows.mean(0)
    wanted = r2_score(rows, guess, multioutput="variance_weighted")
    found = explained_share(prediction, target, constant, unit=False)
    assert found.item() == pytest.approx(wanted, abs=1e-5)
    of_constant = explained_share(constant.expand(4, 6, 5), target, constant, unit=False)
    assert of_constant.item() == pytest.approx(0, abs=1e-6)


def test_running_means_are_those_of_the_whole_batch() -> None:
    """The same for one batch and for its quarters; about the last hundred steps; bad numbers leave no trace."""
    generator = torch.Generator().manual_seed(0)
    steps = [torch.randn(8, 3, 5, generator=generator) + 2 for _ in range(4)]
    whole, parts = RunningMeans(), RunningMeans()
    for features in steps:
        whole.add("teacher", features)
        for quarter in features.chunk(4):
            parts.add("teacher", quarter)
        for means in (whole, parts):
            means.step(lambda vector: vector)
    close(whole.means["teacher"], parts.means["teacher"])
    close(whole.means["teacher"], torch.cat(steps).mean((0, 1)))
    again = RunningMeans()
    again.load_state_dict(whole.state_dict(), torch.device("cpu"))
    again.add("teacher", steps[0] * torch.nan)
    again.step(lambda vector: vector)
    assert torch.equal(again.means["teacher"], whole.means["teacher"])
