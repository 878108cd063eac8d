"""How a command that failed ends: one line on stderr and an exit status."""

import os
import signal
import sys
import time
import traceback

from cmt_mae.core.errors import InputError, LostProcess, Stopped
from cmt_mae.core.text import one_line, printable


def report_failure(error: BaseException, debug: bool) -> int:
    """Print why the command ended; returns its exit status. Called while the error is handled."""
    if isinstance(error, InputError):
        return fail(str(error), 2, debug)
    if isinstance(error, LostProcess):  # it has printed its line already
        return 75
    if isinstance(error, Stopped):
        return fail(str(error), 75, debug)
    if isinstance(error, KeyboardInterrupt):
        return fail("interrupted", 130, debug)
    if isinstance(error, OSError):  # a file or folder that no part of the package expected to fail
        name = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        text = f"{name}{error.strerror or error}; check the path and its permissions"
        return fail(text, 2, debug)
    if out_of_memory(error):
        return fail(
            f"out of memory ({one_line(error, 120)}): take a smaller network or fewer images at a time "
            "(--runtime.micro_batch in pretrain)",
            2,
            debug,
        )
    return fail(
        f"a fault of cmt-mae, {type(error).__name__}: {one_line(error)}; --debug shows where: please report it",
        1,
        debug,
    )


def out_of_memory(error: BaseException) -> bool:
    """Whether Python's, torch's or the GPU's memory is used up."""
    names = (type(error).__name__, str(error))
    return isinstance(error, MemoryError) or any(
        sign in name
        for name in names
        for sign in ("OutOfMemoryError", "not enough memory", "out of memory", "allocate memory")
    )


def fail(message: str, status: int, debug: bool) -> int:
    """One line on stderr."""
    wait_for_rank_zero()
    if debug:
        traceback.print_exc()
    print("cmt-mae: " + printable(" ".join(message.split())), file=sys.stderr)
    return status


def wait_for_rank_zero(seconds: float = 4.0) -> None:
    """Under torchrun: time for rank 0 to say what every rank would say.

    When rank 0 has failed too, torchrun ends this process meanwhile, and the line is printed once.
    A rank that fails alone is still here afterwards and speaks for itself.
    """
    if os.environ.get("RANK", "0") != "0" and "TORCHELASTIC_RUN_ID" in os.environ:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(seconds)
