"""One process at a time in a run directory, whatever the last one's end and the file system."""

import errno
import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cmt_mae.core.errors import InputError
from cmt_mae.core.lock import OWNER, Lock, may_run, name_of, started

HOLDER = """
import os, sys, time
from pathlib import Path
from cmt_mae.core.lock import Lock
lock = Lock(Path(sys.argv[1]))
lock.take()
child = os.fork()
if child == 0:  # as a loader's worker: outlives its parent
    print(os.getpid(), flush=True)
    time.sleep(30)
    os._exit(0)
time.sleep(30)
"""


def test_the_second_is_told_who_the_first_is(tmp_path: Path) -> None:
    first = Lock(tmp_path / "run.lock")
    first.take()
    first.check()
    with pytest.raises(InputError, match=f"in use by pid {os.getpid()} on {socket.gethostname()}"):
        Lock(tmp_path / "run.lock").take()
    first.give_back()
    assert (tmp_path / "run.lock").read_text() == ""
    first.give_back()
    Lock(tmp_path / "run.lock").take()


def test_a_killed_owners_lock_is_free_at_once_though_its_workers_live(tmp_path: Path) -> None:
    """A forked worker shares its parent's lock, and torch's need seconds to notice that they are alone."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run.lock")],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    worker = int(holder.stdout.readline())
    try:
        with pytest.raises(InputError, match=f"in use by pid {holder.pid} on"):
            Lock(tmp_path / "run.lock").take()
        holder.kill()
        holder.wait()
        os.kill(worker, 0)  # it lives
        lock = Lock(tmp_path / "run.lock")
        lock.take()
        lock.check()
        lock.give_back()
    finally:
        os.kill(worker, 9)


def test_an_owner_that_finds_another_name_stops(tmp_path: Path) -> None:
    lock = Lock(tmp_path / "run.lock")
    lock.take()
    (tmp_path / "run.lock").write_text("pid 5 on elsewhere (started at tick 1)")
    with pytest.raises(InputError, match="was taken over by pid 5 on elsewhere"):
        lock.check()
    lock.give_back()
    assert "elsewhere" in (tmp_path / "run.lock").read_text()  # not ours to clear
    (tmp_path / "run.lock").unlink()
    lock.take()
    (tmp_path / "run.lock").unlink()
    with pytest.raises(InputError, match="taken over by nobody"):
        lock.check()


def test_a_lock_left_by_another_machine_is_taken_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.lock").write_text("pid 5 on elsewhere (started at tick 1)")
    Lock(tmp_path / "run.lock").take()
    assert "taken as dead" in capsys.readouterr().err


def test_without_kernel_locks_the_text_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    path = tmp_path / "run.lock"
    path.write_text(name_of(os.getppid()))
    with pytest.raises(InputError, match=f"in use by pid {os.getppid()} .*delete"):
        Lock(path).take()
    path.write_text("pid 5 on elsewhere (started at tick 1)")
    with pytest.raises(InputError, match="in use by pid 5 on elsewhere"):
        Lock(path).take()
    dead = subprocess.Popen(["true"])
    dead.wait()
    path.write_text(name_of(dead.pid))
    Lock(path).take()
    assert path.read_text() == name_of(os.getpid())


def test_the_number_of_a_dead_process_may_be_used_again() -> None:
    mine = name_of(os.getpid())
    assert OWNER.fullmatch(mine)
    assert may_run(mine)
    assert not may_run(mine.replace(started(os.getpid()), "1"))
    assert not may_run("")
    assert may_run("somebody")
