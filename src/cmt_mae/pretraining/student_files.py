"""backbone.safetensors of a run: the student alone, in timm's names, with what is needed to use it."""

from pathlib import Path
from typing import Any

from timm.models.vision_transformer import VisionTransformer

from cmt_mae.backbones import Backbone
from cmt_mae.backbones.save import save_backbone
from cmt_mae.method.vit import num_prefix
from cmt_mae.pretraining.settings import PretrainConfig, Statistics


def save_student(
    run: Path,
    config: PretrainConfig,
    vit: VisionTransformer,
    stats: Statistics,
    facts: dict[str, Any],
    suffix: str,
) -> None:
    """Write ``backbone{suffix}.safetensors`` atomically; suffix "" is the student, "_momentum" its average."""
    architecture, kwargs = config.student.architecture()
    save_backbone(
        run / f"backbone{suffix}.safetensors", vit, architecture=architecture, kwargs=kwargs,
        mean=stats[0], std=stats[1], img_size=config.student.size(), licence=None,
        source=f"cmt-mae pretrain, {run.name}", extra={"method": config.target.source, **facts},
    )  # fmt: skip


def as_backbone(config: PretrainConfig, vit: VisionTransformer, stats: Statistics) -> Backbone:
    """The student of a running run, as the evaluations take it."""
    architecture, kwargs = config.student.architecture()
    return Backbone(
        model=vit, architecture=architecture, kwargs=kwargs, mean=stats[0], std=stats[1],
        img_size=config.student.size(), proj=None, source="running", licence=None, digest="",
        has_cls=True, prefix_tokens=num_prefix(vit),
    )  # fmt: skip
