"""UPerNet on a plain ViT: pyramid pooling, feature pyramid, auxiliary FCN head (spec 8; Xiao et al. 2018).

Modules, norms, activations and the losses' mean are those of mmseg's UPerHead and FCNHead, which the
published numbers were made with.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerScale
from torch import Tensor, nn

from cmt_mae.backbones import Backbone
from cmt_mae.core.errors import InputError
from cmt_mae.data.ade20k import IGNORED
from cmt_mae.evaluate.pyramid import DeconvPyramid, Taps, default_taps, depth_of, patch_of

POOL_SIDES = (1, 2, 3, 6)
AUXILIARY_LEVEL = 2
AUXILIARY_CHANNELS = 256


class ConvNormAct(nn.Sequential):
    """Convolution without bias (padded to keep the size), batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        super().__init__(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def resize(maps: Tensor, size: torch.Size) -> Tensor:
    """(B, K, h, w) -> (B, K, *size): bilinear, align_corners False."""
    if maps.shape[-2:] == size:
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


class PyramidPooling(nn.Module):
    """PPM: the map beside its means over 1, 4, 9 and 36 cells, brought to one map (PSPNet)."""

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(ConvNormAct(inputs, channels, 1) for _ in POOL_SIDES)
        self.bottleneck = ConvNormAct(inputs + len(POOL_SIDES) * channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, channels, h, w)."""
        size = x.shape[-2:]
        pooled = [
            resize(branch(F.adaptive_avg_pool2d(x, side)), size)
            for side, branch in zip(POOL_SIDES, self.branches, strict=True)
        ]
        return self.bottleneck(torch.cat([x, *pooled], dim=1))


class Classify(nn.Module):
    """Dropout of whole channels and the 1 x 1 convolution to classes."""

    def __init__(self, channels: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout2d(dropout)
        self.conv = nn.Conv2d(channels, classes, 1)
        nn.init.normal_(self.conv.weight, std=0.01)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) -> (B, classes, h, w)."""
        return self.conv(self.dropout(x))


class UPerHead(nn.Module):
    """Four maps of width ``inputs``, finest first -> logits at the finest map's size."""

    def __init__(
        self, inputs: int, classes: int, channels: int = 768, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.pooling = PyramidPooling(inputs, channels)
        self.laterals = nn.ModuleList(ConvNormAct(inputs, channels, 1) for _ in range(3))
        self.smooth = nn.ModuleList(ConvNormAct(channels, channels, 3) for _ in range(3))
        self.bottleneck = ConvNormAct(4 * channels, channels, 3)
        self.classify = Classify(channels, classes, dropout)

    def fuse(self, maps: list[Tensor]) -> Tensor:
        """[(B, inputs, h_i, w_i)] * 4 -> (B, channels, h_0, w_0)."""
        levels = [lateral(m) for lateral, m in zip(self.laterals, maps[:3], strict=True)]
        levels.append(self.pooling(maps[3]))
        for i in (2, 1, 0):
            levels[i] = levels[i] + resize(levels[i + 1], levels[i].shape[-2:])
        smooth = [conv(level) for conv, level in zip(self.smooth, levels[:3], strict=True)]
        size = smooth[0].shape[-2:]
        return self.bottleneck(torch.cat([resize(m, size) for m in (*smooth, levels[3])], dim=1))

    def forward(self, maps: list[Tensor]) -> Tensor:
        """[(B, inputs, h_i, w_i)] * 4 -> (B, classes, h_0, w_0)."""
        return self.classify(self.fuse(maps))


class FCNHead(nn.Sequential):
    """The auxiliary head: one 3 x 3 convolution and the classes, on one map."""

    def __init__(self, inputs: int, classes: int, channels: int, dropout: float) -> None:
        super().__init__(ConvNormAct(inputs, channels, 3), Classify(channels, classes, dropout))


def pixel_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of (B, K, h, w) logits, resized to (B, H, W) int64 labels: a scalar.

    The sum over labelled pixels divided by the number of *all* pixels, unlabelled ones too: mmseg's mean
    (avg_non_ignore False), which also has a value where nothing is labelled.
    """
    full = resize(logits.float(), labels.shape[-2:])
    return F.cross_entropy(full, labels, ignore_index=IGNORED, reduction="sum") / labels.numel()


class Segmenter(nn.Module):
    """Backbone, pyramid, UPerNet and auxiliary head. Inputs are padded to whole windows."""

    def __init__(
        self,
        backbone: Backbone,
        classes: int,
        *,
        channels: int = 768,
        dropout: float = 0.1,
        auxiliary_weight: float = 0.4,
        drop_path: float = 0.1,
        relative_bias: bool = False,
        layer_scale: float = 0.0,
        save_memory: bool = False,
    ) -> None:
        """backbone: at the window's size (``backbone.img_size``), to which its positions are resized once.

        relative_bias: one table per block for that grid (``Taps``). layer_scale: LayerScale of this value for
        blocks that have none; 0: none. Raises InputError where the backbone has no place for these.
        """
        super().__init__()
        height, width = backbone.img_size
        rows, columns = patch_of(backbone)
        self.window: tuple[int, int] = (height, width)
        grid = (height // rows, width // columns)
        taps = default_taps(depth_of(backbone))
        bias = grid if relative_bias else None
        self.backbone = Taps(backbone, taps, drop_path, bias, save_memory)
        if layer_scale:
            add_layer_scale(self.backbone.vit, layer_scale)
        self.pyramid = DeconvPyramid(self.backbone.width, rows)
        self.head = UPerHead(self.backbone.width, classes, channels, dropout)
        self.auxiliary = FCNHead(self.backbone.width, classes, AUXILIARY_CHANNELS, dropout)
        self.auxiliary_weight = auxiliary_weight

    def maps(self, images: Tensor) -> list[Tensor]:
        """Images (B, C, h, w), normalised and at most the window -> four maps, finest first.

        Smaller ones are padded with zeros, the mean colour, at the right and the bottom.
        """
        (height, width), (h, w) = self.window, images.shape[-2:]
        maps: list[Tensor] = self.pyramid(
            self.backbone(F.pad(images, (0, width - w, 0, height - h)))
        )
        return maps

    def full(self, logits: Tensor, size: torch.Size) -> Tensor:
        """Logits of the padded window -> those of its first rows and columns, at the pixels' resolution."""
        return resize(logits.float(), torch.Size(self.window))[..., : size[0], : size[1]]

    def logits(self, images: Tensor) -> Tensor:
        """(B, C, h, w), normalised, at most the window -> (B, classes, h, w) float32."""
        return self.full(self.head(self.maps(images)), images.shape[-2:])

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """images (B, C, h, w), normalised; labels (B, h, w) int64 -> the weighted losses."""
        images, labels = batch["images"], batch["labels"]
        maps, size = self.maps(images), images.shape[-2:]
        loss = pixel_loss(self.full(self.head(maps), size), labels)
        beside = self.full(self.auxiliary(maps[AUXILIARY_LEVEL]), size)
        return {
            "loss_segmentation": loss,
            "loss_auxiliary": self.auxiliary_weight * pixel_loss(beside, labels),
        }


def add_layer_scale(vit: Any, value: float) -> None:
    """Give every block without them trainable factors of its two branches, ``value`` at the start (spec 8).

    Raises InputError for other networks than timm's VisionTransformer.
    """
    if type(vit).__name__ != "VisionTransformer":
        raise InputError(
            f"layer scale cannot be added to a {type(vit).__name__}: give --layer_scale 0"
        )
    for block in vit.blocks:
        for name in ("ls1", "ls2"):
            if isinstance(getattr(block, name), nn.Identity):
                setattr(block, name, LayerScale(vit.embed_dim, init_values=value))
