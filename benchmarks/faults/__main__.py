"""The fault campaign; exit status 1 where a promise was broken.

    python -m benchmarks.faults                       # every part
    python -m benchmarks.faults --parts kills,soak    # some parts; the others keep their earlier figures
    python -m benchmarks.faults --quick               # a few trials of each kind, into runs/faults_quick

writes docs/results/faults.json after every part, and docs/results/faults.md from it.
"""

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.faults.campaign import SHARED, Options, Verdict
from cmt_mae.core.files import write_atomically, write_json
from cmt_mae.core.runs import environment

REPOSITORY = Path(__file__).resolve().parents[2]
PARTS = (
    "kills",
    "signals",
    "checkpoints",
    "images",
    "shards",
    "workers",
    "numerics",
    "processes",
    "soak",
    "hostile",
    "fuzz",
)
"""Modules of this package, each with ``campaign(options: Options) -> Verdict``."""


def main(words: list[str] | None = None) -> int:
    """Run the parts asked for, one after another; the number of broken promises becomes the status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated")
    parser.add_argument("--quick", action="store_true", help="a few trials of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shared", type=Path, default=SHARED)
    parser.add_argument("--out", type=Path, default=None, help="folder for faults.json, faults.md")
    given = parser.parse_args(words)
    parts = given.parts.split(",")
    for part in parts:
        if part not in PARTS:
            parser.error(f"'{part}' is unknown: use {', '.join(PARTS)}")
    quick_out, results = REPOSITORY / "runs" / "faults_quick", REPOSITORY / "docs" / "results"
    out = given.out or (quick_out if given.quick else results)
    path, broken = out / "faults.json", 0
    entries: dict[str, Any] = json.loads(path.read_text())["parts"] if path.exists() else {}
    for number, part in enumerate(parts, start=1):
        print(f"[{number}/{len(parts)}] {part}", file=sys.stderr, flush=True)
        entry = run(part, given.quick, given.seed, given.shared)
        broken += len(entry["failures"])
        entries[part] = entry
        content = {"command": "python -m benchmarks.faults", **environment(), "parts": entries}
        write_json(path, content)
        text = page(content)
        write_atomically(out / "faults.md", lambda aside, t=text: aside.write_text(t))
    print(f"{path}: {broken} broken promise(s)", file=sys.stderr)
    return 1 if broken else 0


def run(part: str, quick: bool, seed: int, shared: Path) -> dict[str, Any]:
    """One part in a scratch folder of its own."""
    begin = time.perf_counter()
    campaign = importlib.import_module(f"benchmarks.faults.{part}").campaign
    with tempfile.TemporaryDirectory(prefix=f"faults_{part}_") as folder:
        verdict: Verdict = campaign(Options(Path(folder), quick, seed, shared))
    seconds = round(time.perf_counter() - begin, 1)
    print(
        f"  {verdict.trials} trials, {len(verdict.failures)} failures, {seconds} s", file=sys.stderr
    )
    for failure in verdict.failures:
        print(f"  BROKEN: {failure}", file=sys.stderr)
    about = {"seed": seed, "quick": quick, "seconds": seconds, "commit": commit()}
    return {**asdict(verdict), **about, "date": datetime.now(UTC).date().isoformat()}


def commit() -> str:
    """Of the tree that is put to the test, "" outside of git."""
    words = ["git", "-C", str(REPOSITORY), "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()


def page(content: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        "# Fault campaign",
        "",
        f"Made by `{content['command']}` on {content['hardware']['processor']}; all figures are in faults.json.",
        "",
        "| part | promise | trials | broken | seconds | commit |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    for part, entry in content["parts"].items():
        mark = " (quick)" if entry["quick"] else ""
        lines.append(
            f"| {part}{mark} | {entry['promise']} | {entry['trials']} | {len(entry['failures'])} | "
            f"{entry['seconds']} | {entry['commit']} |"
        )
    for part, entry in content["parts"].items():
        lines += ["", f"## {part}", ""]
        lines += [f"- {name}: {value}" for name, value in entry["figures"].items()]
        lines += [f"- BROKEN: {failure}" for failure in entry["failures"]]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
