"""Layer-wise rates against spec 12.5, against MAE's rule by hand and against timm's groups."""

from typing import Any

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from cmt_mae.engine.layer_decay import layer_decay_groups, layer_scales

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 4}


class Wrapped(nn.Module):
    """As the trained modules hold it: the network below ``backbone.``"""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.backbone = network


def rates(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Name -> (scale of the rate, weight decay)."""
    names = {id(p): n.removeprefix("backbone.") for n, p in model.named_parameters()}
    return {
        names[id(p)]: (group["lr_scale"], group["weight_decay"])
        for group in groups
        for p in group["params"]
    }


def test_scales_of_spec_12_5() -> None:
    scales = layer_scales(12, 0.65)
    assert len(scales) == 14
    assert [round(s, 6) for s in scales[:2]] == [0.003697, 0.005688]
    assert scales[-2:] == [0.65, 1.0]
    assert layer_scales(24, 0.75)[0] == pytest.approx(0.75**25)
    assert layer_scales(3, 1.0) == [1.0] * 5


@pytest.mark.parametrize(
    ("architecture", "more"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_tiny_patch16_224", {"reg_tokens": 2, "pre_norm": True}),
        ("vit_tiny_patch16_224", {"class_token": False}),
        ("eva02_tiny_patch14_224", {}),
        ("beit_base_patch16_224", {}),
    ],
)
def test_groups_are_timms(architecture: str, more: dict[str, Any]) -> None:
    network: Any = timm.create_model(
        architecture, num_classes=5, global_pool="avg", **SMALL, **more
    )
    model = Wrapped(network)
    theirs = param_groups_layer_decay(
        network, 0.05, no_weight_decay_list=network.no_weight_decay(), layer_decay=0.65
    )
    bare = {name.rsplit(".", 1)[-1] for name in network.no_weight_decay()}
    ours = layer_decay_groups(model, 4, 0.65, 0.05, no_decay=bare)
    expected = rates(network, theirs)
    found = rates(model, ours)
    assert found.keys() == expected.keys() == dict(network.named_parameters()).keys()
    for name, (scale, decay) in expected.items():
        assert found[name] == (pytest.approx(scale), decay), name
    assert found["head.weight"] == (1.0, 0.05)
    assert found["pos_embed" if network.pos_embed is not None else "cls_token"][1] == 0.0


def test_the_final_norm_before_a_class_token_belongs_to_the_head_as_in_mae() -> None:
    """timm puts it with the last block; MAE's lr_decay.py and BEiT's with what stands behind the blocks."""
    network: Any = timm.create_model("vit_tiny_patch16_224", num_classes=5, **SMALL)
    found = rates(Wrapped(network), layer_decay_groups(Wrapped(network), 4, 0.65, 0.05))
    theirs = rates(network, param_groups_layer_decay(network, 0.05, layer_decay=0.65))
    assert found["norm.weight"] == (1.0, 0.0)
    assert theirs["norm.weight"] == (0.65, 0.0)
    differing = {n for n in found if found[n][0] != pytest.approx(theirs[n][0])}
    assert differing == {"norm.weight", "norm.bias"}


def test_what_is_frozen_is_in_no_group() -> None:
    network: Any = timm.create_model("vit_tiny_patch16_224", num_classes=5, **SMALL)
    network.patch_embed.requires_grad_(False)
    network.blocks[0].requires_grad_(False)
    found = rates(Wrapped(network), layer_decay_groups(Wrapped(network), 4, 0.65, 0.05))
    assert not any(n.startswith(("patch_embed.", "blocks.0.")) for n in found)
    assert found["blocks.1.norm1.weight"][0] == pytest.approx(0.65**3)
    assert torch.tensor([s for s, _ in found.values()]).max() == 1
