"""The two stages: who is run, who learns, what guides the mask and what is predicted."""

import copy
from typing import Any

import pytest
import torch
from method_nets import (
    GRID,
    MEAN,
    N_MASK,
    STD,
    close,
    full_map,
    guides,
    learner,
    look,
    numbers,
    pictures,
    student,
)
from torch import Tensor, nn
from torch.nn import functional as F

from cmt_mae.core.errors import InputError
from cmt_mae.method.cmtmae import Alphas, MaskConfig, TargetConfig
from cmt_mae.method.frozen import FrozenNetworks, shares
from cmt_mae.method.hog import hog_dim, hog_targets
from cmt_mae.method.masking import Mask, from_priority
from cmt_mae.method.targets import patchify
from cmt_mae.method.vit import encode_visible


class Count:
    """How often a network starts a forward pass, and how often its last MLP runs."""

    def __init__(self, made: FrozenNetworks) -> None:
        assert made.teacher is not None
        assert made.momentum is not None
        self.starts = {"teacher": 0, "momentum": 0}
        self.finishes = {"teacher": 0, "momentum": 0}
        networks: dict[str, Any] = {"teacher": made.teacher.model, "momentum": made.momentum}
        for name, model in networks.items():
            self.watch(model.patch_embed, self.starts, name)
            self.watch(model.blocks[-1].mlp, self.finishes, name)

    @staticmethod
    def watch(part: nn.Module, where: dict[str, int], name: str) -> None:
        def count(*_: Any) -> None:
            where[name] += 1

        part.register_forward_hook(count)


# --- who is run ------------------------------------------------------------------------------------

COLLAB, PIXEL = TargetConfig(), TargetConfig("pixel", "mae")
CASES = [  # mask, target, alpha of mask and loss -> starts and finishes of teacher, momentum
    ("stage one", MaskConfig(), COLLAB, (0.0, 0.0), (1, 0), (1, 0)),
    ("stage two", MaskConfig(), COLLAB, (0.3, 0.3), (1, 1), (1, 1)),
    ("alpha one", MaskConfig(), COLLAB, (1.0, 1.0), (0, 1), (0, 1)),
    ("mask of both, target teacher", MaskConfig(), COLLAB, (0.3, 0.0), (1, 1), (1, 0)),
    ("mask of teacher, target both", MaskConfig(), COLLAB, (0.0, 0.3), (1, 1), (1, 1)),
    ("mask of momentum, target teacher", MaskConfig(), COLLAB, (1.0, 0.0), (1, 1), (1, 0)),
    ("cm_only", MaskConfig(), PIXEL, (0.3, 0.3), (1, 1), (0, 0)),
    ("ct_only", MaskConfig(rule="random"), COLLAB, (0.3, 0.3), (1, 1), (1, 1)),
    ("mae", MaskConfig(rule="random"), PIXEL, (0.3, 0.3), (0, 0), (0, 0)),
    ("mvp", MaskConfig(rule="random"), TargetConfig("teacher"), (0.3, 0.3), (1, 0), (1, 0)),
    ("attmask", MaskConfig(source="momentum"), TargetConfig("momentum"), (0.3, 0.3), (0, 1), (0, 1)),
    ("teacher alone", MaskConfig(source="teacher"), PIXEL, (0.3, 0.3), (1, 0), (0, 0)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("mask", "target", "alphas", "starts", "finishes"),
    [case[1:] for case in CASES],
    ids=[case[0] for case in CASES],
)
def test_each_network_is_run_once_or_not_at_all(
    mask: MaskConfig, target: TargetConfig, alphas: tuple[float, float],
    starts: tuple[int, int], finishes: tuple[int, int],
) -> None:  # fmt: skip
    made = guides(mask, target)
    count = Count(made)
    made(pictures(), numbers(mask.rule), N_MASK, Alphas(*alphas))
    assert tuple(count.starts.values()) == starts
    assert tuple(count.finishes.values()) == finishes


def test_alpha_zero_in_stage_two_is_stage_one_to_the_bit() -> None:
    made, learns = guides(), learner()
    count = Count(made)
    mask, targets, _ = look(made, alpha=0.0)
    loss, _ = learns(pictures(), mask, targets, 0.0)
    assert count.starts == {"teacher": 1, "momentum": 0}
    made.momentum = None  # stage one: there is none
    first_mask, first_targets, _ = look(made, alpha=0.0)
    first_loss, _ = learns(pictures(), first_mask, first_targets, 0.0)
    assert torch.equal(mask.mask, first_mask.mask)
    assert set(targets) == set(first_targets) == {"teacher"}
    assert loss.item() == first_loss.item()


# --- equations 3 and 4 -----------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@torch.no_grad()
def test_equation_3_on_whole_networks(alpha: float) -> None:
    """`high` hides the top of the mixture of the two normalised maps, as timm multiplies them out."""
    made, x = guides(MaskConfig(rule="high")), pictures()
    assert made.teacher is not None
    maps = [full_map(m, x)[:, :, 0, 1:].mean(1) for m in (made.momentum, made.teacher.model)]
    own, taught = (m / m.sum(1, keepdim=True) for m in maps)
    mixed = alpha * own + (1 - alpha) * taught
    mask, _, _ = look(made, alpha)
    wanted = mixed.argsort(dim=1, descending=True)[:, :N_MASK].sort(dim=1).values
    assert torch.equal(mask.ids_mask, wanted)
    assert (own.argsort(1) != taught.argsort(1)).any()


@torch.no_grad()
def test_momentum_target_of_the_last_blocks() -> None:
    made, x = guides(target=TargetConfig(momentum_last_k=2)), pictures()
    assert made.momentum is not None
    mask, targets, _ = look(made)
    outputs: Any = made.momentum.forward_intermediates(
        x, indices=2, output_fmt="NLC", intermediates_only=True
    )
    mean = torch.stack(outputs).mean(0)[mask.mask].view(2, N_MASK, -1)
    close(targets["momentum"], F.layer_norm(mean, mean.shape[-1:]), atol=1e-4)


# --- tokens, pixels, HOG ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "count"), [("masked", 9), ("masked+cls", 10), ("all", 12), ("all+cls", 13)]
)
def test_where_the_loss_is_taken(tokens: str, count: int) -> None:
    target = TargetConfig(tokens=tokens)
    made, learns, x = guides(target=target), learner(target), pictures()
    assert made.teacher is not None
    mask, targets, _ = look(made)
    assert targets["teacher"].shape == (2, count, 32)
    assert targets["momentum"].shape == (2, count, 24)
    whole = made.teacher.model.forward_features(x)
    given = F.layer_norm(at_tokens(whole, mask, tokens), (32,))
    close(targets["teacher"], given, atol=1e-4)
    latents = encode_visible(learns.student, x, mask.ids_keep)
    out = at_tokens(learns.decoder(latents, mask), mask, tokens)
    close(learns.decoder(latents, mask, tokens), out, atol=1e-5)
    loss, logs = learns(x, mask, targets, 0.3)
    prediction = learns.heads["teacher"](out)
    close(logs["loss_teacher"], F.mse_loss(prediction, given).detach(), atol=1e-5)
    loss.backward()
    assert learns.get_parameter("student.cls_token").grad is not None


def at_tokens(tokens: Tensor, mask: Mask, which: str) -> Tensor:
    """Of all tokens (B, 1 + L, D) those of a setting of ``target.tokens``."""
    chosen = mask.mask if which.startswith("masked") else torch.ones_like(mask.mask)
    chosen = F.pad(chosen, (1, 0), value=which.endswith("+cls"))
    return tokens[chosen].view(len(tokens), -1, tokens.shape[-1])


def at_patches(patches: Tensor, mask: Mask, which: str) -> Tensor:
    """As ``at_tokens``, of patches (B, L, D)."""
    return at_tokens(F.pad(patches, (0, 0, 1, 0)), mask, which)


@torch.no_grad()
@pytest.mark.parametrize("tokens", ["masked", "masked+cls", "all", "all+cls"])
def test_outputs_that_are_given_equal_those_of_the_teacher(tokens: str) -> None:
    made = guides(target=TargetConfig(tokens=tokens))
    assert made.teacher is not None
    output = made.teacher.outputs(pictures(), "mean", tokens.endswith("+cls"))
    (mask, targets, _), (same, given, _) = look(made), look(made, teacher_output=lambda: output)
    assert torch.equal(mask.mask, same.mask)
    close(given["teacher"], targets["teacher"], atol=1e-4)


@pytest.mark.parametrize("source", ["pixel", "hog"])
@pytest.mark.parametrize("tokens", ["masked", "all"])
def test_targets_from_the_image(source: str, tokens: str) -> None:
    made, x = (
        guides(MaskConfig(rule="random"), TargetConfig(source, "none", tokens=tokens)),
        pictures(),
    )
    mask, targets, _ = look(made)
    if source == "pixel":
        wanted = patchify(x, 8)
    else:  # HOG sees the picture itself, not the normalised one
        shown = x * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
        wanted = hog_targets(shown, 8)
        made.target.hog_window = False
        close(
            look(made)[1][source], at_patches(hog_targets(shown, 8, gaussian=False), mask, tokens)
        )
        assert wanted.shape[-1] == hog_dim(8, 3)
    close(targets[source], at_patches(wanted, mask, tokens))


def test_impossible_targets_are_refused() -> None:
    for source in ("pixel", "hog"):
        with pytest.raises(InputError, match="all\\+cls"):
            look(guides(target=TargetConfig(source, tokens="all+cls")))
    with pytest.raises(InputError, match="'both' names no network"):
        shares("both", 0.3)


@torch.no_grad()
def test_a_second_crop_is_what_the_teacher_sees() -> None:
    made = guides()
    count, second = Count(made), pictures(seed=9)
    assert made.teacher is not None
    mask, targets, _ = look(made, teacher_images=second)
    patches = made.teacher.model.forward_features(second)[:, 1:][mask.mask].view(2, N_MASK, -1)
    close(targets["teacher"], F.layer_norm(patches, (32,)), atol=1e-4)
    assert made.momentum is not None
    own = made.momentum.forward_features(pictures())[:, 1:][mask.mask].view(2, N_MASK, -1)
    close(targets["momentum"], F.layer_norm(own, (24,)), atol=1e-4)
    assert count.starts == {"teacher": 2, "momentum": 2}  # one each in the step, one each here


def test_attention_may_be_set_aside_for_a_step() -> None:
    made = guides()
    mask, _, logs = look(made, random_mask=True)
    assert torch.equal(mask.mask, from_priority(numbers()[:, :12], N_MASK).mask)
    assert "entropy_teacher" not in logs
    blocks = guides(MaskConfig(rule="block"), PIXEL)  # a rule without attention stays itself
    assert torch.equal(look(blocks, random_mask=True)[0].mask, look(blocks)[0].mask)


# --- gradient and leaks ----------------------------------------------------------------------------


def test_no_gradient_reaches_teacher_or_momentum() -> None:
    made, learns, x = guides(), learner(), pictures().requires_grad_()
    mask, targets, logs = made(x, numbers(), N_MASK, Alphas(0.3, 0.3))
    assert not any(t.requires_grad for t in (*targets.values(), *logs.values()))
    before = copy.deepcopy(made.state_dict())
    optimizer = torch.optim.SGD([*learns.parameters(), *made.parameters()], lr=1.0)
    learns(x, mask, targets, 0.3)[0].backward()
    optimizer.step()
    assert list(made.parameters())
    assert all(p.grad is None and not p.requires_grad for p in made.parameters())
    assert all(torch.equal(before[name], now) for name, now in made.state_dict().items())
    assert all(p.grad is not None for p in learns.parameters() if p.requires_grad)


def test_hidden_pixels_cannot_reach_the_student() -> None:
    model, x = student(), pictures()
    mask = from_priority(torch.rand(2, 12, generator=torch.Generator().manual_seed(3)), N_MASK)
    hidden = mask.mask.view(2, 1, *GRID).repeat_interleave(8, 2).repeat_interleave(8, 3)
    latents = encode_visible(model, x, mask.ids_keep)
    other = torch.where(hidden, 100 * torch.randn_like(x), x)
    assert torch.equal(encode_visible(model, other, mask.ids_keep), latents)
    seen = torch.where(hidden, x, x + 1)
    assert not torch.allclose(encode_visible(model, seen, mask.ids_keep), latents)

    x.requires_grad_()  # and so for the whole of the loss, through the decoder
    learns = learner()
    targets = {"teacher": torch.randn(2, N_MASK, 32)}
    learns(x, mask, targets)[0].backward()
    assert x.grad is not None
    assert not x.grad[hidden.expand_as(x)].any()
    assert x.grad[~hidden.expand_as(x)].abs().min() > 0


def test_heads_that_do_not_learn_stay_as_they_are() -> None:
    """Stage one: the momentum head gets no gradient, and AdamW's decay leaves it alone."""
    made, learns, x = guides(), learner(), pictures()
    optimizer = torch.optim.AdamW(learns.parameters(), lr=0.1, weight_decay=0.5)

    def step(alpha: float, active: set[str]) -> dict[str, bool]:
        learns.activate(active)
        # what DDP reduces: a head that waits must not even be asked for a gradient
        assert active == {n for n, h in learns.heads.items() if h.weight.requires_grad}
        before = copy.deepcopy(learns.heads.state_dict())
        mask, targets, _ = look(made, alpha)
        learns(x, mask, targets, alpha)[0].backward()
        grads = {n: h.weight.grad is not None for n, h in learns.heads.items()}
        optimizer.step()
        optimizer.zero_grad()
        after = learns.heads.state_dict()
        moved = {n: not torch.equal(before[f"{n}.weight"], after[f"{n}.weight"]) for n in grads}
        assert moved == grads
        return moved

    assert step(0.0, {"teacher"}) == {"teacher": True, "momentum": False}
    assert step(0.3, {"teacher", "momentum"}) == {"teacher": True, "momentum": True}
    assert step(1.0, {"momentum"}) == {"teacher": False, "momentum": True}


@pytest.mark.parametrize("kind", ["mae", "prompting"])
def test_a_step_under_bf16_is_near_the_one_in_fp32(kind: str) -> None:
    made, learns, x = guides(family="dinov3 (rotary, registers)"), learner(kind=kind), pictures()
    mask, targets, _ = look(made)
    loss, _ = learns(x, mask, targets, 0.3)
    with torch.autocast("cpu", torch.bfloat16):
        _, short_targets, _ = look(made)
        short, logs = learns(x, mask, targets, 0.3)
    assert short.dtype == torch.float32
    assert all(t.dtype == torch.float32 for t in short_targets.values())
    assert all(number.dtype == torch.float32 for number in logs.values())
    assert short.item() == pytest.approx(loss.item(), rel=0.03)
    short.backward()
    assert all(p.grad is not None for p in learns.parameters() if p.requires_grad)
