"""Ctrl-C, SIGTERM and a closed terminal (SIGHUP) ask for a checkpoint; a second one leaves at once."""

import os
import signal
import time
from types import FrameType
from typing import Any

ONE_REQUEST_S = 0.5
"""Signals within this time are one request: a scheduler and torchrun both send one to every process."""


class StopRequest:
    """While active, the first SIGINT, SIGTERM or SIGHUP only sets ``asked``; a later one leaves at once,
    with status 128 + its number.

    A SIGHUP that is ignored (nohup) stays so.
    """

    def __init__(self) -> None:
        self.asked = False
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            try:
                self._before[number] = signal.signal(number, self._receive)
            except ValueError:  # not the main thread: the caller keeps its own handling
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.asked and time.monotonic() - self._since > ONE_REQUEST_S:
            # checkpoints are renamed into place when whole, so leaving now tears nothing
            os._exit(128 + number)
        if not self.asked:
            self.asked, self._since = True, time.monotonic()
