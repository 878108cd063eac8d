"""The shards part of the fault campaign, a few trials; and that it notices a broken promise."""

import json
import os
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).with_name("data_campaigns.py")


def test_the_shards(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "shards", str(tmp_path)], capture_output=True, text=True, timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["failures"] == []
    assert said["trials"] > 300
    assert said["broken"], "a broken promise was not noticed"
