"""Any backbone by one name: loading vision transformers; save.py writes ours, export.py writes them for others."""

from cmt_mae.backbones.backbone import Backbone
from cmt_mae.backbones.build import resized
from cmt_mae.backbones.load import load_backbone

__all__ = ["Backbone", "load_backbone", "resized"]
