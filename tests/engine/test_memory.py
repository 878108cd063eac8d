"""Freed memory is kept: measured by the page faults of allocations of a step's size, in processes of their own."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from cmt_mae.engine.processes import keep_memory
if "keep" in sys.argv:
    print(keep_memory())
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.ones(10_000_000) for _ in range(3)]
    del kept
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(word: str, **environment: str) -> list[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, word], capture_output=True, text=True, timeout=60, check=True,
        env={**kept, **environment},
    )  # fmt: skip
    return done.stdout.split()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_what_was_freed_is_used_again() -> None:
    pages = 3 * 10_000_000 * 4 // 4096
    (plain,) = run("plain")
    done, kept = run("keep")
    assert done == "True"
    assert int(kept) < pages / 100
    assert int(plain) > pages / 2


def test_a_users_own_setting_stands() -> None:
    assert run("keep", MALLOC_ARENA_MAX="2")[0] == "False"
