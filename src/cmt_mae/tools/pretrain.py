"""The command ``pretrain``: builds the task and passes in what other rooms add to it (hooks.py)."""

import math
from pathlib import Path
from typing import Any

from torch import nn

from cmt_mae.core.errors import InputError
from cmt_mae.core.runs import RunDir, plain
from cmt_mae.core.settings import resume_safe_settings
from cmt_mae.engine.fit import fit
from cmt_mae.engine.processes import make_accelerator
from cmt_mae.method.cmtmae import MaskRule, TargetFunction
from cmt_mae.method.vit import Vit
from cmt_mae.pretraining.assembly import (
    build_frozen_networks,
    build_learner,
    build_teacher,
    crop_settings,
    statistics,
)
from cmt_mae.pretraining.plan import make_plan
from cmt_mae.pretraining.settings import PretrainConfig
from cmt_mae.pretraining.task import Hooks, Images, Pretraining

SURELY_A_DAY_LESS = 5e14
"""FLOP that the slowest CPU makes in a day; only above it the machine is measured."""


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
    if config.student.preset == "init_from":
        from cmt_mae.pretraining.start import take_shape

        take_shape(config)
    config.check()
    runtime = config.runtime
    accelerator = make_accelerator(runtime.device, config.precision, runtime.deterministic)
    source = config.data.open_train()
    continued, extended = (Path(config.out) / "config.yaml").is_file(), False
    if continued:
        from cmt_mae.tools.continued import extend, keep_range

        extended = extend(config)
    elif runtime.extend:
        raise InputError(f"{config.out} holds no run that could be extended: leave out --extend")
    plan = make_plan(config, len(source), accelerator.num_processes)
    run = RunDir(
        config.out,
        plain(config),
        (*resume_safe_settings(PretrainConfig), *(("epochs", "extended") if extended else ())),
        writes=accelerator.is_main_process,
        defaults=plain(PretrainConfig()),
    )
    if continued:
        keep_range(source, run)
    width = 0
    functions = {"mask_rule": mask_rule, "target": target}
    named: dict[str, str | None] = dict.fromkeys(functions)
    if mask_rule is not None or target is not None:
        from cmt_mae.tools.own_functions import source_of, target_width

        width = target_width(config, target)
        named = {name: source_of(function) for name, function in functions.items()}
    try:
        stats = statistics(config, source)
        teacher, backbone = build_teacher(config, stats)
        frozen = build_frozen_networks(config, teacher, stats)
        frozen.mask_rule, frozen.target_function = mask_rule, target
        hooks = Hooks(draw_attention)
        sizes: dict[str, int] = {}
        if runtime.probe_data:
            from cmt_mae.tools.hooks import open_probe

            hooks.probe, sizes = open_probe(config, accelerator, source.limits or ())
        task = Pretraining(
            config,
            accelerator,
            plan,
            build_learner(config, teacher, width, stats),
            frozen,
            images=Images(source, crop_settings(config, teacher)),
            stats=stats,
            teacher=backbone,
            hooks=hooks,
        )
        if task.device.type == "cpu" and not runtime.yes:
            plan = task.plan
            second = plan.total_steps - plan.switch_step
            flop = plan.switch_step * rough_flop(task, 0) + second * rough_flop(
                task, plan.switch_step
            )
            if config.batch_size * flop >= SURELY_A_DAY_LESS:
                from cmt_mae.tools.hooks import refuse_days

                refuse_days(task, run, config.batch_size * flop)
        facts = {**task.facts(0), "plan": vars(plan), "functions": named}
        if sizes:
            facts["probe"] = sizes
        return fit(runtime, task, accelerator, run, facts).row
    finally:
        run.close()


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


def draw_attention(task: Pretraining, student: Vit, step: int, run: RunDir) -> None:
    """A picture of what guides the mask."""
    from cmt_mae.tools.hooks import draw_attention as draw

    draw(task, student, step, run)
