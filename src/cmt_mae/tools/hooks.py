"""What other rooms add to a pre-training: pictures and k-NN probe while it goes on, its time before it begins."""

from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator

from cmt_mae.backbones import Backbone
from cmt_mae.core.checkpoint import list_checkpoints
from cmt_mae.core.errors import InputError
from cmt_mae.core.runs import RunDir
from cmt_mae.core.text import duration
from cmt_mae.engine import compiling
from cmt_mae.engine.processes import any_process
from cmt_mae.method.vit import Vit
from cmt_mae.pretraining.settings import PretrainConfig
from cmt_mae.pretraining.task import Pretraining
from cmt_mae.tools.bench.peak import peak_flops

PICTURED = 6  # images in a picture
DAY = 86400.0  # seconds
OVER_PRODUCTS = 1.3
"""Time of a step over that of its matrix products (design section 4)."""
CELL = 1.2  # inches: five of them and the colour bar fit in a row of the report


def open_probe(
    config: PretrainConfig, accelerator: Accelerator, limits: Sequence[float]
) -> tuple[Any, dict[str, int]]:
    """(backbone -> k-NN accuracy in percent, images in train and val).

    limits: of the training images, if these have more than 8 bits: the probe's are read alike.
    Raises InputError for data without train, val or labels.
    """
    from cmt_mae.evaluate.features import open_labelled
    from cmt_mae.evaluate.knn import probe

    train, val = open_labelled(config.runtime.probe_data, limits, config.data.val_share)

    def measure(backbone: Backbone) -> float:
        return probe(backbone, train, val, accelerator)

    return measure, {"train": len(train), "val": len(val)}


def refuse_days(task: Pretraining, run: RunDir, flop: float) -> None:
    """Raise InputError where a CPU would need more than a day, by its speed at matrix products; a run that has
    begun goes on. flop: of the whole run."""
    if list_checkpoints(run.checkpoints):
        return
    peak = peak_flops(task.device, "fp32")["flops"] * task.accelerator.num_processes
    seconds = OVER_PRODUCTS * flop / peak
    if any_process(task.accelerator, seconds > DAY):
        raise InputError(
            f"on this CPU {task.total_steps} steps of {task.batch_size} images would take about "
            f"{duration(seconds)}: take a recipe of a smaller scale, such as --recipe cmt_all,micro64, or add "
            "--yes to begin all the same"
        )


def draw_attention(task: Pretraining, student: Vit, step: int, run: RunDir) -> None:
    """Image, maps and mask of a few images, one of each class, centre crops; nothing where none can be read.

    student: in one piece; step: optimizer steps done. Written to ``pictures/attention_step_N.png`` in the run.
    Raises InputError where it cannot be written.
    """
    from cmt_mae.evaluate.drawing import save_picture
    from cmt_mae.tools.inspect.images import cut, spread
    from cmt_mae.tools.inspect.look import Inspector
    from cmt_mae.tools.inspect.networks import Networks
    from cmt_mae.tools.inspect.of_images import attention_of

    assert task.images is not None
    config, momentum = task.config, task.frozen_networks.running()
    photos = list(spread(task.images.source, config.student.in_chans, PICTURED))
    if not photos:
        return
    networks = Networks(
        name=run.path.name, student=momentum or student, momentum=momentum is not None,
        teacher=task.frozen_networks.teacher, learner=task.learner, config=config,
        weights=task.alphas_at(max(0, step - 1)), stats=task.stats, step=step,
    )  # fmt: skip
    with compiling.uncompiled():
        look = Inspector(networks, cut(photos, networks))
        sheet = attention_of(look, seed=config.seed, largest=CELL)
    save_picture(sheet.figure, run.path / "pictures" / f"attention_step_{step:08d}.png")
