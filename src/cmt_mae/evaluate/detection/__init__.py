"""COCO detection and instance segmentation: Mask R-CNN on a plain ViT (spec section 7)."""

from cmt_mae.evaluate.detection.protocols import CocoConfig
from cmt_mae.evaluate.detection.task import evaluate_coco

__all__ = ["CocoConfig", "evaluate_coco"]
