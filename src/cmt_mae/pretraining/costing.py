"""What a run costs, for run.json: multiplications of a step, and the peak of the device where it is known."""

from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator

from cmt_mae.pretraining.stepping import Stepper
from cmt_mae.tools.bench.flops import step_macs, step_of
from cmt_mae.tools.bench.measure import data_sheet


def cost_of(stepper: Stepper) -> dict[str, Any]:
    """``flop_per_image`` of each stage (one, two) and ``peak`` of one device (flops, how), or None."""
    plan, device = stepper.plan, stepper.device
    stages = {"one": 0} if plan.switch_step > 0 else {}
    if plan.switch_step < plan.total_steps:
        stages["two"] = plan.switch_step
    flop: dict[str, int] = {}
    for name, step in stages.items():
        try:
            sizes = step_of(stepper.learner, stepper.guides, stepper.weights_at(step), plan.n_mask)
        except (AttributeError, TypeError):  # a teacher built in a way that cannot be counted
            continue
        if stepper.store is not None:  # after the first epoch the teacher no longer runs
            sizes = replace(sizes, teacher=None)
        flop[name] = 2 * sum(step_macs(sizes).values())
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return {"flop_per_image": flop, "peak": data_sheet(gpu, stepper.precision)}


def joules_of_all(accelerator: Accelerator, own: float | None) -> float | None:
    """Sum over the processes; None where one of them does not know. Called by all of them."""
    if accelerator.num_processes == 1 or accelerator.device.type != "cuda":
        return own
    each = torch.tensor(float("nan") if own is None else own, device=accelerator.device)
    total = float(accelerator.reduce(each))
    return None if total != total else total
