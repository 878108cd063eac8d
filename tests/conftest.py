"""Shared by all tests: one thread each, and the folder of real data beside the repository.

Hypothesis tries the same examples every time, so that a change fails for its own faults. New ones are looked for
with CMT_MAE_NEW_EXAMPLES=1 in the environment; what they find is pinned with @example.
"""

import os
from pathlib import Path

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
