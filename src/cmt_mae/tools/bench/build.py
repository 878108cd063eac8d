"""The parts of a run without its files: random teacher weights where the real ones would be downloaded."""

import copy
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import timm
import torch

from cmt_mae.backbones import Backbone, load_backbone, resized
from cmt_mae.data.loader import Batch, CropSettings
from cmt_mae.engine.processes import make_accelerator
from cmt_mae.engine.trainer import Trainer
from cmt_mae.method.masking import noise_length
from cmt_mae.method.teacher import Teacher
from cmt_mae.method.vit import Vit
from cmt_mae.pretraining import assembly
from cmt_mae.pretraining.plan import make_plan
from cmt_mae.pretraining.settings import PretrainConfig
from cmt_mae.pretraining.task import Pretraining

STEPS = 1000  # of an imagined epoch, so that both stages have steps


def frozen_backbone(config: PretrainConfig) -> Backbone:
    """The teacher at the input size of the run: a file, run or `embedded` with its own weights; a timm name
    with random ones and, for CLIP, a random projection, since speed does not depend on values.

    Raises InputError for unknown names.
    """
    name = config.teacher.name
    real = name == "embedded" or Path(name).expanduser().exists()
    torch.manual_seed(config.seed)
    backbone = load_backbone(name, pretrained=real, facts=config.teacher)
    if config.teacher.grid_align == "input":
        vit: Vit = backbone.model
        rows, columns = config.student.grid()
        height, width = vit.patch_embed.patch_size
        size = (rows * int(height), columns * int(width))
        if size != tuple(backbone.img_size):
            backbone = resized(backbone, size)
    cfg = None if real else timm.get_pretrained_cfg(name.removeprefix("timm:"))
    if cfg is not None and "_clip_" in name:
        width = int(backbone.model.embed_dim)  # type: ignore[arg-type]
        projection = torch.randn(cfg.num_classes, width) * width**-0.5
        backbone = dataclasses.replace(backbone, proj=projection)
    return backbone


def teacher_of(config: PretrainConfig, backbone: Backbone, stats: assembly.Statistics) -> Teacher:
    """The method's teacher on a copy of the backbone (it folds its normalisation into the weights)."""
    return Teacher(
        copy.deepcopy(backbone.model), config.teacher, mean=backbone.mean, std=backbone.std,
        student_mean=stats[0], student_std=stats[1], grid=config.student.grid(), projection=backbone.proj,
    )  # fmt: skip


def make_trainer(
    config: PretrainConfig, backbone: Backbone | None = None, images: int | None = None
) -> tuple[Trainer, Pretraining]:
    """``make_task`` and what takes its steps."""
    task, runtime = make_task(config, backbone, images), config.runtime
    trainer = Trainer(task, task.accelerator, parallel=runtime.parallel, compiled=runtime.compile)
    return trainer, task


def make_task(
    config: PretrainConfig, backbone: Backbone | None = None, images: int | None = None
) -> Pretraining:
    """This run in an imagined data set of ``STEPS`` steps per epoch (or ``images`` images).

    backbone: the teacher; made from the settings by default. Normalisation: ImageNet's, or the settings'.
    """
    accelerator = make_accelerator(config.runtime.device, config.precision)
    channels = config.student.in_chans
    stats = (
        tuple(config.data.mean) or assembly.IMAGENET[0] if channels == 3 else (0.5,) * channels,
        tuple(config.data.std) or assembly.IMAGENET[1] if channels == 3 else (0.25,) * channels,
    )
    teacher = None
    if config.needs_teacher():
        teacher = teacher_of(config, backbone or frozen_backbone(config), stats)
    plan = make_plan(config, images or STEPS * config.batch_size, accelerator.num_processes)
    learner = assembly.build_learner(config, teacher)
    guides = assembly.build_frozen_networks(config, teacher, stats)
    return Pretraining(config, accelerator, plan, learner, guides, stats=stats)


def synthetic_batches(
    crops: CropSettings, rule: str, n_patches: int, images: int, seed: int = 0, pin: bool = False
) -> Iterator[Batch]:
    """The same batch of random pixels again and again: no time is spent on data."""
    generator = torch.Generator().manual_seed(seed)

    def pixels(size: tuple[int, int]) -> torch.Tensor:
        shape = (images, crops.channels, *size)
        made = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        return made.pin_memory() if pin else made

    noise = torch.rand(images, noise_length(rule, n_patches), generator=generator)
    batch = Batch(
        images=pixels(crops.size),
        second=None if crops.second_size is None else pixels(crops.second_size),
        flip=torch.rand(images, generator=generator) < 0.5,
        noise=noise.clamp_min(2**-25),
        box=torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(images, -1),
        photos=None,
        photo_rows=torch.empty(0, dtype=torch.int64),
        index=torch.arange(images),
        bad=[],
    )
    return itertools.repeat(batch)
