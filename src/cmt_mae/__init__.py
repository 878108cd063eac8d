"""CMT-MAE: self-supervised pre-training of vision transformers, and an honest number for the result.

The public functions; each takes one dataclass of settings whose names are those of the command line.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmt_mae.backbones import Backbone, ExportConfig, export, load_backbone
    from cmt_mae.data.pack import PackConfig, pack
    from cmt_mae.errors import InputError, Stopped
    from cmt_mae.evaluate.knn import KnnConfig, evaluate_knn
    from cmt_mae.evaluate.linear import LinearConfig, evaluate_linear
    from cmt_mae.pretrain import pretrain
    from cmt_mae.settings import PretrainConfig

_HOMES = {
    "Backbone": "backbones",
    "ExportConfig": "backbones",
    "InputError": "errors",
    "KnnConfig": "evaluate.knn",
    "LinearConfig": "evaluate.linear",
    "PackConfig": "data.pack",
    "PretrainConfig": "settings",
    "Stopped": "errors",
    "evaluate_knn": "evaluate.knn",
    "evaluate_linear": "evaluate.linear",
    "export": "backbones",
    "load_backbone": "backbones",
    "pack": "data.pack",
    "pretrain": "pretrain",
}
__all__ = [
    "Backbone",
    "ExportConfig",
    "InputError",
    "KnnConfig",
    "LinearConfig",
    "PackConfig",
    "PretrainConfig",
    "Stopped",
    "evaluate_knn",
    "evaluate_linear",
    "export",
    "load_backbone",
    "pack",
    "pretrain",
]


def __getattr__(name: str) -> Any:
    """Import on first use, so that ``cmt-mae --help`` does not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'cmt_mae' has no attribute {name!r}")
    return getattr(import_module(f"cmt_mae.{_HOMES[name]}"), name)
