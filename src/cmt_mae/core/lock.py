"""One process at a time in a run directory: run.lock, which names its owner.

The kernel's lock (flock) ends with its owner, however that one ended, so a stale one cannot stay behind. It holds
between machines where the shared file system carries it (NFS, GPFS, CephFS, Lustre with ``flock``). Where locks
work on one machine only (Lustre with ``localflock``), a second start on another machine takes the folder over with
a warning, and the first one stops before its next checkpoint. Where there are none at all, the text decides.
"""

import contextlib
import fcntl
import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cmt_mae.core.errors import InputError
from cmt_mae.core.files import is_alive, make_folder, writing
from cmt_mae.core.text import printable

OWNER = re.compile(r"pid (\d+) on (\S+) \(started at tick (\d*)\)")

_open_locks: set[Any] = set()


def _let_go() -> None:
    """In a forked child (a loader's worker): it would keep the lock for as long as it outlives its parent."""
    for file in _open_locks:
        file.close()
    _open_locks.clear()


os.register_at_fork(after_in_child=_let_go)


class Lock:
    """run.lock of one run directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = None
        self._owner = ""

    def take(self) -> None:
        """Make this process the owner. Raises InputError while there is another, or on a full disk."""
        with writing(self.path):
            # not through a link: its target would be emptied
            self._file = open(  # noqa: SIM115 (held until the run ends)
                self.path, "a+", errors="replace", opener=no_link
            )
            self._file.seek(0)
            before = self._file.read().strip()
        _open_locks.add(self._file)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self._refuse(before or "another process", "wait for it, or choose another --out")
        except OSError:  # no locks on this file system
            if may_run(before):
                self._refuse(before, f"wait for it; if it has ended, delete {self.path}")
        else:
            known = OWNER.match(before)
            if known and known[2] != socket.gethostname():
                print(
                    f"warning: {printable(f'{self.path} names {before}')}, which did not say that it ended, "
                    "but holds no lock: "
                    "taken as dead; if it does run (file systems may lock on one machine only), it will stop "
                    "before its next checkpoint",
                    file=sys.stderr,
                )
        self._owner = name_of(os.getpid())
        with writing(self.path):
            self._file.truncate(0)
            self._file.write(self._owner)
            self._file.flush()
            os.fsync(self._file.fileno())

    def _refuse(self, owner: str, how_to_fix: str) -> None:
        _open_locks.discard(self._file)
        self._file.close()
        self._file = None
        raise InputError(f"{self.path.parent} is in use by {owner}: {how_to_fix}")

    def check(self) -> None:
        """Raise InputError unless this process, having taken the lock, is still named in it."""
        if self._file is None:
            return
        try:
            owner = self.path.read_text(errors="replace").strip()
        except OSError as error:
            owner = f"nobody ({error.strerror})"
        if owner != self._owner:
            raise InputError(
                f"{self.path.parent} was taken over by {owner}: this process stops and leaves it alone"
            )

    def give_back(self) -> None:
        """Forget the owner, let the next one in."""
        if self._file is None or self._file.closed:
            return
        try:
            if self.path.read_text(errors="replace").strip() == self._owner:
                self._file.truncate(0)
        except OSError:  # unnamed or not, the lock itself ends here
            pass
        _open_locks.discard(self._file)
        self._file.close()
        self._file = None


@contextlib.contextmanager
def only_one(folder: Path, name: str) -> Iterator[None]:
    """One process at a time makes what goes into a folder; made if need be. InputError for a second one."""
    with writing(folder):
        make_folder(folder)
    lock = Lock(folder / name)
    lock.take()
    try:
        yield
    finally:
        lock.path.unlink(missing_ok=True)
        lock.give_back()


def no_link(path: str, flags: int) -> int:
    """An opener that refuses symbolic links: a run directory may come from another user."""
    if os.path.islink(path):
        raise OSError(None, "it is a symbolic link; remove it")
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def name_of(process: int) -> str:
    """What stands in the lock: number, machine, and when it started, as numbers are used again."""
    return f"pid {process} on {socket.gethostname()} (started at tick {started(process)})"


def started(process: int) -> str:
    """Clock tick at which a process of this machine started; empty where the system does not say (no Linux)."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(errors="replace")
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[19]  # field 22 of the line; its name may hold anything


def may_run(owner: str) -> bool:
    """Whether the owner named in a lock may still run: dead processes of this machine are recognised."""
    known = OWNER.match(owner)
    if not known:
        return bool(owner)
    process, host, tick = int(known[1]), known[2], known[3]
    if host != socket.gethostname():
        return True
    return is_alive(process) and (not tick or started(process) == tick)
