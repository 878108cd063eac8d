"""Ctrl-C and SIGTERM ask for a checkpoint; a second one leaves at once."""

import os
import signal
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """While active, the first SIGINT or SIGTERM only sets ``asked``; the second exits with status 130."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._receive)
            except ValueError:  # not the main thread: the caller keeps its own handling
                break
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.asked:
            # checkpoints are renamed into place when whole, so leaving now tears nothing
            os._exit(128 + number)
        self.asked = True
