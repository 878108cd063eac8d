"""The faults, one row each: set up, injected for real, and the promise that must hold.

Whole runs, signals, disks and many tries are made here; what a test of tests/ makes already, by that test.

    python -m benchmarks.faults                     # all rows; about half an hour on 2 free cores
    python -m benchmarks.faults --only disk kill    # rows whose name has a word; the others keep their figures
    python -m benchmarks.faults --quick             # one trial of each, into runs/faults_quick
    python -m benchmarks.faults --list

writes docs/results/faults.json after every row, and docs/results/faults.md from it. Exit status 1 where a promise
was broken.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
import zlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.faults import files, folders, inputs, runs, tested, training
from benchmarks.faults.lab import Broken, Lab, NotHere, Row
from benchmarks.timing import REPOSITORY, RESULTS
from cmt_mae.core.files import write_atomically, write_json
from cmt_mae.core.runs import environment

TABLE: list[Row] = [*runs.ROWS, *folders.ROWS, *files.ROWS, *inputs.ROWS, *training.ROWS, *tested.ROWS]


def main(words: list[str] | None = None) -> int:
    """Run the rows asked for, one after another."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=[], help="parts of names")
    parser.add_argument("--quick", action="store_true", help="one trial of each row, small ones")
    parser.add_argument("--list", action="store_true", help="print the rows and end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="folder for faults.json, faults.md")
    given = parser.parse_args(words)
    chosen = chosen_rows(given.only)
    if not chosen:
        parser.error(f"no row's name contains {' or '.join(given.only)}: see --list")
    if given.list:
        print("\n".join(f"{row.name}: {row.promise} ({row.times})" for row in chosen))
        return 0
    out = given.out or (REPOSITORY / "runs" / "faults_quick" if given.quick else RESULTS)
    path = out / "faults.json"
    before: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    found = before.get("rows", {})
    with tempfile.TemporaryDirectory(prefix="faults_") as name:
        lab = Lab(Path(name), given.quick)
        for row in chosen:
            found[row.name] = entry = run(row, lab, given.seed)
            print(f"{entry['state']:9} {row.name} ({entry['seconds']} s)", file=sys.stderr, flush=True)
            for failure in entry["failures"]:
                print(f"          {failure}", file=sys.stderr, flush=True)
            order = {row.name: found[row.name] for row in TABLE if row.name in found}
            content = {"command": "python -m benchmarks.faults", **environment(), "rows": order}
            write_json(path, content)
            text = page(content)
            write_atomically(out / "faults.md", lambda aside, t=text: aside.write_text(t))
    return 1 if any(found[row.name]["failures"] for row in chosen) else 0


def chosen_rows(parts: list[str]) -> list[Row]:
    """Rows whose name contains one of the words; all without any."""
    return [row for row in TABLE if not parts or any(part in row.name for part in parts)]


def run(row: Row, lab: Lab, seed: int) -> dict[str, Any]:
    """All trials of a row. An error of the harness itself counts as a failure: nothing was shown."""
    begin, failures, absent = time.perf_counter(), [], ""
    times = 1 if lab.quick else row.times
    for number in range(times):
        rng = random.Random(zlib.crc32(f"{seed} {row.name} {number}".encode()))
        try:
            row.trial(lab, rng)
        except Broken as broken:
            failures.append(f"trial {number}: {broken}")
        except NotHere as reason:
            absent = str(reason)
            break
        except Exception as error:
            failures.append(f"trial {number}: the harness: {type(error).__name__}: {error}")
    return {
        "promise": row.promise, "state": "not here" if absent else "FAIL" if failures else "PASS",
        "trials": times, "failures": [" ".join(f.split())[:600] for f in failures], "not_here": absent,
        "seconds": round(time.perf_counter() - begin, 1), "seed": seed, "quick": lab.quick, "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }  # fmt: skip


def commit() -> str:
    """Of the tree that is put to the test, "" outside of git."""
    words = ["git", "-C", str(REPOSITORY), "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()


def page(content: dict[str, Any]) -> str:
    """The table as Markdown."""
    rows = content["rows"]
    states = [row["state"] for row in rows.values()]
    versions, hardware = content["versions"], content["hardware"]
    lines = [
        "# Faults",
        "",
        f"Made by `{content['command']}` (`make test-faults`): every fault is made for real, on files and "
        f"processes. {states.count('PASS')} rows pass, {states.count('FAIL')} fail, {states.count('not here')} "
        f"cannot be made on that machine. {hardware['processor']}, {hardware['cores']} cores; Python "
        f"{versions['python']}, torch {versions['torch']}. Each row with its own commit and date.",
        "",
        "| fault | promise | trials | | seconds | commit | date |",
        "| --- | --- | ---: | --- | ---: | --- | --- |",
    ]
    for name, row in rows.items():
        mark = " (quick)" if row["quick"] else ""
        lines.append(
            f"| {name}{mark} | {row['promise']} | {row['trials']} | {row['state']} | {row['seconds']} | "
            f"{row['commit']} | {row['date']} |"
        )
    told = [
        f"- {name}: {text}"
        for name, row in rows.items()
        for text in (*row["failures"], row["not_here"])
        if text
    ]
    if told:
        lines += ["", "## What failed, and what could not be made", "", *told]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
