"""The paper on public parts and our method compute the same: equal loss and gradients for equal weights."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from benchmarks.naive_cmt import Materialise, NaiveCMT, make_optimizer, train_step
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from cmt_mae.method.cmtmae import Alphas, MaskConfig, StudentWithDecoder, TargetConfig
from cmt_mae.method.decoder import DecoderConfig
from cmt_mae.method.frozen import FrozenNetworks
from cmt_mae.method.masking import noise_length
from cmt_mae.method.teacher import Teacher, TeacherConfig
from cmt_mae.method.vit import StudentConfig, build_student

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.481, 0.458, 0.408), (0.269, 0.261, 0.276))
GRID, N_MASK = (4, 6), 18
STAGES = {"one": Alphas(0.0, 0.0), "two": Alphas(0.3, 0.3)}


def nets(
    stage: str, dtype: torch.dtype, materialise: Materialise
) -> tuple[StudentWithDecoder, FrozenNetworks, NaiveCMT]:
    """Both methods with the same random weights; the momentum student differs from the student."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)  # from the start: folding a normalisation rounds
    student = build_student(
        StudentConfig(img_size=[32, 48], patch_size=8, width=32, depth=3, heads=4)
    )
    teacher = VisionTransformer(
        img_size=(32, 48),
        patch_size=8,
        embed_dim=48,
        depth=3,
        num_heads=3,
        num_classes=0,
        pre_norm=True,
    )
    projection = torch.randn(20, 48)
    for part in (student, teacher):
        shaken(part)
    learner = StudentWithDecoder(
        student,
        DecoderConfig(width=16, depth=2, heads=2),
        TargetConfig(),
        {"teacher": 20, "momentum": 32},
    )
    shaken(learner.decoder)
    guides = FrozenNetworks(
        MaskConfig(), learner.target, grid=GRID, patch_size=8, mean=IMAGENET[0], std=IMAGENET[1],
        teacher=Teacher(
            copy.deepcopy(teacher), TeacherConfig(), mean=CLIP[0], std=CLIP[1], student_mean=IMAGENET[0],
            student_std=IMAGENET[1], grid=GRID, projection=projection,
        ),
    )  # fmt: skip
    naive = NaiveCMT(
        copy.deepcopy(student), teacher, projection, images=IMAGENET, teacher_images=CLIP,
        decoder=(16, 2, 2), materialise=materialise,
    )  # fmt: skip
    naive.decoder_embed.load_state_dict(learner.decoder.embed.state_dict())
    naive.decoder_blocks.load_state_dict(learner.decoder.blocks.state_dict())
    naive.decoder_norm.load_state_dict(learner.decoder.norm.state_dict())
    naive.mask_token.data.copy_(learner.decoder.mask_token)
    naive.head_teacher.load_state_dict(learner.heads["teacher"].state_dict())
    naive.head_momentum.load_state_dict(learner.heads["momentum"].state_dict())
    if stage == "two":
        guides.start_momentum(student)
        assert guides.momentum is not None
        shaken(guides.momentum)
        naive.start_stage_two()
        assert naive.momentum is not None
        naive.momentum.load_state_dict(guides.momentum.state_dict())
    return learner.to(dtype), guides.to(dtype), naive.to(dtype)


@pytest.fixture(autouse=True)
def _default_type() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)


@torch.no_grad()
def shaken(module: torch.nn.Module) -> None:
    """Weights that matter: timm starts biases at 0."""
    for name, parameter in module.named_parameters():
        if not name.endswith("pos_embed"):
            parameter.add_(0.1 * torch.randn_like(parameter))


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, 3, 32, 48, generator=generator, dtype=torch.float64).to(dtype)
    return images, torch.rand(3, noise_length("sampled_high", 24), generator=generator)


TOLERANCES: list[Any] = [
    pytest.param(torch.float64, 1e-12, id="fp64"),
    pytest.param(torch.float32, 2e-5, id="fp32"),
]


@pytest.mark.parametrize("materialise", ["last", "all"])
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("stage", ["one", "two"])
def test_same_loss_and_gradients(
    stage: str, dtype: torch.dtype, tolerance: float, materialise: Materialise
) -> None:
    learner, guides, naive = nets(stage, dtype, materialise)
    images, noise = inputs(dtype)
    weights = STAGES[stage]
    mask, targets, _ = guides(images, noise, N_MASK, weights)
    learner.activate({"teacher", "momentum"} if stage == "two" else {"teacher"})
    loss, _ = learner(images, mask, targets, weights.loss)
    loss.backward()
    theirs = naive(images, mask.mask)
    theirs.backward()
    assert theirs.item() == pytest.approx(loss.item(), rel=tolerance)
    assert 0.1 < loss.item() < 100
    pairs = {
        **{f"student.{n}": (p, dict(naive.encoder.named_parameters())[n])
           for n, p in learner.student.named_parameters()},
        "embed": (learner.decoder.embed.weight, naive.decoder_embed.weight),
        "mask token": (learner.decoder.mask_token, naive.mask_token),
        "head": (learner.heads["teacher"].weight, naive.head_teacher.weight),
    }  # fmt: skip
    compared = 0
    for name, (mine, other) in pairs.items():
        if mine.grad is not None:
            assert other.grad is not None, name
            torch.testing.assert_close(mine.grad, other.grad, rtol=100 * tolerance, atol=tolerance)
            compared += 1
    assert compared == len(pairs) - 1  # all but the fixed positions


def test_the_mask_hides_attended_patches_and_exactly_enough() -> None:
    _, _, naive = nets("one", torch.float32, "last")
    attention = torch.arange(1.0, 25.0).repeat(2000, 1)
    torch.manual_seed(0)
    mask = naive.draw_mask(attention / attention.sum(-1, keepdim=True))
    assert (mask.sum(1) == N_MASK).all()
    share = mask.float().mean(0)
    assert share[-6:].mean() > 0.9
    assert share[:6].mean() < 0.5


def test_a_step_moves_the_student_and_the_average_but_not_the_teacher() -> None:
    _, _, naive = nets("two", torch.float32, "last")
    images, _ = inputs(torch.float32)
    assert naive.momentum is not None
    names = ("encoder", "momentum", "teacher")
    before = {name: copy.deepcopy(getattr(naive, name).state_dict()) for name in names}
    train_step(naive, make_optimizer(naive), images)
    moved = {
        name: not all(
            torch.equal(value, before[name][key])
            for key, value in getattr(naive, name).state_dict().items()
        )
        for name in names
    }
    assert moved == {"encoder": True, "momentum": True, "teacher": False}
