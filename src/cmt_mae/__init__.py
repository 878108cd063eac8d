"""CMT-MAE: self-supervised pre-training of vision transformers, and an honest number for the result.

The public functions; each takes one dataclass of settings whose names are those of the command line.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmt_mae.ablation import AblateConfig, ablate
    from cmt_mae.backbones import Backbone, ExportConfig, export, load_backbone
    from cmt_mae.benchmark import BenchConfig, bench
    from cmt_mae.data.pack import PackConfig, pack
    from cmt_mae.errors import InputError, Stopped
    from cmt_mae.evaluate.detection import CocoConfig, evaluate_coco
    from cmt_mae.evaluate.everything import EvaluateAllConfig, evaluate_all
    from cmt_mae.evaluate.finetune import FinetuneConfig, evaluate_finetune
    from cmt_mae.evaluate.knn import KnnConfig, evaluate_knn
    from cmt_mae.evaluate.linear import LinearConfig, evaluate_linear
    from cmt_mae.evaluate.segmentation import Ade20kConfig, evaluate_ade20k
    from cmt_mae.evaluate.video.evaluate import DavisConfig, evaluate_davis
    from cmt_mae.explanation.command import explain
    from cmt_mae.explanation.settings import ExplainConfig
    from cmt_mae.explorer import AppConfig, app
    from cmt_mae.health import DoctorConfig, doctor
    from cmt_mae.pretraining import pretrain
    from cmt_mae.report.compare import CompareConfig, compare
    from cmt_mae.report.page.command import ReportConfig, make_report
    from cmt_mae.report.page.serve import WatchConfig, watch
    from cmt_mae.settings import PretrainConfig

_HOMES = {
    "AblateConfig": "ablation",
    "Ade20kConfig": "evaluate.segmentation",
    "AppConfig": "explorer",
    "Backbone": "backbones",
    "BenchConfig": "benchmark",
    "CocoConfig": "evaluate.detection",
    "CompareConfig": "report.compare",
    "DavisConfig": "evaluate.video.evaluate",
    "DoctorConfig": "health",
    "EvaluateAllConfig": "evaluate.everything",
    "ExplainConfig": "explanation.settings",
    "ExportConfig": "backbones",
    "FinetuneConfig": "evaluate.finetune",
    "InputError": "errors",
    "KnnConfig": "evaluate.knn",
    "LinearConfig": "evaluate.linear",
    "PackConfig": "data.pack",
    "PretrainConfig": "settings",
    "ReportConfig": "report.page.command",
    "Stopped": "errors",
    "WatchConfig": "report.page.serve",
    "ablate": "ablation",
    "app": "explorer",
    "bench": "benchmark",
    "compare": "report.compare",
    "doctor": "health",
    "evaluate_ade20k": "evaluate.segmentation",
    "evaluate_all": "evaluate.everything",
    "evaluate_coco": "evaluate.detection",
    "evaluate_davis": "evaluate.video.evaluate",
    "evaluate_finetune": "evaluate.finetune",
    "evaluate_knn": "evaluate.knn",
    "evaluate_linear": "evaluate.linear",
    "explain": "explanation.command",
    "export": "backbones",
    "load_backbone": "backbones",
    "make_report": "report.page.command",
    "pack": "data.pack",
    "pretrain": "pretraining",
    "watch": "report.page.serve",
}
__all__ = [
    "AblateConfig",
    "Ade20kConfig",
    "AppConfig",
    "Backbone",
    "BenchConfig",
    "CocoConfig",
    "CompareConfig",
    "DavisConfig",
    "DoctorConfig",
    "EvaluateAllConfig",
    "ExplainConfig",
    "ExportConfig",
    "FinetuneConfig",
    "InputError",
    "KnnConfig",
    "LinearConfig",
    "PackConfig",
    "PretrainConfig",
    "ReportConfig",
    "Stopped",
    "WatchConfig",
    "ablate",
    "app",
    "bench",
    "compare",
    "doctor",
    "evaluate_ade20k",
    "evaluate_all",
    "evaluate_coco",
    "evaluate_davis",
    "evaluate_finetune",
    "evaluate_knn",
    "evaluate_linear",
    "explain",
    "export",
    "load_backbone",
    "make_report",
    "pack",
    "pretrain",
    "watch",
]


def __getattr__(name: str) -> Any:
    """Import on first use, so that ``cmt-mae --help`` does not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'cmt_mae' has no attribute {name!r}")
    return getattr(import_module(f"cmt_mae.{_HOMES[name]}"), name)
