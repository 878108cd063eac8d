"""What is said about a place that cannot be written."""

import errno
import os
from pathlib import Path

import pytest

from cmt_mae.core.errors import InputError
from cmt_mae.core.files import write_text, writing


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.ENOSPC, "free space"),
        (errno.EROFS, "make it writable"),
        (errno.ENOENT, "check that its folder can be created"),
        (errno.EIO, "check the disk"),
    ],
)
def test_each_trouble_says_how_to_fix_it(number: int, fix: str) -> None:
    line = f"cannot write run: .*; {fix} or choose another --out"
    with pytest.raises(InputError, match=line), writing(Path("run")):
        raise OSError(number, os.strerror(number))


def test_below_a_file_there_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(InputError, match="check that its folder can be created"):
        write_text(tmp_path / "file" / "report.html", "x")
    assert (tmp_path / "file").read_text() == "kept"
