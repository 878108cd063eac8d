"""The frozen teacher: folded normalisation, aligned grids, channels, and features as timm gives them."""

import copy
from typing import Any

import pytest
import torch
from method_nets import GRID, SHAPE, full_map, network, pictures, randomise
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

from cmt_mae.core.errors import InputError
from cmt_mae.method.last_block import finish
from cmt_mae.method.teacher import (
    Teacher,
    TeacherConfig,
    fold_normalisation,
    resample,
    teacher_channels,
)

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)
PLAIN = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def teacher(model: nn.Module, *, own: Any = PLAIN, student: Any = PLAIN, **more: Any) -> Teacher:
    """A teacher of a copy of the network, with nothing to fold unless asked."""
    grid, projection = more.pop("grid", GRID), more.pop("projection", None)
    return Teacher(
        copy.deepcopy(model),
        TeacherConfig(**more),
        mean=own[0],
        std=own[1],
        student_mean=student[0],
        student_std=student[1],
        grid=grid,
        projection=projection,
    )


def normal(pixels: Tensor, stats: Any) -> Tensor:
    mean, std = (torch.tensor(v, dtype=pixels.dtype).view(1, -1, 1, 1) for v in stats)
    return (pixels - mean) / std


def close(ours: Tensor, wanted: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(ours, wanted, atol=atol, rtol=0)


# --- normalisation -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["vit", "clip (pre-norm, QuickGELU)"])  # with bias and without
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_folded_normalisation_is_exact(family: str, dtype: torch.dtype, atol: float) -> None:
    """The student's tensor gives what the teacher's own normalisation gives."""
    model = network(family).to(dtype)
    assert (model.patch_embed.proj.bias is None) == family.startswith("clip")
    model.patch_embed.proj.weight.data *= 0.1  # as small as trained ones, for an absolute tolerance
    pixels = torch.rand(2, 3, 24, 32, dtype=dtype, generator=torch.Generator().manual_seed(0))
    wanted = model.patch_embed(normal(pixels, CLIP))
    taught = teacher(model, own=CLIP, student=IMAGENET)
    close(taught.model.patch_embed(normal(pixels, IMAGENET)), wanted, atol=atol)
    features = taught.features(taught.run_to_last(normal(pixels, IMAGENET)), None)
    whole = model.forward_features(normal(pixels, CLIP))[:, 1:]
    close(features, whole, atol=1e-10 if dtype == torch.float64 else 1e-4)


def test_folding_scales_by_the_ratio_of_standard_deviations() -> None:
    model = network("clip (pre-norm, QuickGELU)")
    before = model.patch_embed.proj.weight.clone()
    fold_normalisation(model, source=IMAGENET, goal=CLIP)
    ratio = (model.patch_embed.proj.weight / before).mean((0, 2, 3))
    close(ratio, torch.tensor([0.852475, 0.857244, 0.815876]), atol=1e-5)  # spec 1.5
    assert model.patch_embed.proj.bias is not None
    assert not model.patch_embed.proj.bias.requires_grad


# --- grids ---------------------------------------------------------------------------------------


def other_patch() -> Any:
    """Patches of 7 where the student has 8: the same grid of 3 x 4 at 21 x 28 pixels."""
    torch.manual_seed(0)
    shape = {**SHAPE, "patch_size": 7, "img_size": (21, 28)}
    return randomise(VisionTransformer(**shape)).eval()


def test_grids_align_by_input_size() -> None:
    """Images of the student's size are resized as torchvision does (bicubic, antialias)."""
    model, x = other_patch(), pictures()
    taught = teacher(model)
    assert taught.input_size == (21, 28)
    small = resize(x, [21, 28], InterpolationMode.BICUBIC, antialias=True)
    close(taught.features(taught.run_to_last(x), None), model.forward_features(small)[:, 1:], atol=1e-4)
    cut_again = torch.randn(2, 3, 21, 28)  # the same crop at the teacher's own size: as it is
    assert torch.equal(
        finish(taught.model, taught.run_to_last(cut_again)), finish(model, teacher(model).run_to_last(cut_again))
    )
    close(taught.features(taught.run_to_last(cut_again), None), model.forward_features(cut_again)[:, 1:])


def test_area_and_bilinear_resampling_by_hand() -> None:
    even = resample(torch.full((1, 256, 1), 1 / 256), (16, 16), (14, 14), "area")
    assert even.sum().item() == pytest.approx(196 / 256, abs=1e-6)  # hence maps are renormalised
    numbers = torch.arange(8.0).view(1, 8, 1)  # 2 x 4: rows 0 1 2 3 and 4 5 6 7
    close(resample(numbers, (2, 4), (1, 2), "area"), torch.tensor([[[2.5], [4.5]]]))
    # a ramp stays a ramp: centres of 14 cells between the centres of 16
    column = ((torch.arange(16) + 0.5) / 16).repeat(3).view(1, 48, 1)
    ramp = ((torch.arange(14) + 0.5) / 14).repeat(3).view(1, 42, 1)
    close(resample(column, (3, 16), (3, 14), "bilinear"), ramp, atol=1e-6)


@torch.no_grad()
def test_grids_align_by_resampling() -> None:
    model, x, grid = network("dinov2 (registers, layer scale)"), pictures(), (2, 2)
    taught = teacher(model, grid=grid, grid_align="resample", feature="tokens")
    state = taught.run_to_last(x)
    raw, mass = taught.attention(state)
    row = full_map(model, x)[:, :, 0].mean(1)
    wanted = F.adaptive_avg_pool2d(row[:, 5:].view(2, 1, 3, 4), grid).flatten(1)
    close(raw, wanted, atol=1e-6)
    close(mass, row[:, :5].sum(1), atol=1e-6)

    tokens = model.forward_features(x)
    image = tokens[:, 5:].transpose(1, 2).view(2, -1, 3, 4)
    patches = F.interpolate(image, grid, mode="bilinear").flatten(2).transpose(1, 2)
    close(taught.features(state, None), patches)
    ids = torch.tensor([[3, 0], [1, 2]])
    close(
        taught.features(state, ids), torch.stack([p[i] for p, i in zip(patches, ids, strict=True)])
    )
    close(taught.features(state, None, class_token=True)[:, :1], tokens[:, :1])


# --- features --------------------------------------------------------------------------------------


def clip() -> Any:
    """CLIP's tower as timm has it: the head without bias is the projection."""
    torch.manual_seed(0)
    shape = {**SHAPE, "num_classes": 20}
    model: Any = randomise(VisionTransformer(**shape, pre_norm=True)).eval()
    nn.init.zeros_(model.head.bias)
    return model


@torch.no_grad()
def test_projected_features_are_clips_image_features() -> None:
    model, x = clip(), pictures()
    taught = teacher(model, projection=model.head.weight.detach())
    assert taught.width == 20
    both = taught.features(taught.run_to_last(x), None, class_token=True)
    close(both[:, 0], model(x))  # CLIP's own output is the class token's
    close(both[:, 1:], model.head(model.forward_features(x)[:, 1:]))
    ids = torch.tensor([[11, 2], [0, 7]])
    some = taught.features(taught.run_to_last(x), ids)
    close(some, both[:, 1:].gather(1, ids[:, :, None].expand(-1, -1, 20)))


@torch.no_grad()
def test_features_before_the_projection_and_of_the_last_blocks() -> None:
    model, x = clip(), pictures()
    plain = teacher(model, projection=model.head.weight.detach(), feature="tokens")
    assert plain.width == SHAPE["embed_dim"]
    close(plain.features(plain.run_to_last(x), None), model.forward_features(x)[:, 1:])
    mean = teacher(model, projection=model.head.weight.detach(), feature="last_k", last_k=2)
    outputs = model.forward_intermediates(x, indices=2, output_fmt="NLC", intermediates_only=True)
    close(mean.features(mean.run_to_last(x), None), torch.stack(outputs).mean(0), atol=1e-4)


@pytest.mark.parametrize("heads", ["mean", "max", "minmax_mean"])
@torch.no_grad()
def test_attention_of_the_teacher_passes_heads_on(heads: str) -> None:
    model, x = network("vit"), pictures()
    taught = teacher(model)
    rows = full_map(model, x)[:, :, 0, 1:]
    low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
    wanted = {
        "mean": rows.mean(1),
        "max": rows.amax(1),
        "minmax_mean": ((rows - low) / (high - low)).mean(1),
    }
    close(taught.attention(taught.run_to_last(x), heads)[0], wanted[heads], atol=1e-5)


# --- channels --------------------------------------------------------------------------------------


def test_a_grey_student_shows_the_teacher_the_same_channel_three_times() -> None:
    model, x = network("vit"), pictures(channels=1)
    taught = teacher(model, own=CLIP, student=((0.4,), (0.3,)))
    pixels = (x * 0.3 + 0.4).expand(-1, 3, -1, -1)
    close(
        taught.features(taught.run_to_last(x), None),
        model.forward_features(normal(pixels, CLIP))[:, 1:],
        atol=2e-4,
    )


def test_chosen_channels_in_their_order_and_with_their_statistics() -> None:
    model, x = network("vit"), pictures(channels=5)
    mean, std = (0.1, 0.2, 0.3, 0.4, 0.5), (0.2, 0.3, 0.4, 0.5, 0.6)
    taught = teacher(model, own=CLIP, student=(mean, std), channels=[3, 0, 4])
    pixels = x * torch.tensor(std).view(1, -1, 1, 1) + torch.tensor(mean).view(1, -1, 1, 1)
    wanted = model.forward_features(normal(pixels[:, [3, 0, 4]], CLIP))[:, 1:]
    close(taught.features(taught.run_to_last(x), None), wanted, atol=2e-4)


def test_channels_by_hand() -> None:
    assert teacher_channels([], 3) == (0, 1, 2)
    assert teacher_channels([], 1) == (0, 0, 0)
    assert teacher_channels([2, 1, 0], 3) == (2, 1, 0)
    for wanted, available in (([], 5), ([0, 1], 5), ([0, 1, 5], 5), ([-1, 0, 1], 5)):
        with pytest.raises(InputError, match=r"teacher\.channels"):
            teacher_channels(wanted, available)


def test_what_no_teacher_can_do_is_refused() -> None:
    overlapping = network("vit")
    overlapping.patch_embed.proj.stride = (4, 4)
    with pytest.raises(InputError, match="cannot be folded"):
        teacher(overlapping)
    with pytest.raises(InputError, match=r"\(3, 4\) cannot be aligned .*teacher\.grid_align"):
        teacher(network("vit"), grid=(14, 14))
    with pytest.raises(InputError, match=r"teacher\.feature 'logits'"):
        teacher(network("vit"), feature="logits")
    taught = teacher(network("ijepa"))
    with pytest.raises(InputError, match="class token"):
        taught.features(taught.run_to_last(pictures()), None, class_token=True)
