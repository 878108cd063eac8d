"""The step on one NVIDIA GPU: correct first, then fast, each measurement written at once.

    PYTHONPATH=src python3 -m benchmarks.gpu --out runs/gpu.json --budget-s 560        # then again: goes on
    PYTHONPATH=src python3 -m benchmarks.gpu --out runs/gpu.json --parts equal,variants --sizes base
    python -m benchmarks.gpu --dry-run --out runs/gpu_dry.json                          # on a CPU: does it work?

What is in the file already is not measured again. docs/gpu.md says what to look at. Parts: equal (each fast
way against the eager step), variants (images/s of each way), sweep (batch sizes), loader (real images), shares
(parts of a step), profile (kernels).
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

NEEDED = (
    "torch",
    "torchvision",
    "timm",
    "accelerate",
    "safetensors",
    "yaml",
    "rich",
    "PIL",
    "numpy",
    "cmt_mae",
)
PARTS = ("equal", "variants", "sweep", "loader", "shares", "profile")
# images/s on one H200 (issue 4, section 4); the second is 57 % of a large bf16 product, the first 55 %
TARGETS = {"base/two": 3400.0, "large/two": 1600.0}


def missing() -> list[str]:
    """Modules that this script needs and this machine has not."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def options(words: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu.json"))
    parser.add_argument("--budget-s", type=float, default=560.0, help="stop before so many seconds")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--sizes", default="base,large")
    parser.add_argument("--methods", default="two,one,mae", help="of mae, one, two (stages of cmt)")
    parser.add_argument("--variants", default="", help="comma-separated; default: all")
    parser.add_argument("--batch", type=int, default=256, help="images a step, outside the sweep")
    parser.add_argument("--batches", default="64,128,256,512,1024")
    parser.add_argument(
        "--best", default="compiled_step_graph", help="way of loader, sweep, profile"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--photos", default="", help="use these images in place of generated ones")
    parser.add_argument("--workers", type=int, default=-1, help="of the loader; -1: one a core")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU: no measurement")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    """0: all was measured and is equal; 1: something failed or differs; 3: the time was up first."""
    given = options(words)
    gone = missing()
    if gone:
        print(f"missing modules: {', '.join(gone)} (cmt_mae: set PYTHONPATH=src)", file=sys.stderr)
        return 2
    import torch

    from benchmarks.gpu_variants import METHODS, VARIANTS

    given.variants = given.variants or ",".join(VARIANTS)
    for name, known in (("parts", PARTS), ("methods", METHODS), ("variants", VARIANTS)):
        for word in getattr(given, name).split(","):
            if word not in known:
                print(f"--{name}: '{word}' is unknown: use {', '.join(known)}", file=sys.stderr)
                return 2
    if given.best not in VARIANTS:
        print(f"--best: '{given.best}' is unknown: use {', '.join(VARIANTS)}", file=sys.stderr)
        return 2
    if not given.dry_run and not torch.cuda.is_available():
        print("no NVIDIA GPU here: give --dry-run to see that the script works", file=sys.stderr)
        return 2
    if given.dry_run:
        given.sizes, given.batch, given.batches, given.rounds = "micro", 4, "2,4", 1
        given.workers = 1 if given.workers < 0 else given.workers
    from benchmarks.gpu_parts import run_parts

    return run_parts(given)


def workers_of(given: argparse.Namespace) -> int:
    """Loader processes."""
    return int(given.workers) if given.workers >= 0 else os.cpu_count() or 1


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder for photos, gone at the end."""
    return tempfile.TemporaryDirectory(prefix="cmt_gpu_")


def read(path: Path) -> dict[str, Any]:
    """What earlier calls measured."""
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return content


if __name__ == "__main__":
    sys.exit(main())
