"""The detector's parts against torchvision's and against numbers worked out by hand."""

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import MultiScaleRoIAlign

from cmt_mae.backbones import Backbone, load_backbone
from cmt_mae.core.errors import InputError
from cmt_mae.engine.layer_decay import layer_decay_groups
from cmt_mae.evaluate.detection.detector import (
    Anchors,
    DetectionBatch,
    Detector,
    Heads,
    PadBatch,
    RoIPool,
    box_regression_loss,
    build_detector,
)
from cmt_mae.evaluate.detection.protocols import (
    CocoConfig,
    DetectionProtocol,
    published,
    resolve,
    result_protocol,
)
from tiny import tiny_vit

QUICK = replace(published("quick"), channels=32, hidden=64)


def tiny(folder: Path, architecture: str = "vit_tiny_patch16_224", **more: Any) -> Backbone:
    more = {"depth": 4, **more}
    return load_backbone(tiny_vit(folder / "tiny.safetensors", architecture, seed=1, **more))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return tiny(tmp_path_factory.mktemp("tiny"))


def batch(seed: int = 0, sizes: Any = ((48, 64), (56, 40)), empty: int = -1) -> DetectionBatch:
    """Bright rectangles of two classes on grey, with their boxes and masks."""
    torch.manual_seed(seed)
    images, targets = [], []
    for number, (h, w) in enumerate(sizes):
        image = 0.1 * torch.randn(3, h, w)
        boxes = torch.tensor([[4.0, 6, 24, 26], [w - 20.0, h - 18, w - 2, h - 4]])
        masks = torch.zeros((2, h, w), dtype=torch.uint8)
        for k, (x0, y0, x1, y1) in enumerate(boxes.int().tolist()):
            masks[k, y0:y1, x0:x1] = 1
            image[k, y0:y1, x0:x1] += 3
        labels = torch.tensor([1, 2])
        if number == empty:
            boxes, labels, masks = boxes[:0], labels[:0], masks[:0]
        images.append(image)
        targets.append({"boxes": boxes, "labels": labels, "masks": masks})
    return DetectionBatch(images, targets)


# --- protocols -------------------------------------------------------------------------------------


def test_presets_have_the_numbers_of_the_specification() -> None:
    """Section 7, number by number."""
    p = published("1x")
    assert (p.epochs, p.batch_size, p.lr, p.drops) == (12, 16, 2e-4, (8, 11))
    assert (p.weight_decay, p.layer_decay, p.drop_path) == (0.05, 0.75, 0.2)
    assert (p.warmup_steps, p.warmup_ratio) == (500, 0.001)
    assert (p.box_head, p.box_loss, p.box_loss_weight, p.norm) == ("4conv1fc", "giou", 10, "bn")
    assert p.short_sides == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    assert (p.longest, p.test_short, p.test_longest) == (1333, 800, 1333)
    assert (p.crop_shorts, p.crop_range) == ((400, 500, 600), (384, 600))
    assert (p.channels, p.neck, p.score_threshold, p.nms_threshold) == (256, "taps", 0.05, 0.5)
    assert published("1x-ibot").lr == 1e-4
    cae = published("1x-cae")
    assert (cae.lr, cae.batch_size, cae.drops) == (3e-4, 32, (9, 11))
    v = published("vitdet")
    assert (v.neck, v.window, v.augment, v.lsj_size, v.lsj_scale) == (
        "simple", 14, "lsj", 1024, (0.1, 2.0),
    )  # fmt: skip
    assert (v.epochs, v.batch_size, v.lr, v.weight_decay) == (100, 64, 1e-4, 0.1)
    assert (v.layer_decay, v.drop_path, v.warmup_steps, v.norm) == (0.7, 0.1, 250, "ln")
    # milestones 163,889 and 177,546 of 184,375 iterations
    assert [round(d / 100 * 184_375) for d in v.drops] == [163_889, 177_546]
    large, _ = resolve(CocoConfig(preset="vitdet"), 24)
    assert (large.layer_decay, large.drop_path) == (0.8, 0.4)
    own, changed = resolve(CocoConfig(preset="vitdet", drop_path=0.3), 24)
    assert (own.drop_path, own.layer_decay, changed) == (0.3, 0.8, ["drop_path"])


def test_every_number_can_be_set_and_is_in_the_protocol() -> None:
    names = {f.name for f in fields(DetectionProtocol)}
    config = CocoConfig()
    assert all(getattr(config, name) is None for name in names)
    protocol, changed = resolve(CocoConfig(lr=3e-4, taps=[0, 1, 2, 3]), 12)  # type: ignore[arg-type]
    assert changed == ["lr", "taps"]
    assert protocol.taps == (0, 1, 2, 3)
    told = result_protocol(config, protocol, changed, "fp32")
    simple, _ = resolve(CocoConfig(preset="vitdet"), 12)
    other = result_protocol(CocoConfig(preset="vitdet"), simple, [], "fp32")
    assert names <= told.keys() | other.keys()
    assert {"lsj_size", "window"}.isdisjoint(told), "what is not used is not told"
    assert {"taps", "short_sides"}.isdisjoint(other)
    assert other["global_blocks"] == (2, 5, 8, 11)
    assert resolve(config, 12)[0].taps == (3, 5, 7, 11)
    assert resolve(config, 24)[0].taps == (7, 11, 15, 23)
    assert (told["name"], told["lr"], told["headline"]) == ("1x-changed", 3e-4, "box/AP")
    plain = result_protocol(CocoConfig(eval_split="train"), published("1x"), [], "bf16")
    assert (plain["name"], plain["precision"]) == ("1x-on-train", "bf16")


# --- parts -----------------------------------------------------------------------------------------


def test_anchors_equal_torchvision_at_whole_strides() -> None:
    sizes, strides = (8, 16, 32, 64, 128), (4, 8, 16, 32, 64)
    maps = [torch.zeros(1, 4, 128 // s, 192 // s) for s in strides]
    images = ImageList(torch.zeros(1, 3, 128, 192), [(128, 192)])
    theirs = AnchorGenerator(tuple((s,) for s in sizes), ((0.5, 1.0, 2.0),) * 5)(images, maps)
    assert torch.equal(Anchors(sizes, strides)(images, maps)[0], theirs[0])
    odd = Anchors(sizes, (3.5, 7, 14, 28, 56))(images, maps)[0]
    assert (odd[3] - odd[0]).tolist() == [3.5, 0, 3.5, 0], "the next anchor is one stride on"


@pytest.mark.parametrize("patch", [16, 14])
def test_roi_pool_reads_the_right_place(patch: int) -> None:
    """On maps that hold their own x and y coordinates, a bin's value is the coordinate of its centre."""
    strides = [patch / 4, patch / 2, patch, 2 * patch]
    maps = {}
    for name, stride in zip("0123", strides, strict=True):
        at = (torch.arange(60) + 0.5) * stride
        maps[name] = torch.stack([at.expand(60, 60), at[:, None].expand(60, 60)])[None]
    boxes = torch.tensor([[20.0, 30, 48, 44], [10, 12, 130, 117], [40, 60, 300, 320]])
    out = RoIPool(7, strides)(maps, [boxes], None)
    middle = (torch.arange(7) + 0.5) / 7
    for box, pooled in zip(boxes, out, strict=True):
        x = box[0] + middle * (box[2] - box[0])
        y = box[1] + middle * (box[3] - box[1])
        torch.testing.assert_close(pooled[0], x.expand(7, 7), rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(pooled[1], y[:, None].expand(7, 7), rtol=1e-4, atol=1e-2)
    # the level of each box is torchvision's
    theirs = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
    theirs({k: torch.zeros(1, 1, 1024 // s, 1024 // s) for k, s in zip("0123", (4, 8, 16, 32), strict=True)},
           [boxes], [(1024, 1024)])  # fmt: skip
    assert RoIPool(7, strides).level_of([boxes]).tolist() == theirs.map_levels([boxes]).tolist()


def test_box_losses_by_hand() -> None:
    from torchvision.models.detection._utils import BoxCoder

    coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
    rois = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10]])
    truths = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10]])
    deltas = torch.zeros(2, 4)
    # equal boxes: 0. Apart: IoU 0, hull 300, union 200: GIoU -1/3, loss 4/3
    giou = box_regression_loss("giou", coder, deltas, deltas, rois, truths)
    assert giou.item() == pytest.approx(4 / 3, abs=1e-5)
    encoded = coder.encode_single(truths, rois)
    assert encoded[1].tolist() == pytest.approx([20, 0, 0, 0])
    assert box_regression_loss("l1", coder, deltas, encoded, rois, truths).item() == 20
    smooth = box_regression_loss("smooth_l1", coder, deltas, encoded, rois, truths)
    assert smooth.item() == pytest.approx(20 - 0.5 / 9)
    # moving the box towards the truth lowers the loss
    deltas = (0.5 * encoded).requires_grad_()
    nearer = box_regression_loss("giou", coder, deltas, encoded, rois, truths)
    nearer.backward()
    assert nearer < giou
    assert deltas.grad[1, 0] < 0
    for kind in ("giou", "l1", "smooth_l1"):
        none = torch.zeros((0, 4), requires_grad=True)
        loss = box_regression_loss(kind, coder, none, none, rois[:0], truths[:0])
        loss.backward()
        assert loss.item() == 0


def test_losses_equal_torchvisions_roi_heads(backbone: Backbone) -> None:
    """With its own box loss the heads compute what torchvision's compute."""
    protocol = replace(QUICK, box_loss="smooth_l1")
    torch.manual_seed(0)
    detector = build_detector(backbone, 2, protocol).train()
    ours = detector.roi_heads
    assert isinstance(ours, Heads)
    parts = (
        "box_roi_pool", "box_head", "box_predictor", "mask_roi_pool", "mask_head", "mask_predictor",
    )  # fmt: skip
    theirs = RoIHeads(
        **{name: getattr(ours, name) for name in parts},
        fg_iou_thresh=0.5, bg_iou_thresh=0.5, batch_size_per_image=64, positive_fraction=0.25,
        bbox_reg_weights=None, score_thresh=0.05, nms_thresh=0.5, detections_per_img=100,
    )  # fmt: skip
    one = batch()
    images, targets = detector.transform(one.images, one.targets)
    features = detector.backbone(images.tensors)
    proposals = [torch.rand(40, 4) * 30 + torch.tensor([0, 0, 5, 5]) * 2 for _ in range(2)]
    proposals = [torch.cat([p[:, :2], p[:, :2] + p[:, 2:]], dim=1) for p in proposals]
    answers = []
    for heads in (ours, theirs):
        torch.manual_seed(3)
        _, losses = heads(features, [p.clone() for p in proposals], images.image_sizes, targets)
        answers.append(sorted(float(v.detach()) for v in losses.values()))
    assert answers[0] == pytest.approx(answers[1], rel=1e-6)


def test_padding() -> None:
    images = [torch.ones(3, 20, 33), torch.ones(3, 31, 10)]
    padded, targets = PadBatch((8, 8), 0)(images, None)
    assert padded.tensors.shape == (2, 3, 32, 40)
    assert padded.image_sizes == [(20, 33), (31, 10)]
    assert padded.tensors.sum() == 3 * (20 * 33 + 31 * 10), "zeros, at the right and the bottom"
    assert padded.tensors[0, :, :20, :33].all()
    assert targets is None
    assert PadBatch((16, 16), 64)(images, None)[0].tensors.shape == (2, 3, 64, 64)


# --- the whole -------------------------------------------------------------------------------------


def test_only_the_vits_rate_decays_with_depth(backbone: Backbone) -> None:
    detector = build_detector(backbone, 2, QUICK)
    groups = layer_decay_groups(detector, 4, 0.75, 0.05)
    scale = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert scale.keys() == {name for name, _ in detector.named_parameters()}
    prefix = "backbone.taps.vit."
    assert scale[f"{prefix}pos_embed"] == scale[f"{prefix}cls_token"] == 0.75**5
    assert scale[f"{prefix}patch_embed.proj.weight"] == 0.75**5
    for block in range(4):
        assert scale[f"{prefix}blocks.{block}.mlp.fc1.weight"] == pytest.approx(0.75 ** (4 - block))
    others = {n: s for n, s in scale.items() if not n.startswith(prefix)}
    assert set(others.values()) == {1.0}
    assert any(n.startswith("backbone.fpn") for n in others)
    simple = build_detector(backbone, 2, replace(QUICK, neck="simple", window=2))
    groups = layer_decay_groups(simple, 4, 0.7, 0.1)
    scale = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert scale["backbone.vit.vit.blocks.0.attn.rel_pos_h"] == pytest.approx(0.7**4)
    assert {s for n, s in scale.items() if n.startswith("backbone.pyramid")} == {1.0}


@pytest.mark.parametrize(
    "protocol",
    [
        replace(QUICK, norm="bn", box_head="4conv1fc", box_loss="giou", box_loss_weight=10.0),
        replace(QUICK, neck="simple", norm="ln", rpn_convs=2, window=3, box_head="4conv1fc"),
        replace(QUICK, augment="lsj", lsj_size=64),
    ],
    ids=["1x", "vitdet", "fixed"],
)
def test_every_parameter_gets_a_gradient(backbone: Backbone, protocol: DetectionProtocol) -> None:
    """Also without any box: DDP stops at a parameter that is left out."""
    torch.manual_seed(0)
    detector = build_detector(backbone, 2, protocol).train()
    for empty in (batch(), batch(sizes=((48, 64),), empty=0)):
        detector.zero_grad()
        losses = detector(empty)
        assert set(losses) == {
            "loss_class", "loss_box", "loss_mask", "loss_objectness", "loss_rpn_box_reg",
        }  # fmt: skip
        assert all(torch.isfinite(loss) for loss in losses.values())
        torch.stack(list(losses.values())).sum().backward()
        assert [n for n, p in detector.named_parameters() if p.grad is None] == []


def learnt(detector: Detector, one: DetectionBatch) -> bool:
    """Whether each object is found with its class, an IoU over .7 and a mask that fits."""
    from torchvision.ops import box_iou

    detector.eval()
    with torch.no_grad():
        found = detector(DetectionBatch(one.images))
    assert one.targets is not None
    for truth, answer in zip(one.targets, found, strict=True):
        best = answer["scores"] > 0.5
        overlap = box_iou(truth["boxes"], answer["boxes"][best])
        if overlap.shape[1] < 2 or (overlap.max(1).values < 0.7).any():
            return False
        place = overlap.argmax(1)
        if answer["labels"][best][place].tolist() != truth["labels"].tolist():
            return False
        if (answer["masks"][best][place, 0, 4:-4, 4:-4] > 0.5).float().mean() < 0.9:
            return False
    return True


def test_one_batch_is_overfitted(backbone: Backbone) -> None:
    """With ViTDet's neck; that of taps learns in test_detection_run."""
    protocol = replace(QUICK, neck="simple", window=3, box_loss="giou", box_loss_weight=10.0)
    torch.manual_seed(0)
    detector = build_detector(backbone, 2, protocol)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=2e-3)
    one = batch()
    for step in range(120):
        detector.train()
        losses = torch.stack(list(detector(one).values())).sum()
        optimizer.zero_grad()
        losses.backward()
        nn.utils.clip_grad_norm_(detector.parameters(), 5.0)
        optimizer.step()
        if step % 20 == 19 and learnt(detector, one):
            return
    pytest.fail(f"not learnt in 120 steps, loss {losses.item():.2f}")


@pytest.mark.parametrize(
    ("architecture", "more"),
    [
        ("vit_tiny_patch16_224", {"patch_size": 14, "img_size": (28, 28)}),
        ("vit_tiny_patch16_224", {"patch_size": 12, "img_size": (24, 24)}),
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
        ("vit_tiny_patch16_224", {"reg_tokens": 2}),
        ("vit_tiny_patch16_224", {"patch_size": 32, "img_size": (64, 64)}),
        ("eva02_tiny_patch14_224", {"patch_size": 8, "use_abs_pos_emb": True}),
    ],
    ids=["patch 14", "patch 12", "no class token", "registers", "patch 32", "eva"],
)
def test_unusual_backbones(tmp_path: Path, architecture: str, more: dict[str, Any]) -> None:
    unusual = tiny(tmp_path, architecture, **more)
    plain = architecture.startswith("vit")
    for neck in ("taps", "simple") if plain else ("taps",):
        detector = build_detector(unusual, 2, replace(QUICK, neck=neck, window=3)).train()
        losses = detector(batch())
        torch.stack(list(losses.values())).sum().backward()
        assert all(math.isfinite(float(v.detach())) for v in losses.values())
        detector.eval()
        with torch.no_grad():
            (found,) = detector(DetectionBatch([torch.randn(3, 37, 53)]))
        assert found["masks"].shape[1:] == (1, 28, 28)


def test_it_is_mask_rcnn_of_torchvision(backbone: Backbone) -> None:
    """Box and mask heads of the full size have the sizes of torchvision's Mask R-CNN."""
    ours = build_detector(backbone, 80, replace(published("1x"), box_head="shared2fc"))
    neck = nn.Identity()
    neck.out_channels = 256
    theirs = MaskRCNN(neck, 81)
    for part in ("rpn.head", "roi_heads"):
        one = {k: v.shape for k, v in ours.get_submodule(part).state_dict().items()}
        two = {k: v.shape for k, v in theirs.get_submodule(part).state_dict().items()}
        assert one == two


def test_bf16_keeps_boxes_in_float32(backbone: Backbone) -> None:
    detector = build_detector(backbone, 2, QUICK).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = detector(batch())
        assert all(v.dtype == torch.float32 for v in losses.values())
        detector.eval()
        detector.roi_heads.score_thresh = 0.0
        with torch.no_grad():
            (found,) = detector(DetectionBatch([torch.randn(3, 40, 40)]))
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32
    assert len(found["boxes"])


def test_wrong_backbones(tmp_path: Path, backbone: Backbone) -> None:
    oblong = tiny(tmp_path, patch_size=(8, 4))
    with pytest.raises(InputError, match="square patches, not 8x4"):
        build_detector(oblong, 2, QUICK)
    with pytest.raises(InputError, match="needs exactly 4"):
        build_detector(backbone, 2, replace(QUICK, taps=(1, 2)))
    with pytest.raises(InputError, match="out of range"):
        build_detector(backbone, 2, replace(QUICK, taps=(1, 2, 3, 9)))
    shallow = tiny(tmp_path, depth=3)
    with pytest.raises(InputError, match="3 blocks"):
        build_detector(shallow, 2, QUICK)
