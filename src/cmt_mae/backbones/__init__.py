"""Any backbone by one name: loading, saving and exporting vision transformers."""

from cmt_mae.backbones.backbone import Backbone
from cmt_mae.backbones.build import resized
from cmt_mae.backbones.export import ExportConfig, export
from cmt_mae.backbones.load import load_backbone
from cmt_mae.backbones.save import save_backbone

__all__ = ["Backbone", "ExportConfig", "export", "load_backbone", "resized", "save_backbone"]
