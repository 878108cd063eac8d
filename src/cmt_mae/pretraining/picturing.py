"""The picture of a run while it goes on: what guides the mask, on a few images."""

from pathlib import Path

import torch

from cmt_mae.data.loader import CropSettings, eval_batches, readable
from cmt_mae.data.source import Source
from cmt_mae.engine import compiling
from cmt_mae.method.masking import noise_length
from cmt_mae.pretraining.stepping import Stepper
from cmt_mae.tools.report.pictures import attention_picture

PICTURED = 6  # images in a picture


def draw_attention(
    stepper: Stepper, source: Source, crops: CropSettings, step: int, folder: Path
) -> None:
    """Image, maps and mask of the first readable images, centre crops; nothing where none can be read.

    step: optimizer steps done. Written to ``folder/attention_step_N.png`` in the run directory. Raises InputError
    where it cannot be written.
    """
    config, channels = stepper.config, stepper.config.student.in_chans
    photos = source.subset(readable(source, channels, PICTURED))
    if not len(photos):
        return
    sizes = [config.student.size(), *([crops.teacher_size] if crops.teacher_size else [])]
    shown = [
        next(iter(eval_batches(photos, size=s, channels=channels, batch_size=PICTURED)))[0]
        for s in sizes
    ]
    ready = [stepper.normalise(images.to(stepper.device)) for images in shown]
    noise = torch.rand(
        len(shown[0]), noise_length(config.mask.rule, stepper.plan.n_patches),
        generator=torch.Generator().manual_seed(config.seed),
    )  # fmt: skip
    weights = stepper.weights_at(max(0, step - 1))
    with compiling.uncompiled():
        maps, mask = stepper.guides.maps(
            ready[0], noise.to(stepper.device), stepper.plan.n_mask, weights, ready[-1]
        )
    path = folder / f"attention_step_{step:08d}.png"
    title = f"{folder.parent.name}, step {step}, rule {config.mask.rule}"
    maps = {name: value.float().cpu() for name, value in maps.items()}
    attention_picture(path, shown[0] / 255, maps, mask.mask.cpu(), config.student.grid(), title)
