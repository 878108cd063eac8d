"""The ladder on Imagenette: from an untrained encoder to CMT-MAE, each rung at the same number of steps.

    python -m benchmarks.ladder --data imagenette_128/ --teacher deit_tiny.safetensors --work runs/ladder

trains every rung that is not trained yet (each continues where it stopped), evaluates it with k-NN and linear
probes, and writes docs/results/ladder.json and ladder.md. ``--only NAME`` takes single rungs, so that several
processes can share the work; without ``--only`` the table is made of everything that is finished.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "docs" / "results"
RUNGS: dict[str, tuple[str, list[str], str]] = {
    # name: recipe, further settings, what it is
    "mae_s0": ("mae", ["--seed=0"], "MAE: random mask, pixels"),
    "mae_s1": ("mae", ["--seed=1"], "MAE, second seed"),
    "mvp_s0": ("mvp", ["--seed=0"], "random mask, teacher features"),
    "teacher_guided_s0": (
        "teacher_guided",
        ["--seed=0"],
        "attended patches hidden (drawn), teacher features",
    ),
    "sampled_visible_s0": (
        "teacher_guided",
        ["--seed=0", "--mask.rule=sampled_visible"],
        "attended patches visible (drawn), teacher features",
    ),
    "cmt_s0": ("cmt", ["--seed=0"], "CMT-MAE: stage two from half way, alpha 0.3"),
    "cmt_s1": ("cmt", ["--seed=1"], "CMT-MAE, second seed"),
    "cmt_visible_s0": (
        "cmt",
        ["--seed=0", "--mask.rule=sampled_visible"],
        "CMT-MAE with attended patches visible",
    ),
    "mvp_all_cls_s0": (
        "mvp",
        ["--seed=0", "--target.tokens=all+cls"],
        "random mask, teacher features of all patches and the class token",
    ),
}


def train(name: str, options: argparse.Namespace) -> None:
    """One rung, through the command line as a user would."""
    recipe, settings, _ = RUNGS[name]
    command = [
        sys.executable, "-m", "cmt_mae", "pretrain", "--recipe", f"{recipe},micro64", "--data", options.data,
        "--teacher", options.teacher, "--out", str(options.work / name), "--epochs", str(options.epochs),
        "--optim.warmup_epochs", str(options.epochs / 10), "--optim.blr", str(options.blr),
        "--runtime.micro_batch", "16", "--workers", "0", "--runtime.progress", "false", *settings,
    ]  # fmt: skip
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(options.threads)})


def main() -> None:
    """Train what is missing, then evaluate and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", required=True, help="Imagenette packed at 128 px, with train and val"
    )
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/ladder"))
    parser.add_argument("--epochs", type=float, default=8)
    parser.add_argument("--blr", type=float, default=8e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=None, choices=list(RUNGS))
    options = parser.parse_args()
    for name in options.only if options.only is not None else []:
        train(name, options)
    if options.only is None:
        from benchmarks.ladder_table import write_table

        write_table(options.work, options.data, options.teacher, RUNGS, RESULTS)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file."""
    content: dict[str, Any] = json.loads(path.read_text())
    return content


if __name__ == "__main__":
    main()
