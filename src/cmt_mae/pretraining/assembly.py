"""From settings to the parts of a pre-training run: images, student, teacher."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from cmt_mae.backbones import Backbone, load_backbone, resized
from cmt_mae.core.errors import InputError
from cmt_mae.data.loader import CropSettings, channel_stats
from cmt_mae.data.source import Source
from cmt_mae.method.cmtmae import StudentWithDecoder, takes_class_token
from cmt_mae.method.frozen import FrozenNetworks
from cmt_mae.method.hog import hog_dim
from cmt_mae.method.teacher import Teacher, TeacherConfig
from cmt_mae.method.vit import Vit, block_number, build_student, grid_of
from cmt_mae.pretraining.settings import IMAGENET, PretrainConfig, Statistics
from cmt_mae.pretraining.start import start_from
from cmt_mae.pretraining.teacher_store import TeacherStore


def statistics(config: PretrainConfig, source: Source) -> Statistics:
    """Mean and standard deviation of each channel, in 0..1, with which the student's images are normalised."""
    channels = config.student.in_chans
    if config.data.mean or config.data.std:
        if len(config.data.mean) != channels or len(config.data.std) != channels:
            raise InputError(f"data.mean and data.std need {channels} numbers each, one a channel")
        return tuple(config.data.mean), tuple(config.data.std)
    if channels == 3:
        return IMAGENET
    mean, std = channel_stats(source, channels)
    return tuple(map(float, mean)), tuple(map(float, std))


def build_teacher(
    config: PretrainConfig, stats: Statistics
) -> tuple[Teacher | None, Backbone | None]:
    """The frozen teacher at the input size that gives the student's grid, or (None, None)."""
    if not config.needs_teacher():
        return None, None
    return make_teacher(config.teacher, config.student.grid(), stats)


def make_teacher(
    config: TeacherConfig, grid: tuple[int, int], stats: Statistics
) -> tuple[Teacher, Backbone]:
    """A frozen teacher for a student with this grid (rows, columns) and normalisation.

    With view photo its own grid stays: its outputs are read at the boxes of crops.
    """
    backbone = load_backbone(config.name, facts=config)
    vit: Vit = backbone.model
    if config.view == "photo":
        side = config.view_size or max(backbone.img_size)
        if (side, side) != tuple(backbone.img_size):
            backbone = resized(backbone, (side, side))
        grid = grid_of(backbone.model)
    elif config.grid_align == "input":
        rows, columns = vit.patch_embed.patch_size
        size = (grid[0] * int(rows), grid[1] * int(columns))
        if size != tuple(backbone.img_size):
            backbone = resized(backbone, size)
    elif config.grid_align != "resample":
        raise InputError(f"teacher.grid_align '{config.grid_align}': use input or resample")
    teacher = Teacher(
        backbone.model, config, mean=backbone.mean, std=backbone.std, student_mean=stats[0],
        student_std=stats[1], grid=grid, projection=backbone.proj,
    )  # fmt: skip
    return teacher, backbone


def build_learner(
    config: PretrainConfig,
    teacher: Teacher | None,
    target_width: int = 0,
    stats: Statistics | None = None,
) -> StudentWithDecoder:
    """Student, decoder and heads, started at random from the run's seed or from ``init_from``.

    target_width: channels of a target that is a function of the image; 0: the target is one of ours. stats: of the
    student's images; where ``init_from`` was trained with others, one line on stderr says so.
    """
    torch.manual_seed(config.seed)
    student = build_student(config.student)
    pixels = config.student.patch_size**2 * config.student.in_chans
    widths = {
        "pixel": pixels,
        "hog": hog_dim(config.student.patch_size, config.student.in_chans),
        "teacher": teacher.width if teacher is not None else 0,
        "momentum": int(student.embed_dim),
    }
    names = ("teacher", "momentum") if config.target.source == "collab" else (config.target.source,)
    heads = {name: target_width or widths[name] for name in names if widths[name]}
    learner = StudentWithDecoder(student, config.decoder, config.target, heads)
    if config.init_from:
        start_from(learner, config, stats)
    return learner


def build_guides(
    config: PretrainConfig, teacher: Teacher | None, stats: Statistics
) -> FrozenNetworks:
    """Teacher and (later) momentum student behind one call."""
    return FrozenNetworks(
        config.mask, config.target, teacher=teacher, grid=config.student.grid(),
        patch_size=config.student.patch_size, mean=stats[0], std=stats[1],
        dtype=torch.bfloat16 if config.frozen_precision == "bf16" else None,
    )  # fmt: skip


def teacher_store(
    config: PretrainConfig,
    teacher: Teacher | None,
    source: Source,
    accelerator: Accelerator,
    backbone: Backbone | None,
) -> TeacherStore | None:
    """Where the teacher's outputs of this run are kept, or None. Raises InputError over several machines."""
    kept = config.teacher.cache or config.teacher.view == "photo"
    if not kept or teacher is None or backbone is None:
        return None
    if int(os.environ.get("WORLD_SIZE", 1)) != int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        raise InputError(
            "the teacher's outputs can be kept on one machine only: set teacher.cache to false and "
            "teacher.view to crop, or start one machine"
        )
    made_by = what_outputs_follow_from(config, teacher, source, accelerator, backbone.digest)
    made_by["teacher_facts"] = backbone.facts
    key = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(config.teacher.cache_folder or Path(config.out) / "teacher_cache") / key
    return TeacherStore(
        folder, teacher, pictures=len(source), heads=config.mask.heads,
        class_token=takes_class_token(config.target), keep_as=made_by["keep_as"], made_by=made_by,
    )  # fmt: skip


def what_outputs_follow_from(
    config: PretrainConfig, teacher: Teacher, source: Source, accelerator: Accelerator, digest: str
) -> dict[str, Any]:
    """Everything that the teacher's outputs follow from; runs that agree in it share one store."""
    settings, student, data = config.teacher, config.student, config.data
    photo = settings.view == "photo"
    made_by: dict[str, Any] = {
        "teacher": digest,
        "images": source.fingerprint(),
        "view": settings.view,
        "input_size": teacher.input_size,
        "grid": teacher.grid,
        "attention_block": block_number(teacher.model, settings.attention_block),
        "heads": config.mask.heads,
        "feature": [settings.feature, settings.last_k if settings.feature == "last_k" else 0],
        "project_to": settings.project_to,
        "class_token": takes_class_token(config.target),
        "keep_as": settings.keep_as if settings.keep_as != "auto" else "fp16" if photo else "fp32",
        "channels": teacher.channels,
        "shrink": data.shrink,
        # the same settings give other last bits elsewhere
        "computed": [
            accelerator.mixed_precision, config.frozen_precision, config.runtime.compile, accelerator.device.type
        ],
    }  # fmt: skip
    if not photo:
        made_by["crops"] = [
            config.seed, data.scale, data.flip, student.size(), settings.pixels, settings.grid_align, data.mean,
            data.std,
        ]  # fmt: skip
    return made_by


def crop_settings(config: PretrainConfig, teacher: Teacher | None) -> CropSettings:
    """How images are cut; with a second size where the teacher looks at the photo itself."""
    size = config.student.size()
    second = photo = None
    if teacher is not None and config.teacher.view == "photo":
        photo = teacher.input_size
    elif teacher is not None:
        larger = teacher.input_size[0] > size[0] or teacher.input_size[1] > size[1]
        if config.teacher.pixels == "crop" or (config.teacher.pixels == "auto" and larger):
            second = teacher.input_size
        elif config.teacher.pixels not in ("auto", "resize"):
            raise InputError(f"teacher.pixels '{config.teacher.pixels}': use auto, resize or crop")
    if config.data.crops not in ("random", "fixed"):
        raise InputError(f"data.crops '{config.data.crops}': use random or fixed")
    if len(config.data.scale) != 2 or not 0 < config.data.scale[0] <= config.data.scale[1] <= 1:
        raise InputError(
            f"data.scale {config.data.scale}: give least and most share of the area, e.g. [0.2, 1]"
        )
    return CropSettings(
        size=size, second_size=second, photo_size=photo, scale=(config.data.scale[0], config.data.scale[1]),
        channels=config.student.in_chans, fixed=config.data.crops == "fixed", shrink=config.data.shrink,
    )  # fmt: skip


def worker_count(wanted: int, processes: int) -> int:
    """Loader processes for each training process."""
    if wanted >= 0:
        return wanted
    return max(0, min(16, (os.cpu_count() or 1) // processes - 1))


def trainable(module: nn.Module) -> int:
    """Number of parameters that learn."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
