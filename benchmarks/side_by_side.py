"""Speed side by side with public code: one process, contestants in turns, medians of at least 7.

    python -m benchmarks.side_by_side                       # all parts, about 10 minutes on 2 free cores
    python -m benchmarks.side_by_side --parts mae,cmt       # some parts; the others keep their earlier numbers
    python -m benchmarks.side_by_side --sizes small,vits16,vitb16
    python -m benchmarks.side_by_side --quick               # does everything work? (no measurement)

writes docs/results/speed.json after every comparison, and docs/results/speed.md from it. A quick run writes to
runs/speed_quick instead. Set OMP_NUM_THREADS for another number of threads.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.ladder import REPOSITORY, RESULTS
from benchmarks.speed_data import compare_loader
from benchmarks.speed_masks import compare_masks
from benchmarks.speed_memory import compare_memory
from benchmarks.speed_page import page
from benchmarks.speed_profile import compare_profile
from benchmarks.speed_readout import compare_features, compare_knn, compare_sweep
from benchmarks.speed_steps import SIZES, compare_cmt, compare_cost, compare_mae
from benchmarks.speed_timing import SHARED, Options, say
from cmt_mae.core.files import write_atomically, write_json
from cmt_mae.core.runs import environment

PARTS: dict[str, Callable[[Options], Iterator[dict[str, Any]]]] = {
    "mae": compare_mae,
    "cmt": compare_cmt,
    "profile": compare_profile,
    "cost": compare_cost,
    "memory": compare_memory,
    "loader": compare_loader,
    "features": compare_features,
    "knn": compare_knn,
    "sweep": compare_sweep,
    "masks": compare_masks,
}


def main(words: list[str] | None = None) -> dict[str, Any]:
    """Run the parts asked for; returns the content of the JSON file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated")
    parser.add_argument("--sizes", default="small,vits16", help=f"of {', '.join(SIZES)}")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="smoke run: small, 2 rounds")
    parser.add_argument("--shared", type=Path, default=SHARED)
    parser.add_argument("--out", type=Path, default=None, help="folder for speed.json and speed.md")
    given = parser.parse_args(words)
    parts, sizes = given.parts.split(","), tuple(given.sizes.split(","))
    known: dict[str, list[str]] = {"parts": list(PARTS), "sizes": list(SIZES)}
    for name, choices in [(p, known["parts"]) for p in parts] + [
        (s, known["sizes"]) for s in sizes
    ]:
        if name not in choices:
            parser.error(f"'{name}' is unknown: use {', '.join(choices)}")
    if given.rounds < 7:
        parser.error(
            "a median of fewer than 7 rounds is no measurement: give --rounds 7 or more, or --quick"
        )
    options = Options(
        rounds=2 if given.quick else given.rounds,
        sizes=("small",) if given.quick else sizes,
        quick=given.quick,
        shared=given.shared,
    )
    out = given.out or (REPOSITORY / "runs" / "speed_quick" if given.quick else RESULTS)
    return run(parts, options, out)


def run(parts: list[str], options: Options, out: Path) -> dict[str, Any]:
    """Measure part by part, writing as it goes."""
    path, begin = out / "speed.json", time.perf_counter()
    entries: dict[str, Any] = {}
    if path.exists():
        entries = json.loads(path.read_text())["comparisons"]
    content: dict[str, Any] = {}
    for number, part in enumerate(parts, start=1):
        print(f"[{number}/{len(parts)}] {part}", file=sys.stderr, flush=True)
        for entry in PARTS[part](options):
            if "contestants" in entry:
                say(entry)
            entries[entry["name"]] = entry | {"quick": options.quick}
            content = {
                "command": "python -m benchmarks.side_by_side",
                "threads": torch.get_num_threads(),
                "seconds_of_last_run": round(time.perf_counter() - begin, 1),
                **environment(),
                "comparisons": entries,
            }
            write_json(path, content)
    text = page(content)
    write_atomically(out / "speed.md", lambda aside: aside.write_text(text, encoding="utf-8"))
    seconds = time.perf_counter() - begin
    print(f"{path} and speed.md after {seconds:.0f} s", file=sys.stderr, flush=True)
    return content


if __name__ == "__main__":
    main()
