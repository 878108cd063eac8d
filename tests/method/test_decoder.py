"""The decoders: places of tokens, MAE's start, and MILAN's equations through torch's own attention."""

from typing import Any

import pytest
import torch
from method_nets import randomise
from torch import Tensor, nn

from cmt_mae.core.errors import InputError
from cmt_mae.method.decoder import Decoder, DecoderConfig
from cmt_mae.method.masking import Mask, from_priority
from cmt_mae.method.prompting import PromptingBlock
from cmt_mae.method.vit import sincos_table

GRID = (3, 4)
ENCODER = 24


def decoder(kind: str = "mae", depth: int = 2) -> Any:
    torch.manual_seed(0)
    config = DecoderConfig(kind=kind, width=16, depth=depth, heads=2)
    made = Decoder(config, ENCODER, GRID)
    positions = made.pos_embed.clone()
    randomise(made)
    made.pos_embed.data.copy_(positions)
    return made.eval()


def case() -> tuple[Tensor, Mask]:
    """Latents of three visible patches of twelve in two images, and which they are."""
    generator = torch.Generator().manual_seed(2)
    mask = from_priority(torch.rand(2, 12, generator=generator), 9)
    return torch.randn(2, 4, ENCODER, generator=generator), mask


def placed(model: Decoder, latents: Tensor, mask: Mask) -> Tensor:
    """Embedded tokens in raster order with positions, put in place one by one."""
    visible = latents @ model.embed.weight.T + model.embed.bias
    rows = []
    for image in range(len(latents)):
        tokens = [model.mask_token[0, 0]] * 12
        for number, place in enumerate(mask.ids_keep[image].tolist()):
            tokens[place] = visible[image, 1 + number]
        rows.append(torch.stack([visible[image, 0], *tokens]))
    return torch.stack(rows) + model.pos_embed


def test_mae_decoder_runs_every_token_through_every_block() -> None:
    """Against torch's own pre-norm encoder layer with the same weights."""
    model, (latents, mask) = decoder(), case()
    tokens = placed(model, latents, mask)
    for block in model.blocks:
        layer = nn.TransformerEncoderLayer(
            16, 2, 64, activation="gelu", norm_first=True, layer_norm_eps=1e-6, batch_first=True
        )
        layer.self_attn.load_state_dict(
            {
                "in_proj_weight": block.attn.qkv.weight,
                "in_proj_bias": block.attn.qkv.bias,
                "out_proj.weight": block.attn.proj.weight,
                "out_proj.bias": block.attn.proj.bias,
            }
        )
        for theirs, ours in (
            (layer.norm1, block.norm1),
            (layer.norm2, block.norm2),
            (layer.linear1, block.mlp.fc1),
            (layer.linear2, block.mlp.fc2),
        ):
            theirs.load_state_dict(ours.state_dict())
        tokens = layer.train(False)(tokens)
    wanted = nn.functional.layer_norm(tokens, (16,), model.norm.weight, model.norm.bias, 1e-6)
    torch.testing.assert_close(model(latents, mask), wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_prompting_decoder_follows_milans_equations() -> None:
    """Keys and values: visible tokens as they are, hidden ones after norm1; queries: hidden ones."""
    model, (latents, mask) = decoder("prompting"), case()
    fixed = placed(model, latents, mask)
    places = 1 + mask.ids_mask
    wanted = []
    for image in range(2):
        hidden = fixed[image, places[image]]
        for block in model.blocks:
            assert isinstance(block, PromptingBlock)
            asked = block.norm1(hidden)
            known = fixed[image].clone()
            known[places[image]] = asked
            attention = nn.MultiheadAttention(16, 2)
            attention.in_proj_weight.copy_(torch.cat([block.query.weight, block.key_value.weight]))
            attention.in_proj_bias.copy_(torch.cat([block.query.bias, block.key_value.bias]))
            attention.out_proj.load_state_dict(block.proj.state_dict())
            hidden = hidden + attention(asked, known, known)[0]
            hidden = hidden + block.mlp(block.norm2(hidden))
        whole = fixed[image].clone()
        whole[places[image]] = hidden
        wanted.append(model.norm(whole))
    torch.testing.assert_close(model(latents, mask), torch.stack(wanted), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["mae", "prompting"])
def test_gradient_flows_into_every_parameter_and_latent(kind: str) -> None:
    model, (latents, mask) = decoder(kind), case()
    latents.requires_grad_()
    out = model(latents, mask)
    assert out.shape == (2, 13, 16)
    weights = torch.linspace(-1, 1, 16)  # a plain sum after a norm has no gradient
    (out[:, 1:][mask.mask] * weights).sum().backward()
    assert latents.grad is not None
    assert (latents.grad.abs().amax(-1) > 0).all()
    for name, parameter in model.named_parameters():
        if name == "pos_embed":
            assert parameter.grad is None
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


def test_decoder_starts_as_maes() -> None:
    model = Decoder(DecoderConfig(width=64, depth=2, heads=4), 48, GRID)
    assert torch.equal(model.pos_embed[0], sincos_table(64, GRID))
    assert not model.pos_embed.requires_grad
    assert model.mask_token.std().item() == pytest.approx(0.02, rel=0.35)
    for name, part in model.named_modules():
        if isinstance(part, nn.Linear):
            bound = (6 / (part.in_features + part.out_features)) ** 0.5
            assert 0.98 * bound < part.weight.abs().max() <= bound, name
            assert not part.bias.any(), name
        if isinstance(part, nn.LayerNorm):
            assert part.eps == 1e-6, name  # torch's own default is 1e-5


def test_head_width_is_32_by_default() -> None:
    with torch.device("meta"):
        model: Any = Decoder(DecoderConfig(), 768, (14, 14))
    assert len(model.blocks) == 8
    assert model.blocks[0].attn.num_heads == 16
    assert model.blocks[0].attn.head_dim == 32
    assert model.pos_embed.shape == (1, 197, 512)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (DecoderConfig(width=30, heads=3), r"decoder\.width 30"),
        (DecoderConfig(width=32, heads=5), r"decoder\.width 32"),
    ],
)
def test_impossible_decoders_are_refused(config: DecoderConfig, named: str) -> None:
    with pytest.raises(InputError, match=named):
        Decoder(config, ENCODER, GRID)


@pytest.mark.parametrize("kind", ["mae", "prompting"])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_hidden_only_equals_picking_hidden_tokens(kind: str, depth: int) -> None:
    """The last block run for hidden tokens alone: values and every gradient, in fp64."""
    model, (latents, mask) = decoder(kind, depth).double(), case()
    weight = torch.randn(2, 9, 16, dtype=torch.float64)
    found = []
    for which in ("all+cls", "masked"):
        given = latents.double().requires_grad_()
        model.zero_grad()
        tokens = model(given, mask, which)
        if which != "masked":
            tokens = tokens[:, 1:].gather(1, mask.ids_mask[:, :, None].expand(-1, -1, 16))
        (tokens * weight).sum().backward()
        gradients = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for name, p in model.named_parameters()
            if p.requires_grad
        }
        found.append({"tokens": tokens.detach(), "latents": given.grad, **gradients})
    assert found[0]["latents"].abs().sum() > 0 or depth == 0
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-12, rtol=1e-10, msg=name)
