"""The worked pages: their diff applies to the code as it is, its own tests pass, and the new setting runs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
WORKED = {
    "add-mask-rule": ("tests/method/test_masking.py", "grid"),
    "add-target": ("tests/method", "lowpass or low_freq"),
}


@pytest.mark.parametrize("page", WORKED)
def test_the_diff_of_the_page_applies_and_works(page: str, tmp_path: Path) -> None:
    text = (REPOSITORY / "docs" / f"{page}.md").read_text(encoding="utf-8")
    diff = "".join(re.findall(r"^```diff\n(.*?)^```$", text, re.M | re.S))
    for folder in ("src", "tests/method"):
        skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(REPOSITORY / folder, tmp_path / folder, ignore=skip)
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    applied = subprocess.run(
        ["git", "apply", "--recount", "-"], cwd=tmp_path, input=diff, capture_output=True, text=True,
        env={**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)},
    )  # fmt: skip
    assert applied.returncode == 0, applied.stderr
    tests, names = WORKED[page]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", names, tests], cwd=tmp_path,
        capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "src"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"[1-9]\d* passed", done.stdout), done.stdout[-2000:]
