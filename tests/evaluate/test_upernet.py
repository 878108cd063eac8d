"""UPerNet against plain functional computations, counts by formula, and a segmenter that learns."""

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ResNetConfig, UperNetConfig
from transformers.models.upernet import modeling_upernet

from cmt_mae.backbones import Backbone
from cmt_mae.backbones.backbone import HALF
from cmt_mae.core.errors import InputError
from cmt_mae.engine.layer_decay import layer_decay_groups, layer_scales
from cmt_mae.evaluate.upernet import (
    FCNHead,
    Segmenter,
    UPerHead,
    pixel_loss,
)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def shaken(module: nn.Module) -> nn.Module:
    """Norms with statistics and factors of their own, so that a forgotten one shows."""
    torch.manual_seed(3)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.uniform_(part.bias, -0.5, 0.5)
            assert part.running_mean is not None
            assert part.running_var is not None
            part.running_mean.uniform_(-0.3, 0.3)
            part.running_var.uniform_(0.5, 2.0)
    return module.eval()


def bilinear(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizing written out, align_corners False: output pixel i looks at (i + .5) n / m - .5, clamped at 0."""
    for axis, wanted in ((-2, size[0]), (-1, size[1])):
        have = x.shape[axis]
        at = ((torch.arange(wanted) + 0.5) * have / wanted - 0.5).clamp_min(0)
        low = at.floor().long()
        high, share = (low + 1).clamp_max(have - 1), at - low
        shape = [-1, 1] if axis == -2 else [-1]
        first, second = x.index_select(axis, low), x.index_select(axis, high)
        x = first + (second - first) * share.view(shape)
    return x


def maps(width: int, size: tuple[int, int] = (24, 40)) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(2, width, size[0] >> i, size[1] >> i) for i in range(4)]


def load_from_huggingface(ours: nn.Module, theirs: nn.Module, names: dict[str, str]) -> None:
    """names: beginnings of theirs -> ours."""
    state = {}
    for key, value in theirs.state_dict().items():
        for old, new in {".conv.": ".0.", ".batch_norm.": ".1.", **names}.items():
            key = key.replace(old, new, 1)
        state[key] = value
    ours.load_state_dict(state)


@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_heads_are_those_of_transformers(training: bool) -> None:
    """UperNetHead and UperNetFCNHead of Hugging Face, with their weights; batch statistics too."""
    config = UperNetConfig(
        hidden_size=8, num_labels=5, auxiliary_channels=16, auxiliary_num_convs=1,
        pool_scales=[1, 2, 3, 6], backbone_config=ResNetConfig(),
    )  # fmt: skip
    theirs = shaken(modeling_upernet.UperNetHead(config, [6] * 4)).train(training)
    config.auxiliary_in_channels = 6
    beside = shaken(modeling_upernet.UperNetFCNHead(config, [6] * 4)).train(training)
    ours, auxiliary = UPerHead(6, 5, 8, dropout=0.0), FCNHead(6, 5, 16, 0.0)
    pools = {f"psp_modules.{i}.1.": f"pooling.branches.{i}." for i in range(4)}
    names = pools | {"fpn_bottleneck": "smoothing", "bottleneck": "pooling.bottleneck"}
    names |= {"smoothing": "bottleneck", "lateral_convs": "laterals", "fpn_convs": "smooth"}
    load_from_huggingface(ours, theirs, names | {"classifier.": "classify.conv."})
    load_from_huggingface(auxiliary, beside, {"convs.0.": "0.", "classifier.": "1.conv."})
    features = maps(6)
    wanted, wanted_beside = theirs(features), beside(features)
    torch.testing.assert_close(ours.train(training)(features), wanted, atol=1e-5, rtol=1e-5)
    found = auxiliary.train(training)(features[2])
    torch.testing.assert_close(found, wanted_beside, atol=1e-5, rtol=1e-5)
    if training:
        theirs_after = theirs.state_dict()["fpn_bottleneck.batch_norm.running_var"]
        torch.testing.assert_close(ours.state_dict()["bottleneck.1.running_var"], theirs_after)


@pytest.mark.parametrize(("d", "c", "k"), [(768, 768, 150), (48, 16, 11)])
def test_parameters_by_formula(d: int, c: int, k: int) -> None:
    """Convolutions have no bias, norms two numbers a channel; the classifier has a bias."""
    with torch.device("meta"):
        head, auxiliary = UPerHead(d, k, c), FCNHead(d, k, 256, 0.1)
    lateral, smooth = d * c + 2 * c, 9 * c * c + 2 * c
    pooling = 4 * lateral + 9 * (d + 4 * c) * c + 2 * c
    fuse = 9 * 4 * c * c + 2 * c
    assert count(head) == 3 * lateral + pooling + 3 * smooth + fuse + c * k + k
    assert count(auxiliary) == 9 * d * 256 + 2 * 256 + 256 * k + k
    if d == 768:
        assert (count(head), count(auxiliary)) == (67_963_542, 1_808_534)  # also by pencil


def test_dropout_drops_whole_channels() -> None:
    torch.manual_seed(0)
    head = UPerHead(6, 5, channels=4, dropout=0.5).train()
    x = torch.ones(64, 4, 3, 3)
    dropped = head.classify.dropout(x)
    each = dropped.flatten(2)
    assert (each == each[..., :1]).all()
    assert set(each.unique().tolist()) == {0.0, 2.0}


# --- loss ---------------------------------------------------------------------------------------


def test_loss_is_the_sum_over_labelled_pixels_by_all_pixels() -> None:
    logits = torch.tensor([[[[0.0, 2.0]], [[0.0, 0.0]]]])  # two classes, two pixels
    one = torch.tensor(2.0).exp()
    wrong = -(1 / (1 + one)).log()
    half = torch.tensor(2.0).log()
    assert pixel_loss(logits, torch.tensor([[[0, 1]]])) == pytest.approx(float(half + wrong) / 2)
    assert pixel_loss(logits, torch.tensor([[[-1, 1]]])) == pytest.approx(float(wrong) / 2)
    assert pixel_loss(logits, torch.tensor([[[-1, -1]]])) == 0.0  # torch's own mean would be NaN


def test_loss_resizes_logits_and_adds_up_over_micro_batches() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 5, 6, 6), torch.randint(-1, 5, (4, 24, 20))
    wanted = F.cross_entropy(bilinear(logits, (24, 20)), labels, ignore_index=-1, reduction="sum")
    found = pixel_loss(logits, labels)
    torch.testing.assert_close(found, wanted / (4 * 24 * 20))
    halves = [pixel_loss(logits[i : i + 2], labels[i : i + 2]) for i in (0, 2)]
    torch.testing.assert_close(torch.stack(halves).mean(), found)


# --- the whole network --------------------------------------------------------------------------


def backbone(
    size: int = 32, patch: int = 8, architecture: str = "vit_tiny_patch16_224"
) -> Backbone:
    torch.manual_seed(0)
    kwargs = {
        "img_size": (size, size),
        "patch_size": patch,
        "embed_dim": 24,
        "depth": 4,
        "num_heads": 2,
    }
    model: Any = timm.create_model(architecture, num_classes=0, **kwargs).eval()
    return Backbone(
        model=model, architecture=architecture, kwargs=kwargs, mean=HALF, std=HALF,
        img_size=(size, size), proj=None, source="a test", licence=None, digest="d", has_cls=True,
        prefix_tokens=1,
    )  # fmt: skip


def segmenter(size: int = 32, patch: int = 8, **more: Any) -> Segmenter:
    return Segmenter(backbone(size, patch), 5, channels=8, **more)


@pytest.mark.parametrize(("size", "patch"), [(32, 8), (64, 16), (28, 7), (56, 14)])
@torch.no_grad()
def test_logits_have_the_pixels_resolution(size: int, patch: int) -> None:
    model = segmenter(size, patch).eval()
    for h, w in ((size, size), (size - 5, size - 9), (3, size)):
        assert model.logits(torch.randn(2, 3, h, w)).shape == (2, 5, h, w)


@torch.no_grad()
def test_smaller_inputs_are_padded_with_the_mean_colour() -> None:
    model = segmenter().eval()
    small = torch.randn(1, 3, 20, 27)
    padded = torch.zeros(1, 3, 32, 32)
    padded[..., :20, :27] = small
    torch.testing.assert_close(model.logits(small), model.logits(padded)[..., :20, :27])


def test_losses_are_those_of_the_two_heads() -> None:
    model = segmenter(drop_path=0.0, dropout=0.0).train()
    batch = {"images": torch.randn(3, 3, 32, 32), "labels": torch.randint(-1, 5, (3, 32, 32))}
    losses = model(batch)
    assert set(losses) == {"loss_segmentation", "loss_auxiliary"}
    features = model.maps(batch["images"])
    assert [m.shape[-1] for m in features] == [8, 4, 2, 1]
    wanted = pixel_loss(model.head(features), batch["labels"])
    torch.testing.assert_close(losses["loss_segmentation"], wanted)
    beside = pixel_loss(model.auxiliary(features[2]), batch["labels"])
    torch.testing.assert_close(losses["loss_auxiliary"], 0.4 * beside)


@torch.no_grad()
def test_relative_positions_and_layer_scale_begin_as_nothing_and_learn() -> None:
    torch.manual_seed(5)
    plain = segmenter().eval()
    torch.manual_seed(5)
    more = segmenter(relative_bias=True, layer_scale=1.0).eval()
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(more.logits(x), plain.logits(x), atol=1e-5, rtol=1e-5)
    names = {name for name, _ in more.named_parameters()} - {n for n, _ in plain.named_parameters()}
    assert names == {f"backbone.biases.{i}.table" for i in range(4)} | {
        f"backbone.vit.blocks.{i}.ls{j}.gamma" for i in range(4) for j in (1, 2)
    }
    tables = [p for n, p in more.named_parameters() if n.endswith(".table")]
    assert all(t.shape == (7 * 7 + 3, 2) for t in tables)  # the window's grid is 4 x 4


def test_every_parameter_has_the_published_rate_and_decay() -> None:
    """The trap of spec 8: class token and positions do decay. Tables and scales go with their block."""
    model = segmenter(relative_bias=True, layer_scale=1.0)
    groups = layer_decay_groups(model, 4, 0.5, 0.05, no_decay=())
    found = {
        name: (group["lr_scale"], group["weight_decay"])
        for group in groups
        for name in group["names"]
    }
    assert found.keys() == {name for name, _ in model.named_parameters()}
    scale = layer_scales(4, 0.5)
    assert scale == [0.03125, 0.0625, 0.125, 0.25, 0.5, 1.0]
    assert found["backbone.vit.cls_token"] == found["backbone.vit.pos_embed"] == (scale[0], 0.05)
    assert found["backbone.vit.patch_embed.proj.weight"] == (scale[0], 0.05)
    assert found["backbone.vit.blocks.2.attn.qkv.weight"] == (scale[3], 0.05)
    assert found["backbone.vit.blocks.2.ls1.gamma"] == (scale[3], 0.0)
    assert found["backbone.biases.2.table"] == (scale[3], 0.05)
    assert found["pyramid.levels.0.0.weight"] == (1.0, 0.05)
    assert found["head.classify.conv.bias"] == (1.0, 0.0)
    assert found["head.bottleneck.1.weight"] == (1.0, 0.0)


def test_networks_with_positions_of_their_own_refuse_more() -> None:
    beit = backbone(architecture="beit_base_patch16_224")
    with pytest.raises(InputError, match="leave relative_bias off"):
        Segmenter(beit, 3, channels=8, relative_bias=True)
    with pytest.raises(InputError, match="layer scale cannot be added to a Beit"):
        Segmenter(beit, 3, channels=8, layer_scale=1.0)
    with torch.no_grad():  # and work without, windows padded to the one size they know
        model = Segmenter(beit, 3, channels=8).eval()
        assert model.logits(torch.randn(1, 3, 30, 17)).shape == (1, 3, 30, 17)
