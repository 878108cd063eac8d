"""What every part of the package receives when it asks for a backbone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)


@dataclass
class Backbone:
    """A vision transformer without a head, and what is needed to feed and to rebuild it.

    `timm.create_model(architecture, pretrained=False, num_classes=0, **kwargs)` rebuilds `model`;
    `model.forward_features(x)` with x (B, C, H, W) gives tokens (B, prefix_tokens + N, D) after the
    final norm. (A network that was fine-tuned on its average-pooled tokens has no final norm on
    tokens: its norm comes after pooling, as `model.fc_norm`.)
    """

    model: nn.Module
    """timm VisionTransformer, Eva or Beit; eval mode, float32, num_classes=0."""
    architecture: str
    """Name for timm.create_model, without a tag."""
    kwargs: dict[str, Any]
    """Arguments for timm.create_model; plain numbers, strings, booleans and tuples."""
    mean: tuple[float, ...]
    """Per channel mean that its input is normalised with, for pixels in 0..1."""
    std: tuple[float, ...]
    """Per channel standard deviation that its input is normalised with, for pixels in 0..1."""
    img_size: tuple[int, int]
    """Input height and width in pixels."""
    proj: Tensor | None
    """(E, D) projection of CLIP, for tokens after the final norm: tokens @ proj.T; None if none."""
    source: str
    """One line: where the weights come from and in which format they were."""
    licence: str | None
    """Licence of the weights as far as their source says."""
    digest: str
    """sha256 over the sorted state dict, see `state_digest`."""
    has_cls: bool
    """Token 0 is a class token (False for I-JEPA and SigLIP: token 0 is a patch)."""
    prefix_tokens: int
    """How many tokens stand before the patches: class token, distillation token, registers."""
    teacher: dict[str, str] = field(default_factory=dict)
    """name, licence, source and digest of the network that taught it, where its file says so."""


def state_digest(state: dict[str, Tensor]) -> str:
    """sha256 (hex) over names, types, shapes and bytes of a state dict, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def backbone_digest(model: nn.Module, proj: Tensor | None) -> str:
    """Digest of a backbone: its model's state dict in float32, and CLIP's projection if any."""
    state = learned_state(model)
    if proj is not None:
        state["proj"] = proj
    return state_digest({k: v.float() for k, v in state.items()})


def learned_state(model: nn.Module) -> dict[str, Tensor]:
    """State dict without BEiT's index of relative positions, a constant that old timm keeps in."""
    state = model.state_dict()
    return {k: v for k, v in state.items() if not k.endswith("relative_position_index")}
