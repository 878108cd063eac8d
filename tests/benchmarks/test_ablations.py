"""What `python -m benchmarks.ablations` does around `cmt-mae ablate`."""

from pathlib import Path

from benchmarks.ablations import make_digits


def test_digits_are_a_labelled_folder(tmp_path: Path) -> None:
    folder = make_digits(tmp_path)
    assert len(list(folder.glob("train/?/*.png"))) == 1348
    assert len(list(folder.glob("val/?/*.png"))) == 449
    assert sorted(path.name for path in (folder / "val").iterdir()) == list("0123456789")
