"""The command ``pretrain``: builds the task and passes in what other rooms add to it: pictures and k-NN probe."""

import hashlib
import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from cmt_mae.backbones import Backbone
from cmt_mae.core.checkpoint import list_checkpoints, step_of
from cmt_mae.core.errors import InputError
from cmt_mae.core.parsing import read_settings
from cmt_mae.core.run_reader import read_run
from cmt_mae.core.runs import RunDir, plain
from cmt_mae.core.settings import resume_safe_settings
from cmt_mae.core.text import duration
from cmt_mae.data.source import Source
from cmt_mae.engine import compiling
from cmt_mae.engine.fit import fit
from cmt_mae.engine.processes import any_process, make_accelerator
from cmt_mae.method.cmtmae import MaskRule, TargetFunction
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
from cmt_mae.pretraining.start import take_shape
from cmt_mae.pretraining.task import Images, Looks, Pretraining

PICTURED = 6  # images in a picture
DAY = 86400.0  # seconds
SURELY_A_DAY_LESS = 5e14
"""FLOP that the slowest CPU makes in a day; only above it the machine is measured."""
OVER_PRODUCTS = 1.3
"""Time of a step over that of its matrix products (design section 4)."""
CELL = 1.2  # inches: five of them and the colour bar fit in a row of the report


def pretrain(
    config: PretrainConfig,
    *,
    mask_rule: MaskRule | None = None,
    target: TargetFunction | None = None,
) -> dict[str, Any]:
    """Run, or continue, pre-training; returns the last metrics.

    Writes the run directory ``config.out`` (design section 5). Raises InputError for what the user can fix
    and Stopped when a signal asked for the end; both leave a checkpoint to continue from.

    mask_rule: takes the place of ``mask.rule``, and is given the attention that guides that one, if any; see
    ``method.cmtmae.MaskRule``. target: what is predicted in place of pixels (``target.source`` must be pixel); see
    ``TargetFunction``. Both are recorded by name and source, and a run is continued with the same ones only.
    """
    take_shape(config)
    config.check()
    runtime = config.runtime
    accelerator = make_accelerator(runtime.device, config.precision, runtime.deterministic)
    source = config.data.open_train()
    extended = extend(config)
    plan = make_plan(config, len(source), accelerator.num_processes)
    run = RunDir(
        config.out,
        plain(config),
        (*resume_safe_settings(PretrainConfig), *(("epochs", "extended") if extended else ())),
        writes=accelerator.is_main_process,
        defaults=plain(PretrainConfig()),
    )
    keep_range(source, run)
    try:
        stats = statistics(config, source)
        teacher, backbone = build_teacher(config, stats)
        frozen = build_guides(config, teacher, stats)
        frozen.mask_rule, frozen.target_function = mask_rule, target
        width = target_width(config, target)
        probe, sizes = open_probe(config, accelerator, source.limits or ())
        task = Pretraining(
            config,
            accelerator,
            plan,
            build_learner(config, teacher, width, stats),
            frozen,
            images=Images(source, crop_settings(config, teacher)),
            stats=stats,
            teacher=backbone,
            looks=Looks(draw_attention, probe),
        )
        if not list_checkpoints(run.checkpoints):
            refuse_days(task)
        facts = {**task.facts(0), "plan": vars(plan)}
        facts["functions"] = {"mask_rule": source_of(mask_rule), "target": source_of(target)}
        if sizes:
            facts["probe"] = sizes
        return fit(runtime, task, accelerator, run, facts).row
    finally:
        run.close()


def extend(config: PretrainConfig) -> bool:
    """Put into ``config.extended`` how the run in ``config.out`` was extended; whether it is extended now.

    Raises InputError where a finished run is given more epochs without --extend, or cannot be extended.
    """
    out = Path(config.out)
    if not (out / "config.yaml").is_file():
        if config.runtime.extend:
            raise InputError(f"{out} holds no run that could be extended: leave out --extend")
        return False
    text = (out / "config.yaml").read_text(encoding="utf-8", errors="replace")
    before = read_settings(text, str(out / "config.yaml"))
    epochs, steps = (
        float(before.get("epochs", config.epochs)),
        list_checkpoints(out / "checkpoints"),
    )
    known = list(before.get("extended") or [])
    if config.epochs <= epochs or not steps:
        config.extended = known if config.epochs == epochs else config.extended
        return False
    total = read_run(str(out)).facts.get("plan", {}).get("total_steps")
    finished = step_of(steps[-1]) == total
    if not config.runtime.extend:
        if finished:
            raise InputError(
                f"{out} has finished its {epochs:g} epochs: --extend trains it on to {config.epochs:g}, with a "
                f"warm-up and a cosine of its own; --init_from {out} and another --out start a new run from it"
            )
        return False
    if not finished:
        raise InputError(
            f"{out} is at step {step_of(steps[-1])} of {total}: let its {epochs:g} epochs end, then extend it"
        )
    config.extended = [*known, epochs]
    return True


def target_width(config: PretrainConfig, target: TargetFunction | None) -> int:
    """Channels of a target's features, by trying it on one black image; 0 without one. Raises InputError."""
    if target is None:
        return 0
    if config.target.source != "pixel":
        raise InputError(
            f"a target of your own takes the place of pixels: set target.source {config.target.source} to pixel"
        )
    rows, columns = config.student.grid()
    found = target(torch.zeros(1, config.student.in_chans, *config.student.size()))
    if found.ndim != 3 or found.shape[:2] != (1, rows * columns):
        raise InputError(
            f"the target gave {tuple(found.shape)} for one image: it must give (1, {rows * columns}, channels), a "
            "feature for each patch in raster order"
        )
    return int(found.shape[2])


def source_of(function: Callable[..., Any] | None) -> str | None:
    """Name and hash of the source of a function that was passed in. Raises InputError where it has none."""
    if function is None:
        return None
    name = getattr(function, "__name__", type(function).__name__)
    try:
        text = inspect.getsource(function if hasattr(function, "__name__") else type(function))
    except (OSError, TypeError):
        raise InputError(
            f"{name} has no source to record: define it in a file, so that the run can be continued with it"
        ) from None
    return f"{name} {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def refuse_days(task: Pretraining) -> None:
    """Raise InputError where a CPU would need more than a day, by its speed at matrix products."""
    plan, config = task.plan, task.config
    if task.device.type != "cpu" or config.runtime.yes:
        return
    second = plan.total_steps - plan.switch_step
    flop = plan.switch_step * rough_flop(task, 0) + second * rough_flop(task, plan.switch_step)
    whole = config.batch_size * flop
    if whole < SURELY_A_DAY_LESS:
        return
    from cmt_mae.tools.bench.peak import peak_flops

    peak = peak_flops(task.device, "fp32")["flops"] * task.accelerator.num_processes
    seconds = OVER_PRODUCTS * whole / peak
    if any_process(task.accelerator, seconds > DAY):
        raise InputError(
            f"on this CPU {plan.total_steps} steps of {config.batch_size} images would take about "
            f"{duration(seconds)}: take a recipe of a smaller scale, such as --recipe cmt_all,micro64, or add "
            "--yes to begin all the same"
        )


def rough_flop(task: Pretraining, step: int) -> float:
    """FLOP of one image at a step, about: 2 for each weight and token, three times that where gradients flow."""
    plan, frozen, student = task.plan, task.frozen_networks, task.learner.student

    def weights(network: nn.Module) -> int:
        return sum(p.numel() for p in network.parameters() if p.ndim > 1)

    behind = weights(task.learner) - weights(student)  # decoder and heads
    products = 3 * ((plan.n_patches - plan.n_mask) * weights(student) + plan.n_patches * behind)
    # kept outputs: after the first epoch the teacher no longer runs
    kept = task.config.teacher.cache or task.config.teacher.view == "photo"
    if frozen.teacher is not None and not kept:
        products += math.prod(frozen.teacher.own_grid) * weights(frozen.teacher.model)
    if task.alphas_at(step).loss > 0:
        products += plan.n_patches * weights(student)
    return 2.0 * products


def keep_range(source: Source, run: RunDir) -> None:
    """A run that is continued reads images of more than 8 bits as it did; older ones by all of 16 bits."""
    if list_checkpoints(run.checkpoints) and (known := run.known_facts().get("data")):
        before = known.get("range")
        source.limits = (float(before[0]), float(before[1])) if before else None


def open_probe(
    config: PretrainConfig, accelerator: Accelerator, limits: Sequence[float]
) -> tuple[Any, dict[str, int]]:
    """(backbone -> k-NN accuracy in percent, images in train and val); (None, {}) without ``probe_data``.

    limits: of the training images, if these have more than 8 bits: the probe's are read alike.
    Raises InputError for data without train, val or labels.
    """
    if not config.runtime.probe_data:
        return None, {}
    from cmt_mae.evaluate.online import OnlineProbe

    probe = OnlineProbe.open(config.runtime.probe_data, limits, config.data.val_share)
    assert probe is not None

    def measure(backbone: Backbone) -> float:
        return probe.measure(backbone, accelerator)

    return measure, {"train": len(probe.train), "val": len(probe.val)}


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
