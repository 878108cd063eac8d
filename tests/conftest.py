"""Shared by all tests: one thread each, the folder of real data beside the repository, and a browser.

Hypothesis tries the same examples every time, so that a change fails for its own faults. New ones are looked for
with CMT_MAE_NEW_EXAMPLES=1 in the environment; what they find is pinned with @example.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

settings.register_profile("same", derandomize=True)
if not os.environ.get("CMT_MAE_NEW_EXAMPLES"):
    settings.load_profile("same")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real photos and weights next to the repository; the test is skipped without it."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the real data in {SHARED}, which is not there")
    return SHARED


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A real headless browser, one for all tests; they are skipped with the reason where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    program = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if program is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # root has none
        browser = driver.chromium.launch(executable_path=program, args=sandbox)
        yield browser
        browser.close()
