"""stdout and stderr whose reader may go away (a closed pipe, a terminal that is gone): the work goes on."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any

GONE = (errno.EPIPE, errno.EIO)


class LastingStream:
    """A text stream; once nobody reads it any more, what is written to it is dropped."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As the stream's."""
        with self._to_nowhere_if_gone():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As the stream's."""
        with self._to_nowhere_if_gone():
            self._stream.flush()

    @contextlib.contextmanager
    def _to_nowhere_if_gone(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in GONE:
                raise
            # what is still buffered, and all that comes, goes there too
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def lasting_streams() -> Iterator[None]:
    """Inside, a lost reader of stdout or stderr stops nothing."""
    before = sys.stdout, sys.stderr
    lasting: Any = [LastingStream(stream) for stream in before]
    sys.stdout, sys.stderr = lasting
    try:
        yield
    finally:
        for stream in lasting:
            stream.flush()
        sys.stdout, sys.stderr = before
