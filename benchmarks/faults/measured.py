"""A function called in a fork: what it gave, how long it took, how much memory it needed at most."""

import contextlib
import ctypes
import mmap
import os
import pickle
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmt_mae.core.errors import InputError
from cmt_mae.core.text import printable


@dataclass
class Measured:
    """How one call ended."""

    kind: str
    """value | refused (InputError) | raised (anything else) | killed (a signal) | hang."""
    value: Any = None
    """Of the function; of an error its text."""
    seconds: float = 0.0
    peak_mib: float = 0.0
    """Memory above what the process held before the call."""
    reached: int = 0
    """The last number that the function noted with `Progress`."""
    cpu_s: float = 0.0
    """Processor seconds of the function: what it costs, however busy the machine is."""

    def fault(self) -> str | None:
        """What no call may do: crash, hang, raise what is no InputError, refuse in more than one line."""
        if self.kind in ("raised", "killed", "hang"):
            return f"{self.kind} {self.value or ''} after {self.seconds:.1f} s"
        if self.kind == "refused" and not is_one_line(str(self.value)):
            return f"refused in more than a printable line: {self.value!r:.200}"
        return None


class Progress:
    """A number that outlives the process that notes it."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8)

    def note(self, number: int) -> None:
        """Where the work is."""
        struct.pack_into("q", self._memory, 0, number)

    def read(self) -> int:
        """The last number noted."""
        number: int = struct.unpack_from("q", self._memory, 0)[0]
        return number


def is_one_line(text: str) -> bool:
    """Something, on one line, without control characters, no longer than people read."""
    return 0 < len(text) < 1500 and "\n" not in text and text.isprintable()


def measure(work: Callable[[Progress], Any], limit_s: float) -> Measured:
    """``work`` in a fork; its value must be small and picklable."""
    read, write = os.pipe()
    progress = Progress()
    sys.stdout.flush()
    sys.stderr.flush()
    begin = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        _child(work, write, progress)
    os.close(write)
    try:
        answer = _answer(read, begin + limit_s)
    finally:
        os.close(read)
    if answer is None and time.monotonic() > begin + limit_s:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    seconds = time.monotonic() - begin
    if answer:
        kind, value, took, peak, cpu_s = pickle.loads(answer)
        return Measured(kind, value, took, peak, progress.read(), cpu_s)
    code = os.waitstatus_to_exitcode(status)
    if answer is None:
        return Measured("hang", None, seconds, reached=progress.read())
    name = signal.Signals(-code).name if code < 0 else f"exit status {code}"
    return Measured("killed", name, seconds, reached=progress.read())


def _child(work: Callable[[Progress], Any], write: int, progress: Progress) -> None:
    """Never returns."""
    try:
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 1)
            os.dup2(null.fileno(), 2)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
        before, begin, cpu = _memory("VmRSS"), time.monotonic(), time.process_time()
        kind, value = "value", None
        try:
            value = work(progress)
        except InputError as error:
            kind, value = "refused", str(error)
        except BaseException as error:
            kind, value = "raised", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        seconds = time.monotonic() - begin
        peak = _memory("VmHWM") - before
        data = pickle.dumps((kind, value, seconds, peak, time.process_time() - cpu))
        with open(write, "wb") as pipe:
            pipe.write(data)
    finally:
        os._exit(0)


def _answer(pipe: int, end: float) -> bytes | None:
    """All that the fork writes; None at the time limit."""
    import select

    parts: list[bytes] = []
    while True:
        ready, _, _ = select.select([pipe], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            return None
        data = os.read(pipe, 2**16)
        if not data:
            return b"".join(parts)
        parts.append(data)


def _memory(field: str) -> float:
    """MiB of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    return 0.0


def obey_permissions() -> None:
    """Take from this process root's right to read what nobody may read (CAP_DAC_OVERRIDE, _READ_SEARCH)."""
    with contextlib.suppress(AttributeError):
        libc = ctypes.CDLL(None, use_errno=True)
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        data = (ctypes.c_uint32 * 6)()
        if libc.capget(header, data) != 0:
            raise OSError(ctypes.get_errno(), "capget")
        for place in (0, 1):  # effective, permitted
            data[place] &= ~0b110
        if libc.capset(header, data) != 0:
            raise OSError(ctypes.get_errno(), "capset")


Trial = tuple[str, Callable[[], str | None]]
"""What, and a call that gives what is wrong with its result, or None. It may refuse with an InputError."""


@dataclass
class Judged:
    """What a list of trials came to."""

    failures: list[str]
    refused: dict[str, str]
    """Trial -> the line."""
    peak_mib: float
    """The most that a fork of trials needed."""
    seconds: float
    """The longest fork."""


def judge(trials: list[Trial], limit_s: float, most_mib: float, each: int = 100) -> Judged:
    """Run trials, ``each`` to a fork. Broken: a crash, a hang, an error that is no InputError, an InputError of
    more than a printable line, a wrong result, too much memory."""
    found = Judged([], {}, 0.0, 0.0)
    left = list(trials)
    while left:
        part = left[:each]
        ended = measure(lambda progress, part=part: _try(part, progress), limit_s)  # type: ignore[misc]
        found.peak_mib = max(found.peak_mib, ended.peak_mib)
        found.seconds = max(found.seconds, ended.seconds)
        if ended.kind != "value":
            found.failures.append(f"{part[ended.reached][0]}: {ended.fault()}")
            left = left[ended.reached + 1 :]
            continue
        if ended.peak_mib > most_mib:
            found.failures.append(f"{part[0][0]}, ...: {ended.peak_mib:.0f} MiB")
        for (what, _), (kind, text) in zip(part, ended.value, strict=True):
            if kind == "wrong":
                found.failures.append(f"{what}: {text}")
            elif kind == "refused":
                found.refused[what] = text
        left = left[each:]
    return found


def _try(part: list[Trial], progress: Progress) -> list[tuple[str, str]]:
    """(fine | refused | wrong, text) of each."""
    said = []
    for number, (_, trial) in enumerate(part):
        progress.note(number)
        try:
            wrong = trial()
            said.append(("fine", "") if wrong is None else ("wrong", wrong))
        except InputError as error:
            told = printable(" ".join(str(error).split()))  # as the command line prints it
            said.append(("refused" if is_one_line(told) else "wrong", told[:500]))
        except Exception as error:
            text = " ".join(traceback.format_exc().split())[-400:]
            said.append(("wrong", f"{type(error).__name__}: {text}"))
    return said
