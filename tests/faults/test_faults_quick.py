"""Parts of the fault campaign, a few trials each; and that each notices a promise broken on purpose."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("quick_campaigns.py")


@pytest.mark.parametrize(
    ("part", "trials", "noticed"),
    [
        ("images", 260, ""),
        ("shards", 300, ""),
        ("workers", 10, ""),
        ("numerics", 1, "weights that are not finite"),
        ("processes", 1, "the curve of 2 processes is"),
        ("soak", 1, "descriptors grow from"),
    ],
)
def test_the_promise_holds_and_a_broken_one_is_noticed(
    part: str, trials: int, noticed: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, PROGRAM, part, tmp_path], capture_output=True, text=True, timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["failures"] == []
    assert found["trials"] >= trials
    assert any(noticed in failure for failure in found["broken"]), found["broken"]
