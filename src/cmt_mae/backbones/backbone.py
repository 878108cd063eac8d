"""A backbone: the network and what is needed to feed and to rebuild it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cmt_mae.core.errors import InputError
from cmt_mae.core.text import pixels_of

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
CROP = 224 / 256
"""Share of the shorter side that the evaluation crop keeps (MAE's, DINO's and our evaluations)."""


class Embedding(NamedTuple):
    """Features of B images after the final norm, float32."""

    cls: Tensor | None
    """(B, D) class token; None for networks without one."""
    mean: Tensor
    """(B, D) mean of the patch tokens."""
    patches: Tensor
    """(B, N, D) patch tokens, row by row."""


@dataclass
class Backbone:
    """A vision transformer without a head, and what is needed to feed and to rebuild it.

    `backbone(images)` gives features, `backbone.transform` makes images for it.
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
    """Licence of the weights as far as their source says; None or "not stated; ..." where it does not."""
    digest: str
    """sha256 over the sorted state dict, see `state_digest`; `facts` holds what it does not cover."""
    has_cls: bool
    """Token 0 is a class token (False for I-JEPA and SigLIP: token 0 is a patch)."""
    prefix_tokens: int
    """How many tokens stand before the patches: class token, distillation token, registers."""
    teacher: dict[str, str] = field(default_factory=dict)
    """name, licence, source and digest of the network that taught it, where its file says so."""
    known_from: dict[str, str] = field(default_factory=dict)
    """Where network (heads, activation, eps), normalisation and grid are known from: three short texts."""

    @property
    def facts(self) -> dict[str, Any]:
        """What features follow from besides the weights, plain JSON: part of every result and comparison."""
        return {
            "mean": [float(v) for v in self.mean],
            "std": [float(v) for v in self.std],
            **network_facts(self.model),
        }

    @property
    def network(self) -> str:
        """The network as it is, whatever architecture its name began with: ``ViT 96 x 4, patch 8, 48 px``."""
        model: Any = self.model
        patch = pixels_of(model.patch_embed.patch_size).removesuffix(" px")
        shape = f"ViT {model.embed_dim} x {len(model.blocks)}, patch {patch}"
        return f"{shape}, {pixels_of(self.img_size)}"

    @property
    def transform(self) -> Callable[[Any], Tensor]:
        """torchvision transform of a PIL image, or (H, W, C) uint8 array, to (C, H, W) float32 for this network.

        The evaluations' crop: shorter side to 256/224 of the size, bicubic, then the centre; then mean and std.
        It raises InputError for an image of other numbers, whose black and white it cannot know.
        """
        from torchvision.transforms import v2

        height, width = self.img_size
        steps: list[nn.Module] = [
            EightBits(),
            v2.ToImage(),
            CoveringResize((round(height / CROP), round(width / CROP))),
            v2.CenterCrop([height, width]),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(self.mean), list(self.std)),
        ]
        if len(self.mean) == 3:
            steps.insert(2, v2.RGB())
        transform: Callable[[Any], Tensor] = v2.Compose(steps)
        return transform

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Embedding:
        """Features of images (B, C, H, W) as `transform` makes them, on the model's device; else InputError."""
        channels = len(self.mean)
        if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != channels:
            shape = tuple(getattr(images, "shape", ()))
            raise InputError(
                f"the images are a {type(images).__name__} {shape}: give a tensor (B, {channels}, H, W), "
                "such as torch.stack of what backbone.transform makes"
            )
        if not images.is_floating_point():
            raise InputError(
                f"the images are {images.dtype}, not normalised: give what backbone.transform makes of them"
            )
        parameter = next(self.model.parameters())
        network: Any = self.model
        tokens = network.forward_features(images.to(parameter.device, parameter.dtype))
        after: nn.Module = getattr(network, "fc_norm", None) or nn.Identity()
        patches = tokens[:, self.prefix_tokens :]
        cls = after(tokens[:, 0]).float() if self.has_cls else None
        return Embedding(cls, after(patches.mean(1)).float(), patches.float())


class EightBits(nn.Module):
    """Passes on a PIL image or array of 8 bits, and refuses others, which would be cut off or near black."""

    def forward(self, image: Any) -> Any:
        """The image as it is. Raises InputError."""
        mode = getattr(image, "mode", None)
        pil = isinstance(mode, str)  # a tensor has a method of this name
        kind = str(mode if pil else getattr(image, "dtype", "uint8"))
        deep = kind[0] in "IF" if pil else not kind.endswith("uint8")
        if deep:
            raise InputError(
                f"an image of {kind}: give one of 8 bits (PIL, or uint8 from 0 to 255)"
            )
        return image


class CoveringResize(nn.Module):
    """Scale an image (C, H, W) uint8 so that it just covers `size`, bicubic with antialiasing."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, image: Tensor) -> Tensor:
        from torchvision.transforms.v2 import InterpolationMode, functional

        (height, width), (th, tw) = image.shape[-2:], self.size
        if th * width >= tw * height:
            new = [th, max(tw, int(th * width / height))]
        else:
            new = [max(th, int(tw * height / width)), tw]
        resized: Tensor = functional.resize(image, new, InterpolationMode.BICUBIC, antialias=True)
        return resized


def network_facts(model: nn.Module) -> dict[str, Any]:
    """heads, eps and activation of a timm ViT's blocks, as the modules themselves have them."""
    block: Any = model.blocks[0]  # type: ignore[index]
    act = getattr(block.mlp, "act", None)
    return {
        "heads": int(block.attn.num_heads),
        "eps": float(block.norm1.eps),
        "activation": type(act).__name__ if act is not None else type(block.mlp).__name__,
    }


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
