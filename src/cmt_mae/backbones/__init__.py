"""Any backbone by one name: loading and saving vision transformers; export.py writes them for others."""

from cmt_mae.backbones.backbone import Backbone
from cmt_mae.backbones.build import resized
from cmt_mae.backbones.load import load_backbone
from cmt_mae.backbones.save import save_backbone

__all__ = ["Backbone", "load_backbone", "resized", "save_backbone"]
