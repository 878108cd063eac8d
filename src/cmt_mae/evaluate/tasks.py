"""The evaluations: what each is called, where it is, which data it needs, and what its presets mean.

Imports nothing of weight, so that tables, reports and the command line may look here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

Layout = Literal["labelled", "coco", "ade20k", "davis"]
Preset = Literal["quick", "paper"]


@dataclass(frozen=True)
class Task:
    """One kind of evaluation."""

    title: str
    """In tables."""
    module: str
    """Below cmt_mae.evaluate."""
    settings: str
    """Name of its settings in that module."""
    function: str
    """Name of its function there, settings -> Result."""
    layout: Layout
    """The kind of data it needs."""
    columns: tuple[str, ...]
    """Metrics that a table of results shows, the one to quote first."""
    quick: dict[str, Any] = field(default_factory=dict)
    """Settings of ``evaluate all --preset quick``."""
    paper: dict[str, Any] = field(default_factory=dict)
    """Of ``--preset paper``: the published protocol."""
    trains: bool = False
    """Whether ``out`` is the run directory of a training of its own."""

    def load_settings(self) -> type:
        """Its settings dataclass."""
        kind: type = getattr(self._module(), self.settings)
        return kind

    def load_function(self) -> Callable[[Any], Any]:
        """Its function, settings -> Result."""
        function: Callable[[Any], Any] = getattr(self._module(), self.function)
        return function

    def _module(self) -> Any:
        return import_module(f"cmt_mae.evaluate.{self.module}")


TASKS = {
    "knn": Task("k-NN", "knn", "KnnConfig", "evaluate_knn", "labelled", ("top1",)),
    "linear": Task(
        "linear probe",
        "linear",
        "LinearConfig",
        "evaluate_linear",
        "labelled",
        ("top1",),
        paper={"protocol": "mae", "augment": True},
    ),
    "finetune": Task(
        "fine-tuning",
        "finetune",
        "FinetuneConfig",
        "evaluate_finetune",
        "labelled",
        ("top1",),
        quick={"preset": "quick"},
        paper={"preset": "mae"},
        trains=True,
    ),
    "coco": Task(
        "COCO",
        "detection",
        "CocoConfig",
        "evaluate_coco",
        "coco",
        ("box/AP", "mask/AP"),
        quick={"preset": "quick"},
        paper={"preset": "1x"},
        trains=True,
    ),
    "ade20k": Task(
        "ADE20K",
        "segmentation",
        "Ade20kConfig",
        "evaluate_ade20k",
        "ade20k",
        ("mIoU",),
        quick={"preset": "quick"},
        paper={"preset": "paper"},
        trains=True,
    ),
    "davis": Task(
        "DAVIS",
        "video.evaluate",
        "DavisConfig",
        "evaluate_davis",
        "davis",
        ("J&F", "J_mean", "F_mean"),
        quick={"protocol": "dino"},
        paper={"protocol": "dino"},
    ),
}
"""In the order of a table's columns."""
