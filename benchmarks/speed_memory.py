"""Peak of resident memory of a step, each contestant in a process of its own.

python -m benchmarks.speed_memory CONTESTANT SIZE IMAGES prints one JSON object; used by side_by_side.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import torch

from benchmarks.speed_steps import (
    describe,
    naive_step,
    our_step,
    settings,
    transformers_step,
)
from benchmarks.speed_timing import Options
from cmt_mae.core.runs import processor
from cmt_mae.tools.bench.build import frozen_backbone
from cmt_mae.tools.bench.measure import forget_peak, peak_gb

CONTESTANTS = ("mae", "transformers", "one", "two", "naive one", "naive two")
STEPS = 2


def compare_memory(options: Options) -> Iterator[dict[str, Any]]:
    """Peaks at the largest size asked for; wanted: stage two within 1.25 x mae plus the frozen weights."""
    size = options.sizes[-1]
    images = 2 if options.quick else 8
    rows: dict[str, Any] = {}
    for name in CONTESTANTS:
        command = [sys.executable, "-m", "benchmarks.speed_memory", name, size, str(images)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
        rows[name] = json.loads(done.stdout.splitlines()[-1])
        above = rows[name]["above_start_gb"]
        print(f"memory/{size:21} {name:28} {above:10.4g} GB", file=sys.stderr, flush=True)
    mae, two = rows["mae"]["above_start_gb"], rows["two"]["above_start_gb"]
    allowed = 1.25 * mae + rows["two"]["frozen_gb"]
    yield {
        "part": "memory",
        "name": f"memory/{size}",
        "what": (
            f"Peak of resident memory of {STEPS} optimizer steps of {images} images, "
            f"{describe(settings('cmt', size))}, above what the process held after its imports. Each contestant "
            "runs in a process of its own."
        ),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
        "processor": processor(),
        "peaks": rows,
        "facts": {
            "dtype": "fp32",
            "allowed_gb": allowed,
            "stage_two_gb": two,
            "rule": "1.25 x mae + weights of teacher and momentum student",
        },
    }


def main() -> None:
    """One contestant."""
    name, size, images = sys.argv[1:]
    device = torch.device("cpu")
    method = "mae" if name in ("mae", "transformers") else "cmt"
    config = settings(method, size, f"--batch_size={images}")
    if name == "transformers":
        import transformers  # noqa: F401 (its import is not the step's memory)
    forget_peak(device)
    start = peak_gb(device)
    frozen = 0
    if method == "mae":
        step = our_step(config, "one")[1] if name == "mae" else transformers_step(config)
    else:
        stage = name.removeprefix("naive ")
        backbone = frozen_backbone(config)
        momentum: Any
        if name.startswith("naive"):
            model, step = naive_step(config, stage, backbone, "last")
            momentum = model.momentum
        else:
            stepper, step = our_step(config, stage, backbone)
            momentum = stepper.guides.momentum
        nets = [backbone.model] + ([] if momentum is None else [momentum])
        frozen = sum(p.numel() * p.element_size() for net in nets for p in net.parameters())
        del nets
        del backbone
    # building makes copies that training does not need: what counts is the steps
    fresh = forget_peak(device)
    for _ in range(STEPS):
        step()
    peak = peak_gb(device)
    print(
        json.dumps(
            {
                "peak_gb": peak,
                "start_gb": start,
                "above_start_gb": peak - start,
                "frozen_gb": frozen / 1e9,
                "peak_of_steps_alone": fresh,
            }
        )
    )


if __name__ == "__main__":
    main()
