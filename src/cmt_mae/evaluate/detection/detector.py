"""Mask R-CNN of torchvision's parts on a plain ViT (spec section 7)."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import (
    FastRCNNConvFCHead,
    FastRCNNPredictor,
    TwoMLPHead,
)
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import (
    FeaturePyramidNetwork,
    MultiScaleRoIAlign,
    generalized_box_iou_loss,
    roi_align,
)
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import LevelMapper

from cmt_mae.backbones import Backbone
from cmt_mae.core.errors import InputError
from cmt_mae.evaluate.detection.protocols import DetectionProtocol
from cmt_mae.evaluate.detection.vitdet import SimplePyramid, WindowedViT, default_global_blocks
from cmt_mae.evaluate.pyramid import (
    STRIDES,
    DeconvPyramid,
    Taps,
    default_taps,
    depth_of,
    patch_of,
)

LEVELS = ("0", "1", "2", "3")
POOL = "pool"
"""The fifth map, for the RPN alone."""

NORMS: dict[str, Any] = {"bn": nn.BatchNorm2d, "ln": LayerNorm2d, "none": None}


@dataclass
class DetectionBatch:
    """A micro-batch on the device."""

    images: list[Tensor]
    """(C, H, W) float32 each, normalised."""
    targets: list[dict[str, Tensor]] | None = None
    """boxes (N, 4), labels (N,) and, for a mask head, masks (N, H, W) of each; None when detecting."""


class TapsFPN(nn.Module):
    """Four taps of the ViT, deconvolution and pooling, FPN: maps "0".."3" and "pool" in float32."""

    def __init__(self, backbone: Backbone, protocol: DetectionProtocol, save_memory: bool) -> None:
        super().__init__()
        taps = protocol.taps or default_taps(depth_of(backbone))
        if len(taps) != len(STRIDES):
            raise InputError(f"taps {list(taps)}: the pyramid needs exactly {len(STRIDES)}")
        self.taps = Taps(backbone, taps, protocol.drop_path, save_memory=save_memory)
        self.pyramid = DeconvPyramid(self.taps.width, self.taps.patch[0])
        self.fpn = FeaturePyramidNetwork(
            [self.taps.width] * len(STRIDES),
            protocol.channels,
            extra_blocks=LastLevelMaxPool(),
            norm_layer=NORMS["ln"] if protocol.norm == "ln" else None,
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.pyramid(self.taps(images))
        found = self.fpn(OrderedDict(zip(LEVELS, maps, strict=True)))
        # anchors and boxes take over the maps' type: bf16 places them 4 pixels off at 1000
        return {name: level.float() for name, level in found.items()}


class SimpleFPN(nn.Module):
    """ViTDet's backbone and pyramid: maps "0".."3" and "pool" in float32."""

    def __init__(self, backbone: Backbone, protocol: DetectionProtocol, save_memory: bool) -> None:
        super().__init__()
        rows, columns = patch_of(backbone)
        side = protocol.lsj_size if protocol.augment == "lsj" else max(protocol.short_sides)
        self.vit = WindowedViT(
            backbone,
            window=protocol.window,
            global_blocks=protocol.global_blocks or default_global_blocks(depth_of(backbone)),
            grid=(math.ceil(side / rows), math.ceil(side / columns)),
            relative_positions=protocol.relative_positions,
            drop_path=protocol.drop_path,
            save_memory=save_memory,
        )
        self.pyramid = SimplePyramid(self.vit.width, rows, protocol.channels)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.pyramid(self.vit(images))
        found = dict(zip(LEVELS, maps, strict=True))
        found[POOL] = F.max_pool2d(maps[-1], 1, 2)
        return {name: level.float() for name, level in found.items()}


class PadBatch(nn.Module):
    """In place of torchvision's transform: images are resized and normalised already, here they are
    padded with zeros to one size: a multiple of the patch, or the square ``fixed``.
    """

    def __init__(self, patch: tuple[int, int], fixed: int) -> None:
        super().__init__()
        self.patch, self.fixed = patch, fixed

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None
    ) -> tuple[ImageList, list[dict[str, Tensor]] | None]:
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        height, width = (
            math.ceil(max(self.fixed, *(s[axis] for s in sizes), 1) / self.patch[axis])
            * self.patch[axis]
            for axis in (0, 1)
        )
        whole = images[0].new_zeros((len(images), images[0].shape[0], height, width))
        for place, image in zip(whole, images, strict=True):
            place[:, : image.shape[1], : image.shape[2]] = image
        return ImageList(whole, sizes), targets

    def postprocess(self, result: Any, *_: Any) -> Any:
        """Detections stay in the resized picture's pixels; predict.py brings them to the original's."""
        return result


class Anchors(AnchorGenerator):
    """torchvision's anchors at the maps' exact strides, which need not be whole (patch 14: 3.5)."""

    def __init__(self, sizes: Sequence[int], strides: Sequence[float]) -> None:
        super().__init__(tuple((s,) for s in sizes), ((0.5, 1.0, 2.0),) * len(sizes))
        self.strides = tuple(strides)

    def grid_anchors(self, grid_sizes: Any, strides: Any) -> list[Tensor]:  # noqa: ARG002
        """Anchors of every map; the strides that torchvision guesses from sizes are not used."""
        found = []
        for (rows, columns), stride, cell in zip(
            grid_sizes, self.strides, self.cell_anchors, strict=True
        ):
            y = torch.arange(rows, device=cell.device) * stride
            x = torch.arange(columns, device=cell.device) * stride
            y, x = (one.flatten() for one in torch.meshgrid(y, x, indexing="ij"))
            shifts = torch.stack([x, y, x, y], dim=1)
            found.append((shifts[:, None] + cell[None]).flatten(0, 1))
        return found


class RoIPool(MultiScaleRoIAlign):
    """RoI-align with aligned corners and adaptive sampling (as mmdetection and detectron2 have it), at the
    maps' exact strides, where torchvision's own is half a pixel off and rounds strides to powers of two.
    """

    def __init__(self, side: int, strides: Sequence[float]) -> None:
        super().__init__(list(LEVELS), side, 0)
        self.strides = tuple(strides)
        lowest, highest = (round(math.log2(s)) for s in (strides[0], strides[-1]))
        self.level_of = LevelMapper(lowest, highest, self.canonical_scale, self.canonical_level)

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: Any) -> Tensor:  # noqa: ARG002
        """Maps and boxes (in input pixels) of each image -> (all boxes, C, side, side)."""
        levels = self.level_of(boxes)
        number = torch.cat([torch.full_like(b[:, :1], i) for i, b in enumerate(boxes)])
        rois = torch.cat([number, torch.cat(boxes)], dim=1)
        channels = x[LEVELS[0]].shape[1]
        out = x[LEVELS[0]].new_zeros((len(rois), channels, *self.output_size))
        for level, (name, stride) in enumerate(zip(LEVELS, self.strides, strict=True)):
            chosen = (levels == level).nonzero()[:, 0]
            pooled = roi_align(
                x[name],
                rois[chosen],
                self.output_size,
                1 / stride,
                self.sampling_ratio,
                aligned=True,
            )
            out = out.index_copy(0, chosen, pooled.to(out.dtype))
        return out


class FloatRPNHead(RPNHead):
    """torchvision's, with answers in float32 under autocast too: boxes are decoded from them."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return [one.float() for one in logits], [one.float() for one in deltas]


class FloatPredictor(FastRCNNPredictor):
    """torchvision's class and box layers in float32, started as the reference's (normal .01 and .001)."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__(width, classes)
        for layer, spread in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=spread)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, deltas = super().forward(x)
        return logits.float(), deltas.float()


class Heads(RoIHeads):
    """torchvision's RoI heads with a choice of the box loss."""

    def __init__(self, box_loss: str, box_loss_weight: float, **parts: Any) -> None:
        super().__init__(**parts)
        self.regress, self.weight = partial(box_regression_loss, box_loss), box_loss_weight

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """In training ([], losses), else (detections, {}), as torchvision's."""
        if not self.training:
            found: tuple[list[dict[str, Tensor]], dict[str, Tensor]]
            found = super().forward(features, proposals, image_shapes, targets)
            return found
        assert targets is not None
        rois, matched, labels, encoded = self.select_training_samples(list(proposals), targets)
        pooled = self.box_roi_pool(features, rois, image_shapes)
        logits, deltas = self.box_predictor(self.box_head(pooled))
        true = torch.cat(labels)
        positive = [(one > 0).nonzero()[:, 0] for one in labels]
        truths = [
            t["boxes"][m[p]] for t, m, p in zip(targets, matched, positive, strict=True) if len(p)
        ]
        chosen = (true > 0).nonzero()[:, 0]
        box = self.regress(
            self.box_coder,
            deltas.unflatten(1, (-1, 4))[chosen, true[chosen]],
            torch.cat(encoded)[chosen],
            torch.cat(rois)[chosen],
            torch.cat([*truths, true.new_zeros((0, 4)).to(deltas.dtype)]),
        )
        losses = {
            "loss_class": F.cross_entropy(logits, true),
            "loss_box": self.weight * box / len(true),
        }
        if not self.has_mask():
            return [], losses
        good = [r[p] for r, p in zip(rois, positive, strict=True)]
        masks = self.mask_predictor(
            self.mask_head(self.mask_roi_pool(features, good, image_shapes))
        )
        losses["loss_mask"] = maskrcnn_loss(
            masks.float(),
            good,
            [t["masks"] for t in targets],
            [t["labels"] for t in targets],
            [m[p] for m, p in zip(matched, positive, strict=True)],
        )
        return [], losses


def box_regression_loss(
    kind: str, coder: Any, deltas: Tensor, encoded: Tensor, rois: Tensor, truths: Tensor
) -> Tensor:
    """Sum over P positive boxes. giou: of decoded boxes; l1, smooth_l1 (beta 1/9): of encoded offsets.

    deltas, encoded, rois, truths: (P, 4) each; P may be 0.
    """
    if kind == "giou":
        decoded = coder.decode_single(deltas, rois)
        loss: Tensor = generalized_box_iou_loss(decoded, truths, reduction="sum")
        return loss if len(deltas) else deltas.sum() * 0
    if kind == "l1":
        return F.l1_loss(deltas, encoded, reduction="sum")
    return F.smooth_l1_loss(deltas, encoded, beta=1 / 9, reduction="sum")


class Detector(GeneralizedRCNN):
    """``detector(batch)``: losses by name in training, detections (boxes, labels, scores, masks) else."""

    def forward(self, batch: DetectionBatch) -> Any:  # type: ignore[override]
        return super().forward(batch.images, batch.targets)


def build_detector(
    backbone: Backbone,
    classes: int,
    protocol: DetectionProtocol,
    save_memory: bool = False,
    masks: bool = True,
) -> Detector:
    """The whole detector, newly started but for the ViT; all of it trainable. masks: whether with a mask head.

    Raises InputError for a backbone that the protocol cannot take.
    """
    rows, columns = patch_of(backbone)
    if rows != columns:
        raise InputError(f"the pyramid needs square patches, not {rows}x{columns}")
    neck: nn.Module = (SimpleFPN if protocol.neck == "simple" else TapsFPN)(
        backbone, protocol, save_memory
    )
    strides = [rows * 2.0 ** -round(math.log2(rows / stride)) for stride in STRIDES]
    anchors = Anchors(protocol.anchors, [*strides, 2 * strides[-1]])
    rpn = RegionProposalNetwork(
        anchors,
        FloatRPNHead(protocol.channels, 3, protocol.rpn_convs),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=protocol.rpn_samples,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 2 * protocol.proposals, "testing": protocol.proposals},
        post_nms_top_n={"training": protocol.proposals, "testing": protocol.proposals},
        nms_thresh=0.7,
    )
    fixed = protocol.lsj_size if protocol.augment == "lsj" else 0
    heads = _heads(protocol, classes + 1, strides, masks)
    return Detector(neck, rpn, heads, PadBatch((rows, columns), fixed))


def _heads(
    protocol: DetectionProtocol, classes: int, strides: Sequence[float], masks: bool
) -> Heads:
    """Box and mask heads; classes with the background."""
    channels, norm = protocol.channels, NORMS[protocol.norm]
    if protocol.box_head == "4conv1fc":
        box_head: nn.Module = FastRCNNConvFCHead(
            (channels, 7, 7), [channels] * 4, [protocol.hidden], norm_layer=norm
        )
    else:
        box_head = TwoMLPHead(channels * 49, protocol.hidden)
    return Heads(
        protocol.box_loss,
        protocol.box_loss_weight,
        box_roi_pool=RoIPool(7, strides),
        box_head=box_head,
        box_predictor=FloatPredictor(protocol.hidden, classes),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=protocol.roi_samples,
        positive_fraction=0.25,
        bbox_reg_weights=None,
        score_thresh=protocol.score_threshold,
        nms_thresh=protocol.nms_threshold,
        detections_per_img=100,
        **(_mask_parts(protocol, classes, strides) if masks else {}),
    )


def _mask_parts(
    protocol: DetectionProtocol, classes: int, strides: Sequence[float]
) -> dict[str, nn.Module]:
    """The mask head, by the names of RoIHeads' arguments."""
    channels, norm = protocol.channels, LayerNorm2d if protocol.norm == "ln" else None
    return {
        "mask_roi_pool": RoIPool(14, strides),
        "mask_head": MaskRCNNHeads(channels, [channels] * 4, 1, norm_layer=norm),
        "mask_predictor": MaskRCNNPredictor(channels, channels, classes),
    }
