"""The command ``pretrain``: builds the task and passes in what other rooms add to it - pictures, probe, cost."""

from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator

from cmt_mae.backbones import Backbone
from cmt_mae.core.checkpoint import list_checkpoints
from cmt_mae.core.runs import RunDir, plain
from cmt_mae.core.settings import resume_safe_settings
from cmt_mae.data.source import Source
from cmt_mae.engine import compiling
from cmt_mae.engine.fit import fit
from cmt_mae.engine.processes import make_accelerator
from cmt_mae.method.vit import Vit
from cmt_mae.pretraining.assembly import (
    build_guides,
    build_learner,
    build_teacher,
    crop_settings,
    statistics,
)
from cmt_mae.pretraining.plan import make_plan
from cmt_mae.pretraining.settings import PretrainConfig
from cmt_mae.pretraining.task import Images, Looks, Pretraining

PICTURED = 6  # images in a picture
CELL = 1.2  # inches: five of them and the colour bar fit in a row of the report


def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Run, or continue, pre-training; returns the last metrics.

    Writes the run directory ``config.out`` (design section 5). Raises InputError for what the user can mend
    and Stopped when a signal asked for the end; both leave a checkpoint to continue from.
    """
    config.check()
    runtime = config.runtime
    accelerator = make_accelerator(runtime.device, config.precision, runtime.deterministic)
    source = config.data.open_train()
    plan = make_plan(config, len(source), accelerator.num_processes)
    run = RunDir(
        config.out,
        plain(config),
        resume_safe_settings(PretrainConfig),
        writes=accelerator.is_main_process,
        defaults=plain(PretrainConfig()),
    )
    keep_range(source, run)
    try:
        stats = statistics(config, source)
        teacher, backbone = build_teacher(config, stats)
        probe, sizes = open_probe(config, accelerator)
        task = Pretraining(
            config,
            accelerator,
            plan,
            build_learner(config, teacher),
            build_guides(config, teacher, stats),
            images=Images(source, crop_settings(config, teacher)),
            stats=stats,
            teacher=backbone,
            looks=Looks(draw_attention, probe),
        )
        more: dict[str, Any] = {"plan": vars(plan), "cost": cost_of(task)}
        if sizes:
            more["probe"] = sizes
        return fit(runtime, task, accelerator, run, {**task.facts(0), **more}).row
    finally:
        run.close()


def keep_range(source: Source, run: RunDir) -> None:
    """A run that is continued reads images of more than 8 bits as it did; older ones by all of 16 bits."""
    if list_checkpoints(run.checkpoints) and (known := run.known_facts().get("data")):
        before = known.get("range")
        source.limits = (float(before[0]), float(before[1])) if before else None


def open_probe(config: PretrainConfig, accelerator: Accelerator) -> tuple[Any, dict[str, int]]:
    """(backbone -> k-NN accuracy in percent, images in train and val); (None, {}) without ``probe_data``.

    Raises InputError for data without train, val or labels.
    """
    if not config.runtime.probe_data:
        return None, {}
    from cmt_mae.evaluate.online import OnlineProbe

    probe = OnlineProbe.open(config.runtime.probe_data, config.data.range, config.data.val_share)
    assert probe is not None

    def measure(backbone: Backbone) -> float:
        return probe.measure(backbone, accelerator)

    return measure, {"train": len(probe.train), "val": len(probe.val)}


def cost_of(task: Pretraining) -> dict[str, Any]:
    """``flop_per_image`` of each stage (one, two) and ``peak`` of one device (flops, how), or None."""
    from cmt_mae.tools.bench.flops import step_macs, step_of
    from cmt_mae.tools.bench.measure import data_sheet

    config, plan, device = task.config, task.plan, task.device
    stages = {"one": 0} if plan.switch_step > 0 else {}
    if plan.switch_step < plan.total_steps:
        stages["two"] = plan.switch_step
    flop: dict[str, int] = {}
    for name, step in stages.items():
        try:
            sizes = step_of(task.learner, task.frozen_networks, task.alphas_at(step), plan.n_mask)
        except (AttributeError, TypeError):  # a teacher built in a way that cannot be counted
            continue
        if config.teacher.cache or config.teacher.view == "photo":
            sizes = replace(sizes, teacher=None)  # after the first epoch the teacher no longer runs
        flop[name] = 2 * sum(step_macs(sizes).values())
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    bf16 = task.accelerator.mixed_precision == "bf16"
    return {"flop_per_image": flop, "peak": data_sheet(gpu, "bf16" if bf16 else "fp32")}


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
