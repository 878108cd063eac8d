"""CMT-MAE: self-supervised pre-training of vision transformers, and an honest number for the result.

The public functions; each takes one dataclass of settings whose names are those of the command line. Their types
are in ``__init__.pyi``.
"""

import sys
from dataclasses import is_dataclass
from importlib import import_module
from importlib.metadata import version
from typing import Any

_PUBLIC = {
    "backbones": "Backbone load_backbone",
    "backbones.export": "ExportConfig export",
    "core.backbone_facts": "BackboneFacts",
    "core.errors": "InputError Stopped",
    "data.pack": "PackConfig pack",
    "evaluate.detection": "CocoConfig evaluate_coco",
    "evaluate.everything": "EvaluateAllConfig evaluate_all",
    "evaluate.finetune": "FinetuneConfig evaluate_finetune",
    "evaluate.knn": "KnnConfig evaluate_knn",
    "evaluate.linear": "LinearConfig evaluate_linear",
    "evaluate.segmentation": "Ade20kConfig evaluate_ade20k",
    "evaluate.video.evaluate": "DavisConfig evaluate_davis",
    "pretraining.settings": "PretrainConfig",
    "tools.ablate": "AblateConfig ablate",
    "tools.app": "AppConfig app",
    "tools.bench.command": "BenchConfig bench",
    "tools.demo": "DemoConfig demo",
    "tools.diagnose.command": "DoctorConfig doctor",
    "tools.embed": "EmbedConfig embed embed_images",
    "tools.inspect.command": "explain",
    "tools.inspect.settings": "ExplainConfig",
    "tools.pretrain": "pretrain",
    "tools.report.compare": "CompareConfig compare",
    "tools.report.page.command": "ReportConfig make_report",
    "tools.report.page.serve": "WatchConfig watch",
}
"""Module -> what it gives to this package."""
_HOMES = {name: module for module, names in _PUBLIC.items() for name in names.split()}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    """Import on first use, so that ``cmt-mae --help`` does not wait for torch.

    The docstring of a settings dataclass gets the meaning of every setting, for ``help()``; the command line needs
    none.
    """
    if name == "__version__":
        return version("cmt-mae")
    if name not in _HOMES:
        raise AttributeError(f"module 'cmt_mae' has no attribute {name!r}")
    found = getattr(import_module(f"cmt_mae.{_HOMES[name]}"), name)
    settings = is_dataclass(found) and "cmt_mae.core.cli" not in sys.modules
    if settings and "\nSettings:\n" not in (found.__doc__ or ""):
        from cmt_mae.core.help import list_settings

        found.__doc__ = f"{found.__doc__}\n\nSettings:\n{list_settings(found)}"
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
