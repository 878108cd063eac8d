"""Folders of images, splits and patterns."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from cmt_mae.core.errors import InputError
from cmt_mae.data.decode import decode_image
from cmt_mae.data.shards import expand_braces
from cmt_mae.data.source import BadImage
from cmt_mae.data.sources import has_splits, open_source, open_split


def put(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 5), (value, value, value)).save(path)
    return path


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        for c, name in enumerate(["cat", "bird", "ant"]):
            for i in range(3):
                put(tmp_path / split / name / f"{i}.png", c * 10 + i)
    return tmp_path


def test_image_folder_as_torchvision_has_it(classes: Path) -> None:
    ours = open_split(str(classes), "train")
    theirs = ImageFolder(str(classes / "train"))
    assert ours.classes == theirs.classes == ["ant", "bird", "cat"]
    for i, (path, label) in enumerate(theirs.samples):
        assert str(classes / "train" / ours.name(i)) == path
        assert ours.label(i) == label
        data = ours.read(i)
        assert isinstance(data, bytes)
        assert np.array_equal(decode_image(data), np.asarray(theirs[i][0]))
    assert len(ours) == len(theirs) == 9


def test_validation_labels_count_as_training_labels(classes: Path) -> None:
    import shutil

    shutil.rmtree(classes / "val" / "ant")
    val = open_split(str(classes), "val")
    assert [val.label(i) for i in range(6)] == [1, 1, 1, 2, 2, 2]
    put(classes / "val" / "zebra" / "0.png")
    with pytest.raises(InputError, match="zebra"):
        open_split(str(classes), "val")


def test_a_nest_has_no_labels(tmp_path: Path) -> None:
    for name in ["b.JPG", "x/a.jpg", "x/y/z/c.png", ".hidden.png", ".cache/d.png", "note.txt"]:
        put(tmp_path / (name if name != "note.txt" else "n.png"))
    source = open_source(str(tmp_path))
    names = [source.name(i) for i in range(len(source))]
    assert names == ["b.JPG", "n.png", "x/a.jpg", "x/y/z/c.png"]
    assert source.classes is None
    assert source.label(0) is None


def test_split_folders_are_no_classes(classes: Path, tmp_path: Path) -> None:
    assert open_source(str(classes)).classes is None
    flat = tmp_path / "flat"
    put(flat / "train" / "a.png")
    put(flat / "val" / "b.png")
    assert open_source(str(flat)).classes is None


def test_loops_of_links_end(tmp_path: Path) -> None:
    put(tmp_path / "d" / "a.png")
    (tmp_path / "d" / "loop").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to(tmp_path / "self")
    (tmp_path / "self.png").symlink_to(tmp_path / "self.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe.png")
    source = open_source(str(tmp_path))
    names = [source.name(i) for i in range(len(source))]
    assert names == ["d/a.png", "gone.png", "self.png"]
    for i in (1, 2):
        with pytest.raises(BadImage):
            source.read(i)


def test_files_that_change_during_the_run(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        put(tmp_path / name)
    source = open_source(str(tmp_path))
    (tmp_path / "a.png").unlink()
    (tmp_path / "b.png").unlink()
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "c.png").unlink()
    (tmp_path / "c.png").mkdir()
    for i, reason in enumerate(["No such file", "regular", "(directory|regular)"]):
        with pytest.raises(BadImage, match=reason):
            source.read(i)


def test_a_file_of_many_gigabytes_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "a.jpg", "wb") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(BadImage, match="larger"):
        open_source(str(tmp_path)).read(0)


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    path = put(tmp_path / "a.png")
    os.rename(path, os.path.join(os.fsencode(tmp_path), b"\xff\xfe.png"))
    source = open_source(str(tmp_path))
    source.name(0).encode("utf-8")
    data = source.read(0)
    assert isinstance(data, bytes)
    assert decode_image(data).shape == (5, 6, 3)


def test_fingerprint(classes: Path) -> None:
    first = open_split(str(classes), "train").fingerprint()
    assert open_split(str(classes), "train").fingerprint() == first
    (classes / "train").rename(classes / "other")
    assert open_source(str(classes / "other")).fingerprint() == first  # where it lies is no matter
    file = classes / "other" / "ant" / "1.png"
    content = file.read_bytes()
    file.write_bytes(content + b"\0")
    changed = open_source(str(classes / "other")).fingerprint()
    file.write_bytes(content)
    file.rename(file.with_name("9.png"))
    renamed = open_source(str(classes / "other")).fingerprint()
    assert len({first, changed, renamed}) == 3


def test_splits(classes: Path, tmp_path: Path) -> None:
    assert has_splits(str(classes))
    (classes / "val").rename(classes / "validation")
    assert len(open_split(str(classes), "val")) == 9
    flat = tmp_path / "flat"
    put(flat / "a.png")
    assert not has_splits(str(flat))
    assert len(open_split(str(flat), "train")) == 1  # no splits at all: all of it is for training
    with pytest.raises(InputError, match="no val split"):
        open_split(str(flat), "val")
    (classes / "train").rename(classes / "trainings")
    with pytest.raises(InputError, match="no train split"):
        open_split(str(classes), "train")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: p / "nowhere", "no such file or folder"),
        (lambda p: p, "no image found"),
        (lambda p: put(p / "one.png"), "not a folder"),
        (lambda p: p / "x-*.tar", "no file matches"),
        (lambda p: p / "x-{0..3}.tar", "no such file"),
        (lambda p: p / "x-{0}.tar", "neither a range"),
        (lambda p: p / "x-{0..99999999}.tar", "million"),
    ],
)
def test_one_clear_line(tmp_path: Path, make: object, words: str) -> None:
    assert callable(make)
    path = str(make(tmp_path))
    for call in (open_source, lambda p: open_split(p, "train"), lambda p: open_split(p, "val")):
        if "val" in words:
            continue
        with pytest.raises(InputError) as info:
            call(path)
        assert "\n" not in str(info.value)
        assert str(tmp_path) in str(info.value)
    with pytest.raises(InputError, match=words):
        open_source(path)


def test_braces() -> None:
    assert expand_braces("a{008..011}.tar") == [f"a{i:03d}.tar" for i in (8, 9, 10, 11)]
    assert expand_braces("{x,y}{1..2}") == ["x1", "x2", "y1", "y2"]
    assert expand_braces("{3..1}") == ["3", "2", "1"]
    assert expand_braces("plain") == ["plain"]


def test_names_and_classes_are_one_printable_line(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/a\xff\x1b[2J"
    os.mkdir(folder)
    with open(folder + b"/two\nlines\t.png", "wb") as file:
        file.write(put(tmp_path / "x" / "a.png").read_bytes())
    source = open_source(str(tmp_path))
    assert source.classes == ["a\\xff\\x1b[2J", "x"]
    assert source.name(0) == "a\\xff\\x1b[2J/two\\nlines\\t.png"
    assert [source.label(0), source.label(1)] == [0, 1]
    assert isinstance(source.read(0), bytes)


@pytest.mark.parametrize("name", ["a.tar", "a.parquet"])
def test_a_pipe_in_place_of_a_shard(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match="not a regular file"):
        open_source(str(tmp_path / name))
