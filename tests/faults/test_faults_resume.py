"""Quick campaigns of kills, signals and checkpoints, and that each notices a broken promise.

One process runs them all (it forks, so it must not have trained): resume_campaigns.py.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("resume_campaigns.py")


@pytest.fixture(scope="module")
def said() -> dict[str, Any]:
    """Part -> failures and figures of the software as it is, and failures with a promise broken."""
    with tempfile.TemporaryDirectory(prefix="faults_test_") as folder:  # open to another user
        os.chmod(folder, 0o755)
        done = subprocess.run(
            [sys.executable, str(PROGRAM), folder], capture_output=True, text=True, timeout=250,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("part", ["kills", "signals", "checkpoints"])
def test_the_promises_hold_and_a_broken_one_is_noticed(said: dict[str, Any], part: str) -> None:
    assert said[part]["failures"] == []
    assert said[part]["broken"], "a broken promise was not noticed"


def test_the_campaigns_did_something(said: dict[str, Any]) -> None:
    assert said["kills"]["figures"]["kills"] >= 2
    assert sum(said["signals"]["figures"]["stops"].values()) >= 2
    assert said["checkpoints"]["figures"]["torn writes of a small checkpoint"] >= 30
    assert said["checkpoints"]["figures"]["refusing disks under a run"] >= 4
