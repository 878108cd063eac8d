"""Is a fast way the same step? Loss, gradients, targets and scores against the eager step, before timing."""

from typing import Any

import torch
from torch import Tensor

from cmt_mae.data.loader import Batch
from cmt_mae.method import cmtmae
from cmt_mae.pretraining.stepping import Stepper
from cmt_mae.tools.bench.measure import replaced

# Largest relative error (norm of the difference over the norm) against eager fp32, in fp32.
FP32 = {"loss": 1e-5, "gradients": 1e-3, "targets": 1e-4, "scores": 1e-4}
# In bf16: at most so many times the error of the eager bf16 step against the eager fp32 step, plus FLOOR.
TIMES = {"same": 2.0, "frozen": 4.0, "fp8": 20.0}
FLOOR = 1e-4
REPLAYS = 2  # a captured step is right only when its replay is, on another batch than the capture's


def look(stepper: Stepper, batches: list[Batch], step: int, mask: Any = None) -> dict[str, Any]:
    """Loss, gradients, targets, scores and mask of the last batch, with ``mask`` in place of its own if given.

    Numbers are on the CPU, the mask is where it was. The weights do not move. The batches before the last are
    only run (a graph is captured on the first).
    """
    seen: dict[str, Any] = {}

    def record_scores(real: Any) -> Any:
        def sample_mask(
            rule: str, count: int, noise: Tensor, grid: Any, scores: Any = None, **more: Any
        ) -> Any:
            own = real(rule, count, noise, grid, scores, **more)
            seen["scores"], seen["own_mask"] = scores, own.mask
            return own if mask is None else mask

        return sample_mask

    def record_targets(real: Any) -> Any:
        def targets(*arguments: Any) -> Any:
            found = real(*arguments)
            seen["mask"] = arguments[2]  # self, look, mask, alpha, logs
            seen["targets"] = found
            return found

        return targets

    with (
        replaced(cmtmae, "sample_mask", record_scores),
        replaced(cmtmae.FrozenNetworks, "_targets", record_targets),
    ):
        for batch in batches:
            stepper.optimizer.zero_grad(set_to_none=True)
            loss = stepper.loss(batch, step)
            stepper.accelerator.backward(loss)
    gradients = [
        p.grad.detach().clone() for p in stepper.learner.parameters() if p.grad is not None
    ]
    stepper.optimizer.zero_grad(set_to_none=True)
    stepper.meters.read()
    return {
        "loss": loss.detach().float().cpu(),
        "gradients": torch.cat([g.float().flatten() for g in gradients]).cpu(),
        "targets": torch.cat([t.float().flatten() for t in seen["targets"].values()]).cpu(),
        "scores": None if seen["scores"] is None else seen["scores"].float().cpu(),
        "own_mask": seen["own_mask"].cpu(),
        "mask": seen["mask"],
    }  # fmt: skip


def relative(found: Tensor, wanted: Tensor) -> float:
    """||found - wanted|| / ||wanted||; nan where anything is not finite."""
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-12))


def errors(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, float]:
    """Relative errors, and the share of hidden patches that both would hide."""
    made = {
        name: relative(found[name], wanted[name])
        for name in ("loss", "gradients", "targets", "scores")
        if wanted[name] is not None
    }
    agree = (found["own_mask"] & wanted["own_mask"]).sum() / wanted["own_mask"].sum()
    return {**made, "mask_agreement": float(agree)}


def judge(
    found: dict[str, float], precision: str, kind: str, yardstick: dict[str, float] | None
) -> list[str]:
    """What is out of bounds, in words; nothing: equal. kind: same | frozen | fp8."""
    bad = []
    for name, error in found.items():
        if name == "mask_agreement":
            least = {"fp32": 0.995, "bf16": 0.9}[precision] if kind != "fp8" else 0.5
            if not error >= least:
                bad.append(f"{name} {error:.4f}, wanted {least} or more")
            continue
        if precision == "fp32":
            limit = FP32[name]
        else:
            assert yardstick is not None
            limit = TIMES[kind] * yardstick[name] + FLOOR
        if not error <= limit:  # nan is out of bounds too
            bad.append(f"{name} {error:.2e}, allowed {limit:.2e}")
    return bad
