"""CMT-MAE: self-supervised pre-training of vision transformers, and an honest number for the result.

The public functions; each takes one dataclass of settings whose names are those of the command line.
"""

from dataclasses import is_dataclass
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmt_mae.backbones import (
        Backbone as Backbone,
    )
    from cmt_mae.backbones import (
        load_backbone as load_backbone,
    )
    from cmt_mae.backbones.export import ExportConfig as ExportConfig
    from cmt_mae.backbones.export import export as export
    from cmt_mae.core.backbone_facts import BackboneFacts as BackboneFacts
    from cmt_mae.core.errors import InputError as InputError
    from cmt_mae.core.errors import Stopped as Stopped
    from cmt_mae.data.pack import PackConfig as PackConfig
    from cmt_mae.data.pack import pack as pack
    from cmt_mae.evaluate.detection import CocoConfig as CocoConfig
    from cmt_mae.evaluate.detection import evaluate_coco as evaluate_coco
    from cmt_mae.evaluate.everything import (
        EvaluateAllConfig as EvaluateAllConfig,
    )
    from cmt_mae.evaluate.everything import (
        evaluate_all as evaluate_all,
    )
    from cmt_mae.evaluate.finetune import (
        FinetuneConfig as FinetuneConfig,
    )
    from cmt_mae.evaluate.finetune import (
        evaluate_finetune as evaluate_finetune,
    )
    from cmt_mae.evaluate.knn import KnnConfig as KnnConfig
    from cmt_mae.evaluate.knn import evaluate_knn as evaluate_knn
    from cmt_mae.evaluate.linear import (
        LinearConfig as LinearConfig,
    )
    from cmt_mae.evaluate.linear import (
        evaluate_linear as evaluate_linear,
    )
    from cmt_mae.evaluate.segmentation import (
        Ade20kConfig as Ade20kConfig,
    )
    from cmt_mae.evaluate.segmentation import (
        evaluate_ade20k as evaluate_ade20k,
    )
    from cmt_mae.evaluate.video.evaluate import (
        DavisConfig as DavisConfig,
    )
    from cmt_mae.evaluate.video.evaluate import (
        evaluate_davis as evaluate_davis,
    )
    from cmt_mae.pretraining.settings import PretrainConfig as PretrainConfig
    from cmt_mae.tools.ablate import AblateConfig as AblateConfig
    from cmt_mae.tools.ablate import ablate as ablate
    from cmt_mae.tools.app import AppConfig as AppConfig
    from cmt_mae.tools.app import app as app
    from cmt_mae.tools.bench.command import BenchConfig as BenchConfig
    from cmt_mae.tools.bench.command import bench as bench
    from cmt_mae.tools.diagnose.command import DoctorConfig as DoctorConfig
    from cmt_mae.tools.diagnose.command import doctor as doctor
    from cmt_mae.tools.embed import EmbedConfig as EmbedConfig
    from cmt_mae.tools.embed import embed as embed
    from cmt_mae.tools.embed import embed_images as embed_images
    from cmt_mae.tools.inspect.command import explain as explain
    from cmt_mae.tools.inspect.settings import ExplainConfig as ExplainConfig
    from cmt_mae.tools.pretrain import pretrain as pretrain
    from cmt_mae.tools.report.compare import CompareConfig as CompareConfig
    from cmt_mae.tools.report.compare import compare as compare
    from cmt_mae.tools.report.page.command import (
        ReportConfig as ReportConfig,
    )
    from cmt_mae.tools.report.page.command import (
        make_report as make_report,
    )
    from cmt_mae.tools.report.page.serve import WatchConfig as WatchConfig
    from cmt_mae.tools.report.page.serve import watch as watch

_HOMES = {
    "AblateConfig": "tools.ablate",
    "Ade20kConfig": "evaluate.segmentation",
    "AppConfig": "tools.app",
    "Backbone": "backbones",
    "BackboneFacts": "core.backbone_facts",
    "BenchConfig": "tools.bench.command",
    "CocoConfig": "evaluate.detection",
    "CompareConfig": "tools.report.compare",
    "DavisConfig": "evaluate.video.evaluate",
    "DoctorConfig": "tools.diagnose.command",
    "EmbedConfig": "tools.embed",
    "EvaluateAllConfig": "evaluate.everything",
    "ExplainConfig": "tools.inspect.settings",
    "ExportConfig": "backbones.export",
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
    "bench": "tools.bench.command",
    "compare": "tools.report.compare",
    "doctor": "tools.diagnose.command",
    "embed": "tools.embed",
    "embed_images": "tools.embed",
    "evaluate_ade20k": "evaluate.segmentation",
    "evaluate_all": "evaluate.everything",
    "evaluate_coco": "evaluate.detection",
    "evaluate_davis": "evaluate.video.evaluate",
    "evaluate_finetune": "evaluate.finetune",
    "evaluate_knn": "evaluate.knn",
    "evaluate_linear": "evaluate.linear",
    "explain": "tools.inspect.command",
    "export": "backbones.export",
    "load_backbone": "backbones",
    "make_report": "tools.report.page.command",
    "pack": "data.pack",
    "pretrain": "tools.pretrain",
    "watch": "tools.report.page.serve",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    """Import on first use, so that ``cmt-mae --help`` does not wait for torch.

    The docstring of a settings dataclass gets the meaning of every setting, for ``help()``.
    """
    if name == "__version__":
        return version("cmt-mae")
    if name not in _HOMES:
        raise AttributeError(f"module 'cmt_mae' has no attribute {name!r}")
    found = getattr(import_module(f"cmt_mae.{_HOMES[name]}"), name)
    if is_dataclass(found) and "\nSettings:\n" not in (found.__doc__ or ""):
        from cmt_mae.core.help import list_settings

        found.__doc__ = f"{found.__doc__}\n\nSettings:\n{list_settings(found)}"
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
