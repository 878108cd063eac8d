"""With random mask, pixel target and one head the module IS MAE: official numbers and transformers."""

import re
from functools import partial
from typing import Any

import pytest
import torch
from timm.layers import LayerNorm
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from cmt_mae.method.cmtmae import Alphas, MaskConfig, StudentWithDecoder, TargetConfig
from cmt_mae.method.decoder import DecoderConfig
from cmt_mae.method.frozen import FrozenNetworks
from cmt_mae.method.masking import count_masked, sample_mask
from cmt_mae.method.targets import normalise_target, patchify
from cmt_mae.method.vit import StudentConfig, build_student, encode_visible, sincos_table

# --- the golden case of spec 12.3: the official code's numbers, in double precision --------------


def golden(*values: float) -> Any:
    """To 1e-10, whatever the size."""
    return pytest.approx(values[0] if len(values) == 1 else list(values), abs=1e-10, rel=0)


def golden_learner() -> StudentWithDecoder:
    """Image 32, patch 8, width 16, depth 2, 4 heads; decoder 8, depth 1, 2 heads; MLP ratio 2."""
    student = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=4, mlp_ratio=2, num_classes=0
    )
    student.pos_embed = nn.Parameter(sincos_table(16, (4, 4))[None], requires_grad=False)
    learner = StudentWithDecoder(
        student,
        DecoderConfig(width=8, depth=1, heads=2),
        TargetConfig("pixel", "mae"),
        {"pixel": 192},
    )
    block: Any = partial(Block, mlp_ratio=2, qkv_bias=True, norm_layer=LayerNorm)
    learner.decoder.blocks = nn.ModuleList([block(8, 2)])
    return learner.double()


def official_order(learner: StudentWithDecoder) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters as MaskedAutoencoderViT.named_parameters() lists them, less positions."""
    block = [
        f"{part}.{kind}"
        for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        for kind in ("weight", "bias")
    ]
    names = ["student.cls_token", "decoder.mask_token"]
    names += [f"student.patch_embed.proj.{kind}" for kind in ("weight", "bias")]
    names += [f"student.blocks.{i}.{name}" for i in range(2) for name in block]
    names += [f"student.norm.{kind}" for kind in ("weight", "bias")]
    names += [f"decoder.embed.{kind}" for kind in ("weight", "bias")]
    names += [f"decoder.blocks.0.{name}" for name in block]
    names += [f"decoder.norm.{kind}" for kind in ("weight", "bias")]
    names += [f"heads.pixel.{kind}" for kind in ("weight", "bias")]
    parameters = dict(learner.named_parameters())
    assert set(names) == set(parameters) - {"student.pos_embed", "decoder.pos_embed"}
    return [(name, parameters[name]) for name in names]


@torch.no_grad()
def fill(learner: StudentWithDecoder) -> None:
    total = 0
    for i, (name, parameter) in enumerate(official_order(learner), start=1):
        index = torch.arange(parameter.numel(), dtype=torch.float64)
        if name.endswith(("norm1.weight", "norm2.weight", "norm.weight")):
            values = 1 + 0.1 * torch.sin(index + i)
        else:
            values = torch.sin(0.37 * (index + 1) + 0.11 * i) * 0.2
        parameter.copy_(values.view_as(parameter))
        total += parameter.numel()
    total += sum(p.numel() for n, p in learner.named_parameters() if n.endswith("pos_embed"))
    assert total == 10_480


def golden_input() -> tuple[Tensor, Tensor]:
    images = torch.cos(0.01 * torch.arange(2 * 3 * 32 * 32, dtype=torch.float64))
    noise = (torch.arange(1, 33, dtype=torch.float64) * 0.6180339887498949).frac()
    return images.view(2, 3, 32, 32), noise.view(2, 16)


def test_golden_numbers_of_the_official_mae() -> None:
    learner, (images, noise) = golden_learner(), golden_input()
    fill(learner)
    mask = sample_mask("random", count_masked(16, 0.75), noise, (4, 4))
    assert mask.mask.int().tolist() == [
        [1, 0, 1, 1, 0, 1, 1, 1, 1, 0, 1, 1, 0, 1, 1, 1],
        [1, 0, 1, 1, 1, 1, 0, 1, 1, 0, 1, 1, 1, 1, 0, 1],
    ]
    tokens = learner.decoder(encode_visible(learner.student, images, mask.ids_keep), mask)
    pred = learner.heads["pixel"](tokens[:, 1:])
    assert pred[0, 0, :4].tolist() == golden(
        0.6684145821825107, -0.8944078529962942, 0.8916154884518246, -0.7777997317472354
    )
    assert pred[1, 15, :4].tolist() == golden(
        0.29435760480401585, -0.505796800675127, 0.50122998095767, -0.39847774247166606
    )
    assert pred.sum().item() == pytest.approx(22.250267287902844, abs=1e-9)
    assert pred.abs().sum().item() == pytest.approx(2719.294107402482, abs=1e-9)

    patches = patchify(images, 8)[mask.mask].view(2, 12, 192)
    raw, _ = learner(images, mask, {"pixel": normalise_target(patches, "none")})
    assert raw.item() == golden(0.738728439360098)
    loss, logs = learner(images, mask, {"pixel": normalise_target(patches, "mae")})
    assert loss.item() == golden(1.23528156976459)
    assert logs["loss"].item() == logs["loss_pixel"].item() == loss.item()
    loss.backward()
    square = sum((p.grad**2).sum() for _, p in official_order(learner) if p.grad is not None)
    assert float(square) ** 0.5 == golden(0.9513607304795796)


# --- transformers' ViTMAE, same weights and noise --------------------------------------------------

OLD_NAMES = (  # transformers 4 -> 5
    ("vit.encoder.layer.", "vit.layers."),
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
)
NAMES = (  # ours -> transformers'
    (r"^student\.patch_embed\.proj", "vit.embeddings.patch_embeddings.projection"),
    (r"^student\.cls_token", "vit.embeddings.cls_token"),
    (r"^student\.pos_embed", "vit.embeddings.position_embeddings"),
    (r"^student\.blocks", "vit.layers"),
    (r"^student\.norm", "vit.layernorm"),
    (r"^decoder\.blocks", "decoder.decoder_layers"),
    (r"^decoder\.(embed|norm|pos_embed)", r"decoder.decoder_\1"),
    (r"^heads\.pixel", "decoder.decoder_pred"),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
)


def in_their_names(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names of transformers 5, fused q k v parted."""
    renamed = {}
    for name, tensor in ours.items():
        for pattern, goal in NAMES:
            name = re.sub(pattern, goal, name)
        if ".attn.qkv." in name:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                renamed[name.replace(".attn.qkv.", f".attention.{part}_proj.")] = piece
        else:
            renamed[name] = tensor
    return renamed


def new_name(theirs: str) -> str:
    for old, new in OLD_NAMES:
        theirs = theirs.replace(old, new)
    return theirs


def transformers_mae(learner: StudentWithDecoder, **more: Any) -> ViTMAEForPreTraining:
    config = ViTMAEConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        image_size=32, patch_size=8, decoder_hidden_size=16, decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2, decoder_intermediate_size=64, layer_norm_eps=1e-6,
        mask_ratio=0.75, **more,
    )  # fmt: skip
    model = ViTMAEForPreTraining(config).double()
    ours = in_their_names(learner.state_dict())
    model.load_state_dict({name: ours[new_name(name)] for name in model.state_dict()}, strict=True)
    assert len(ours) == len(model.state_dict())
    return model


def random_learner(norm: str) -> StudentWithDecoder:
    torch.manual_seed(0)
    student = build_student(StudentConfig(img_size=[32], patch_size=8, width=32, depth=2, heads=4))
    learner = StudentWithDecoder(
        student,
        DecoderConfig(width=16, depth=2, heads=2),
        TargetConfig("pixel", norm),
        {"pixel": 192},
    )
    with torch.no_grad():
        for name, parameter in learner.named_parameters():
            if not name.endswith("pos_embed"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return learner.double()


@pytest.mark.parametrize("norm", ["mae", "none"])
def test_equals_transformers_vit_mae(norm: str) -> None:
    """Loss, predictions, mask and every gradient, through our guides and learner as in a run."""
    learner = random_learner(norm)
    theirs = transformers_mae(learner, norm_pix_loss=norm == "mae")
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=generator)
    noise = torch.rand(3, 32, generator=generator)
    expected = theirs(images, noise=noise[:, :16])
    expected.loss.backward()

    guides = FrozenNetworks(
        MaskConfig(rule="random"), learner.target, teacher=None, grid=(4, 4), patch_size=8,
        mean=(0.0,) * 3, std=(1.0,) * 3,
    )  # fmt: skip
    mask, targets, _ = guides(images, noise, 12, Alphas(0.0, 0.0))
    assert torch.equal(mask.mask, expected.mask.bool())
    loss, _ = learner(images, mask, targets)
    loss.backward()
    assert loss.item() == pytest.approx(expected.loss.item(), abs=1e-12)
    tokens = learner.decoder(encode_visible(learner.student, images, mask.ids_keep), mask)
    torch.testing.assert_close(
        learner.heads["pixel"](tokens[:, 1:]), expected.logits, atol=1e-12, rtol=0
    )
    gradients = in_their_names(
        {name: p.grad for name, p in learner.named_parameters() if p.grad is not None}
    )
    compared = 0
    for name, parameter in theirs.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(
                gradients[new_name(name)], parameter.grad, atol=1e-12, rtol=1e-9
            )
            compared += 1
    assert compared == len(gradients)
