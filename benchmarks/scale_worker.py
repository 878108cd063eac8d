"""One process of benchmarks/scale.py: takes commands on stdin, answers with JSON lines on stdout.

{"do": "steps", "count": 4, "bucket_mb": 25, "sync": true}   seconds of so many training steps
{"do": "all_reduce", "count": 5}                             seconds of averaging all gradients, alone
"""

import contextlib
import json
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import DistributedDataParallelKwargs

from benchmarks.gpu_variants import VARIANTS, settings
from cmt_mae.pretraining import assemble
from cmt_mae.pretraining.stepping import Stepper
from cmt_mae.tools.bench.build import make_stepper, synthetic_batches
from cmt_mae.tools.bench.measure import replaced


def main() -> None:
    """argv: images a process, processes, size of ``gpu_variants.settings``."""
    images, processes, size = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    answers = sys.stdout
    sys.stdout = sys.stderr  # nothing else may write between the answers
    torch.set_num_threads(1)
    run = settings(size, "two", VARIANTS["eager"], images * processes, precision="fp32")
    run.runtime.device, run.teacher.name = "cpu", "embedded"
    stepper, teacher = make_stepper(run)
    crops = assemble.crop_settings(run, teacher)
    batches = synthetic_batches(crops, run.mask.rule, stepper.plan.n_patches, images)
    step = stepper.plan.switch_step
    stepper.enter_stage(step)
    learning = [p for p in stepper.learner.parameters() if p.requires_grad]
    gradient = torch.zeros(sum(p.numel() for p in learning))
    tell(answers, {"gradient_bytes": 4 * gradient.numel(), "images": images})
    for line in sys.stdin:
        order: dict[str, Any] = json.loads(line)
        begin = time.perf_counter()
        if order["do"] == "all_reduce":
            seconds = all_reduce(gradient, order["count"])
        elif order["do"] == "wrap":
            bucket = DistributedDataParallelKwargs(bucket_cap_mb=order["bucket_mb"])
            stepper.accelerator.ddp_handler = bucket
            stepper.enter_stage(step)
            stepper.step(batches, step)  # the first step of a wrapper orders its buckets
            seconds = time.perf_counter() - begin
        else:
            seconds = steps(stepper, batches, step, order["count"], order["sync"])
        tell(answers, {"seconds": seconds})


def steps(stepper: Stepper, batches: Any, step: int, count: int, sync: bool) -> float:
    """Seconds of ``count`` steps from a common start; without sync no gradient is exchanged."""

    def never(real: Any) -> Any:
        return lambda _: real(False)

    if dist.is_initialized():
        dist.barrier()
    with contextlib.nullcontext() if sync else replaced(stepper, "synchronised", never):
        begin = time.perf_counter()
        for _ in range(count):
            stepper.step(batches, step)
        return time.perf_counter() - begin


def all_reduce(gradient: torch.Tensor, count: int) -> float:
    """Seconds of ``count`` sums of the whole gradient over all processes, with nothing to hide behind."""
    dist.barrier()
    begin = time.perf_counter()
    for _ in range(count):
        dist.all_reduce(gradient)
    return time.perf_counter() - begin


def tell(answers: Any, content: dict[str, Any]) -> None:
    """One line."""
    answers.write(json.dumps(content) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
