"""Where a step's time goes on one thread, by kind of operation, and what no step in fp32 can go below."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.speed_steps import describe, naive_step, our_step, settings, transformers_step
from benchmarks.speed_timing import OURS, Options
from cmt_mae.core.runs import processor
from cmt_mae.tools.bench.build import frozen_backbone

KINDS: dict[str, tuple[str, ...]] = {
    # kind: beginnings of the names of torch's operations
    "matrix products": (
        "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mkldnn_convolution",
        "aten::convolution_backward", "aten::_convolution",
    ),
    "attention": ("aten::_scaled_dot_product",),
    "optimizer and average": ("aten::_fused_adamw", "aten::lerp", "aten::_foreach", "Optimizer."),
}  # fmt: skip
STEPS = 3


def compare_profile(options: Options) -> Iterator[dict[str, Any]]:
    """MAE and stage two of CMT-MAE, ours and the rival, at every size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for size in options.sizes:
            for method, stage, wanted in (("mae", "one", 1.25), ("cmt", "two", 1.6)):
                yield profiled(method, stage, size, wanted, options.quick)
    finally:
        torch.set_num_threads(threads)


def profiled(method: str, stage: str, size: str, wanted: float, quick: bool) -> dict[str, Any]:
    """Milliseconds a step by kind, and the ratio that is left if all but the products cost nothing."""
    config = settings(method, size, quick=quick)
    if method == "mae":
        _, ours = our_step(config, stage)
        rival_name, rival = "transformers", transformers_step(config)
    else:
        backbone = frozen_backbone(config)
        _, ours = our_step(config, stage, backbone)
        rival_name, (_, rival) = "naive", naive_step(config, stage, backbone, "last")
    kinds = {OURS: by_kind(ours), rival_name: by_kind(rival)}
    products = kinds[OURS]["matrix products"]
    return {
        "part": "profile",
        "name": f"profile/{method}/{size}",
        "what": (
            f"CPU time of one step ({'stage two' if stage == 'two' else 'MAE'}, {config.batch_size} images, "
            f"{describe(config)}) on one thread, by torch's profiler, mean of {STEPS} steps. The limit: the "
            f"rival's whole step over our matrix products alone, as if everything else of ours took no time."
        ),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "threads": 1,
        "processor": processor(),
        "milliseconds": kinds,
        "facts": {
            "dtype": "fp32",
            "limit": sum(kinds[rival_name].values()) / products,
            "wanted_ratio": wanted,
            "rival": rival_name,
        },
    }


def by_kind(step: Callable[[], object]) -> dict[str, float]:
    """Self time of a step in milliseconds by ``KINDS`` and the rest."""
    step()
    step()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(STEPS):
            step()
    times = dict.fromkeys([*KINDS, "everything else"], 0.0)
    for event in found.key_averages():
        kind = next(
            (k for k, names in KINDS.items() if event.key.startswith(names)), "everything else"
        )
        times[kind] += event.self_cpu_time_total / 1000 / STEPS
    return times
