"""How right the doctor's estimate is: the estimate, the run itself, and the estimate again, on the same machine.

``python -m benchmarks.estimate_error --data packed/ --out doctor.json`` takes some minutes. What the machine does
beside is part of the error: the load is recorded.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from cmt_mae.core.files import write_json
from cmt_mae.core.parsing import parse
from cmt_mae.core.recipes import load_recipes
from cmt_mae.core.run_reader import read_metrics
from cmt_mae.core.runs import environment
from cmt_mae.data.sources import open_split
from cmt_mae.pretraining.settings import PretrainConfig
from cmt_mae.tools.diagnose.estimate import estimate
from cmt_mae.tools.pretrain import pretrain

CASES: dict[str, tuple[str, list[str], float]] = {
    "MAE, micro, steps of 64": ("mae,demo,mae", ["--epochs=2"], 5.0),
    "CMT-MAE, micro, steps of 64, k-NN twice": (
        "demo",
        ["--epochs=2", "--runtime.probe_every=1", "--runtime.probe_data={data}"],
        5.0,
    ),
    "CMT-MAE, micro, steps of 256": ("demo", ["--epochs=2", "--batch_size=256"], 15.0),
    "the same, from steps that fit into 1 s": ("demo", ["--epochs=2", "--batch_size=256"], 1.0),
    "random mask, teacher, ViT-Ti at 128 px": (
        "mvp,demo,mvp",
        ["--epochs=0.5", "--student.preset=tiny", "--student.img_size=[128]", "--student.patch_size=16",
         "--batch_size=32"],
        5.0,
    ),
}  # fmt: skip
"""name -> (recipe, settings, seconds for each stage)."""


def case(recipe: str, words: list[str], seconds: float, data: str, out: Path) -> dict[str, Any]:
    """Estimate, run, estimate."""
    given = [word.format(data=data) for word in words]
    common = [f"--data.path={data}", f"--out={out}", "--runtime.progress=false", *given]
    config: PretrainConfig = parse("cmt-mae", PretrainConfig, common, load_recipes(recipe))
    source = open_split(data, "train")
    load = os.getloadavg()[0]
    before = estimate(config, source, len(source), seconds)
    begin = time.perf_counter()
    pretrain(config)
    spent = time.perf_counter() - begin
    after = estimate(config, source, len(source), seconds)
    rows = [row for row in read_metrics(out) if "loss" in row]
    return {
        "steps": before["total_steps"],
        "seconds": spent,
        "estimate_before": before["seconds"],
        "estimate_after": after["seconds"],
        "error_before": before["seconds"] / spent - 1,
        "error_after": after["seconds"] / spent - 1,
        "measured_images": [one["measured_images"] for one in before["stages"].values()],
        "memory_gb": rows[-1]["peak_memory_gb"],
        "memory_estimate_gb": before["memory_gb"],
        "load_before_and_after": [round(load, 2), round(os.getloadavg()[0], 2)],
    }


def main() -> None:
    """All cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="packed images with train and val")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    options = parser.parse_args()
    content: dict[str, Any] = {**environment(), "cases": {}}
    for name, (recipe, words, seconds) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            found = case(recipe, words, seconds, options.data, Path(folder) / "run")
        content["cases"][name] = found
        print(
            f"{name}: {found['estimate_before']:.1f} and {found['estimate_after']:.1f} s told, "
            f"{found['seconds']:.1f} s taken",
            flush=True,
        )
        write_json(options.out, content)


if __name__ == "__main__":
    main()
