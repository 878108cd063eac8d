"""The processes part of the fault campaign, a few trials; and that it notices a broken promise."""

import json
import os
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).with_name("numbers_campaigns.py")


def test_the_promise_holds_and_a_broken_one_is_noticed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, PROGRAM, "processes", tmp_path], capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["trials"]
    assert found["failures"] == []
    assert any("the curve of 2 processes is" in failure for failure in found["broken"])
