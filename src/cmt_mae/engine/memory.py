"""Memory that a step frees is kept for the next one."""

import contextlib
import ctypes
import os
import sys

# Numbers of glibc's mallopt(3).
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4


def keep_memory() -> bool:
    """Have glibc keep freed memory; returns whether it does: not where MALLOC_... is set, nor elsewhere.

    By default what a step frees goes back to the system and comes back page by page, zeroed, in the next step
    (tests/engine/test_memory.py counts the faults). Kept is what the largest step so
    far needed, as a GPU's allocator does.
    """
    if not sys.platform.startswith("linux") or any(n.startswith("MALLOC_") for n in os.environ):
        return False
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        # never trim; grow by 64 MiB; no mapping of its own for a large block, which would end with it
        settings = ((TRIM_THRESHOLD, -1), (TOP_PAD, 1 << 26), (MMAP_MAX, 0))
        return all(mallopt(number, value) == 1 for number, value in settings)
    return False
