"""The first part that was not finite, and weights that are not."""

import math

import torch
from torch import nn

from cmt_mae.engine.finiteness import bad_weights, first_part
from cmt_mae.engine.meters import Bad


def test_the_earliest_step_and_in_it_the_first_part_is_named() -> None:
    bad = {
        "gradient_norm": Bad(3, first=7),
        "loss": Bad(2, first=8),
        "spread_target_teacher": Bad(1, first=8),
        "image_mean": Bad(1, first=9),
    }
    assert first_part(bad) == (7, "gradient", "gradient_norm")
    bad.pop("gradient_norm")
    assert first_part(bad) == (8, "teacher", "spread_target_teacher")
    assert first_part({"new_number": Bad(1, 2)}) == (2, "step", "new_number")


def test_every_number_of_a_step_belongs_to_a_part() -> None:
    for name, part in {
        "teacher_image_mean": "image",
        "class_mass_teacher": "teacher",
        "entropy_momentum": "momentum student",
        "spread_target_hog": "target",
        "spread_student": "student",
        "spread_decoder": "decoder",
        "spread_prediction_pixel": "head",
        "loss_momentum": "loss",
    }.items():
        assert first_part({name: Bad(1, 1)})[1] == part


def test_bad_weights_are_named_in_order() -> None:
    first, second = nn.Linear(3, 2), nn.BatchNorm1d(2)
    assert bad_weights({"a": first, "none": None, "b": second}) == []
    with torch.no_grad():
        first.bias[1] = math.inf
        second.running_mean[0] = math.nan  # type: ignore[index]
    assert bad_weights({"a": first, "none": None, "b": second}) == ["a.bias", "b.running_mean"]
