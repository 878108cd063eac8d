"""The frozen networks: the moving average (spec 5.2), what is logged of them, settings off by default."""

import copy

import pytest
import torch
from method_nets import (
    N_MASK,
    close,
    full_map,
    guides,
    learner,
    look,
    numbers,
    pictures,
    student,
)
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from cmt_mae.method.cmtmae import Alphas, MaskConfig, TargetConfig
from cmt_mae.method.frozen import CachedForwards, FrozenNetworks
from cmt_mae.method.masking import Mask, of_other_images


def filled(value: float) -> VisionTransformer:
    made = student(pos_embed="learned").double()
    for parameter in made.parameters():
        nn.init.constant_(parameter, value)
    return made


def average(made: FrozenNetworks) -> list[Tensor]:
    assert made.momentum is not None
    return list(made.momentum.parameters())


def test_moving_average_by_hand() -> None:
    made = guides()
    made.start_momentum(filled(0.0))
    for _ in range(3):
        made.update_momentum(filled(1.0), 0.996)
    for parameter in average(made):  # 1 - .996 ** 3
        close(parameter, torch.full_like(parameter, 0.011952064), atol=1e-12)


@pytest.mark.parametrize("skipped", [None, torch.zeros(())])
def test_ends_of_the_average(skipped: Tensor | None) -> None:
    made, model = guides(), student()
    before = copy.deepcopy(average(made))
    made.update_momentum(model, 1.0, skipped)
    assert all(torch.equal(a, b) for a, b in zip(average(made), before, strict=True))
    made.update_momentum(model, 0.0, skipped)
    assert all(torch.equal(a, b) for a, b in zip(average(made), model.parameters(), strict=True))


def test_a_skipped_step_moves_nothing_and_others_move_alike() -> None:
    made, model = guides(), student()
    before = copy.deepcopy(average(made))
    made.update_momentum(model, 0.9, torch.ones(()))
    assert all(torch.equal(a, b) for a, b in zip(average(made), before, strict=True))
    made.update_momentum(model, 0.9, torch.zeros(()))
    for now, old, new in zip(average(made), before, model.parameters(), strict=True):
        close(now, 0.9 * old + 0.1 * new.detach(), atol=1e-6)


def test_momentum_student_starts_as_a_copy_that_stands_still() -> None:
    made, model = guides(), student(drop_path=0.5).train()
    made.start_momentum(model)
    assert made.momentum is not None
    assert all(torch.equal(a, b) for a, b in zip(average(made), model.parameters(), strict=True))
    assert not any(part.training for part in made.momentum.modules())  # no path is dropped
    assert not any(p.requires_grad for p in average(made))
    with torch.no_grad():
        model.cls_token.add_(1)
    assert not torch.equal(made.momentum.get_parameter("cls_token"), model.cls_token)
    assert model.training


@torch.no_grad()
def test_what_is_logged_of_the_maps() -> None:
    made, x = guides(), pictures()
    assert made.teacher is not None
    _, _, logs = look(made)
    own, taught = (full_map(m, x)[:, :, 0].mean(1) for m in (made.momentum, made.teacher.model))
    close(logs["class_mass_momentum"], own[:, 0].mean())
    close(logs["class_mass_teacher"], taught[:, 0].mean())
    top = [m[:, 1:].topk(3, dim=1).indices.tolist() for m in (own, taught)]
    common = [len(set(a) & set(b)) / 3 for a, b in zip(*top, strict=True)]
    assert logs["overlap"].item() == pytest.approx(sum(common) / 2)
    share = taught[:, 1:] / taught[:, 1:].sum(1, keepdim=True)
    wanted = torch.distributions.Categorical(share).entropy().mean() / torch.tensor(12.0).log()
    close(logs["entropy_teacher"], wanted)
    assert {"entropy_momentum", "entropy_collab", "spread_target_teacher"} <= set(logs)


def test_latents_of_another_image_cost_what_the_own_ones_told() -> None:
    """0 where the decoder does not listen to latents; the sum of both numbers is the loss of all images."""
    target = TargetConfig(tokens="all")
    made, learns = guides(target=target), learner(target)
    mask, targets, _ = look(made)
    before = torch.get_rng_state()
    _, logs = learns(pictures(), mask, targets, 0.3, compare=True)
    assert torch.equal(before, torch.get_rng_state())
    assert learns.student.training
    swapped = [part.flip(0) for part in (mask.ids_keep, mask.ids_mask, mask.mask)]
    turned = {name: value.flip(0) for name, value in targets.items()}
    _, others = learns(pictures(), Mask(*swapped), turned, 0.3)
    close(logs["other_image_loss"], others["loss"], atol=1e-5)
    close(logs["other_image_loss"] - logs["image_gain"], logs["loss"], atol=1e-5)
    nn.init.zeros_(learns.decoder.embed.weight)
    _, deaf = learns(pictures(), mask, targets, 0.3, compare=True)
    close(deaf["image_gain"], torch.zeros(()), atol=1e-6)


@torch.no_grad()
def test_centred_targets() -> None:
    """Features less their running mean, then normalised; in the first step there is none yet."""
    made, x = guides(target=TargetConfig(tokens="all", centre=True)), pictures()
    assert made.teacher is not None
    raw = made.teacher.model.forward_features(x)[:, 1:]
    _, first, _ = look(made)
    close(first["teacher"], F.layer_norm(raw, (32,)), atol=1e-4)
    made.means.step(lambda vector: vector)
    _, second, _ = look(made)
    close(second["teacher"], F.layer_norm(raw - raw.mean((0, 1)), (32,)), atol=1e-4)


@torch.no_grad()
def test_the_map_of_another_image_guides_the_mask() -> None:
    """Neighbours are exchanged, so that images of one process need none of another."""
    x, noise = pictures(), numbers()
    straight, other = (
        guides(MaskConfig(source="teacher", rule="high", other_image=swap))
        for swap in (False, True)
    )
    own, _, _ = straight(x, noise, N_MASK, Alphas(0, 0))
    theirs, _, _ = other(x, noise, N_MASK, Alphas(0, 0))
    assert torch.equal(theirs.mask, own.mask.flip(0))
    assert of_other_images(torch.arange(7)).tolist() == [1, 0, 3, 2, 5, 4, 5]


@torch.no_grad()
def test_the_students_map_is_read_as_its_settings_say() -> None:
    x = pictures()
    made = guides(MaskConfig(source="momentum", student_block=-2, student_map="column_mean"))
    assert made.momentum is not None
    _, _, logs = look(made)
    whole = full_map(made.momentum, x, -2).mean(1)
    close(logs["class_mass_momentum"], whole.mean(1)[:, 0].mean())
    raw, _ = CachedForwards(made, x, x).attention("momentum", "mean")
    close(raw, whole.mean(1)[:, 1:], atol=1e-6)
