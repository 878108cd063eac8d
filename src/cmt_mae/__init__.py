"""CMT-MAE: self-supervised pre-training of vision transformers, and an honest number for the result.

The public functions; each takes one dataclass of settings whose names are those of the command line.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmt_mae.backbones import Backbone, ExportConfig, export, load_backbone
    from cmt_mae.core.errors import InputError, Stopped
    from cmt_mae.data.pack import PackConfig, pack
    from cmt_mae.evaluate.detection import CocoConfig, evaluate_coco
    from cmt_mae.evaluate.everything import EvaluateAllConfig, evaluate_all
    from cmt_mae.evaluate.finetune import FinetuneConfig, evaluate_finetune
    from cmt_mae.evaluate.knn import KnnConfig, evaluate_knn
    from cmt_mae.evaluate.linear import LinearConfig, evaluate_linear
    from cmt_mae.evaluate.segmentation import Ade20kConfig, evaluate_ade20k
    from cmt_mae.evaluate.video.evaluate import DavisConfig, evaluate_davis
    from cmt_mae.pretraining.run import pretrain
    from cmt_mae.pretraining.settings import PretrainConfig
    from cmt_mae.tools.ablate import AblateConfig, ablate
    from cmt_mae.tools.app import AppConfig, app
    from cmt_mae.tools.bench import BenchConfig, bench
    from cmt_mae.tools.diagnose.command import DoctorConfig, doctor
    from cmt_mae.tools.inspect.command import explain
    from cmt_mae.tools.inspect.settings import ExplainConfig
    from cmt_mae.tools.report.compare import CompareConfig, compare
    from cmt_mae.tools.report.page.command import ReportConfig, make_report
    from cmt_mae.tools.report.page.serve import WatchConfig, watch

_HOMES = {
    "AblateConfig": "tools.ablate",
    "Ade20kConfig": "evaluate.segmentation",
    "AppConfig": "tools.app",
    "Backbone": "backbones",
    "BenchConfig": "tools.bench",
    "CocoConfig": "evaluate.detection",
    "CompareConfig": "tools.report.compare",
    "DavisConfig": "evaluate.video.evaluate",
    "DoctorConfig": "tools.diagnose.command",
    "EvaluateAllConfig": "evaluate.everything",
    "ExplainConfig": "tools.inspect.settings",
    "ExportConfig": "backbones",
    "FinetuneConfig": "evaluate.finetune",
    "InputError": "core.errors",
    "KnnConfig": "evaluate.knn",
    "LinearConfig": "evaluate.linear",
    "PackConfig": "data.pack",
    "PretrainConfig": "pretraining.settings",
    "ReportConfig": "tools.report.page.command",
    "Stopped": "core.errors",
    "WatchConfig": "tools.report.page.serve",
    "ablate": "tools.ablate",
    "app": "tools.app",
    "bench": "tools.bench",
    "compare": "tools.report.compare",
    "doctor": "tools.diagnose.command",
    "evaluate_ade20k": "evaluate.segmentation",
    "evaluate_all": "evaluate.everything",
    "evaluate_coco": "evaluate.detection",
    "evaluate_davis": "evaluate.video.evaluate",
    "evaluate_finetune": "evaluate.finetune",
    "evaluate_knn": "evaluate.knn",
    "evaluate_linear": "evaluate.linear",
    "explain": "tools.inspect.command",
    "export": "backbones",
    "load_backbone": "backbones",
    "make_report": "tools.report.page.command",
    "pack": "data.pack",
    "pretrain": "pretraining.run",
    "watch": "tools.report.page.serve",
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
