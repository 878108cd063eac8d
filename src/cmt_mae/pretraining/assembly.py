"""From settings to the parts of a pre-training run: images, student, teacher."""

import os

import torch
from torch import nn

from cmt_mae.backbones import Backbone, load_backbone, resized
from cmt_mae.core.errors import InputError
from cmt_mae.data.loader import CropSettings
from cmt_mae.data.source import Source
from cmt_mae.method.cmtmae import StudentWithDecoder
from cmt_mae.method.frozen import FrozenNetworks
from cmt_mae.method.teacher import Teacher, TeacherConfig
from cmt_mae.method.vit import Vit, build_student, grid_of
from cmt_mae.pretraining.settings import IMAGENET, PretrainConfig, Statistics


def statistics(config: PretrainConfig, source: Source) -> Statistics:
    """Mean and standard deviation of each channel, in 0..1, with which the student's images are normalised."""
    channels = config.student.in_chans
    if config.data.mean or config.data.std:
        if len(config.data.mean) != channels or len(config.data.std) != channels:
            raise InputError(f"data.mean and data.std need {channels} numbers each, one a channel")
        return tuple(config.data.mean), tuple(config.data.std)
    if channels == 3:
        return IMAGENET
    from cmt_mae.data.centre import channel_stats

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
    patch, channels = config.student.patch_size, config.student.in_chans
    widths = {
        "pixel": patch**2 * channels,
        "teacher": teacher.width if teacher is not None else 0,
        "momentum": int(student.embed_dim),
    }
    if config.target.source == "hog":
        from cmt_mae.method.hog import hog_dim

        widths["hog"] = hog_dim(patch, channels)
    names = ("teacher", "momentum") if config.target.source == "collab" else (config.target.source,)
    heads = {name: target_width or widths[name] for name in names if widths[name]}
    learner = StudentWithDecoder(student, config.decoder, config.target, heads)
    if config.init_from:
        from cmt_mae.pretraining.start import start_from

        start_from(learner, config, stats)
    return learner


def build_frozen_networks(
    config: PretrainConfig, teacher: Teacher | None, stats: Statistics
) -> FrozenNetworks:
    """Teacher and (later) momentum student behind one call."""
    return FrozenNetworks(
        config.mask, config.target, teacher=teacher, grid=config.student.grid(),
        patch_size=config.student.patch_size, mean=stats[0], std=stats[1],
        dtype=torch.bfloat16 if config.frozen_precision == "bf16" else None,
    )  # fmt: skip


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
