"""The worked pages: their changes apply to the code as it is, one after the other, and their own tests pass."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = ("add-mask-rule", "add-target")
TESTS = [f"tests/method/test_{name}.py" for name in ("masking", "targets", "cmtmae")]


@pytest.mark.timeout(900)  # a test session of its own
def test_the_changes_of_the_pages_apply_and_work(tmp_path: Path) -> None:
    for folder in ("src", "tests/method"):
        skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(REPOSITORY / folder, tmp_path / folder, ignore=skip)
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    run = {"cwd": tmp_path, "capture_output": True, "text": True}
    for page in PAGES:
        text = (REPOSITORY / "docs" / f"{page}.md").read_text(encoding="utf-8")
        diff = "".join(re.findall(r"^```diff\n(.*?)^```$", text, re.M | re.S))
        nowhere = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
        applied = subprocess.run(["git", "apply", "-"], input=diff, env=nowhere, **run)
        assert applied.returncode == 0, f"{page}: {applied.stderr}"
    new = {**os.environ, "PYTHONPATH": str(tmp_path / "src"), "OMP_NUM_THREADS": "1"}
    chosen = ["-k", "grid or lowpass or low_frequencies", *TESTS]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=-v",
        *chosen,
    ]
    done = subprocess.run(command, env=new, **run)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = set(re.findall(r"::(test_\w+)\S* PASSED", done.stdout))
    assert passed >= {
        "test_grid_shows_one_of_every_four",
        "test_counts_are_exact_on_any_grid",
        "test_low_frequencies_of_waves",
        "test_targets_from_the_image",
    }
