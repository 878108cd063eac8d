"""Reading DAVIS folders: what is right, and one clear line for everything that is wrong."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmt_mae.core.errors import InputError
from cmt_mae.data.davis import open_davis, palette_bytes, read_frame, read_mask, write_mask

SIZE = (12, 20)


def write_folder(root: Path, names: tuple[str, ...] = ("one", "two"), frames: int = 4) -> Path:
    """Videos of 12 x 20 pixels with object 1."""
    (root / "ImageSets/2017").mkdir(parents=True)
    (root / "ImageSets/2017/val.txt").write_text("".join(f"{n}\n" for n in names))
    mask = np.zeros(SIZE, np.uint8)
    mask[2:6, 3:9] = 1
    for name in names:
        for kind in ("JPEGImages", "Annotations"):
            (root / kind / "480p" / name).mkdir(parents=True)
        for number in range(frames):
            image = np.full((*SIZE, 3), 40 * number, np.uint8)
            Image.fromarray(image).save(root / f"JPEGImages/480p/{name}/{number:05d}.jpg")
            write_mask(root / f"Annotations/480p/{name}/{number:05d}.png", mask)
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "d")


def frame(root: Path, number: int = 0) -> Path:
    return root / f"JPEGImages/480p/one/{number:05d}.jpg"


def mask(root: Path, number: int = 0) -> Path:
    return root / f"Annotations/480p/one/{number:05d}.png"


def test_opens(root):
    one, two = open_davis(str(root))
    assert (one.name, two.name, len(one), one.size, one.objects) == ("one", "two", 4, SIZE, (1,))
    assert [f.name for f in one.frames] == [f"{n:05d}.jpg" for n in range(4)]
    assert [s.name for s in open_davis(str(root), ("two",))] == ["two"]
    assert [s.name for s in open_davis(str(root), ("two", "one"))] == ["one", "two"]


def test_the_folder_around_davis(root, tmp_path):
    (tmp_path / "outer").mkdir()
    root.rename(tmp_path / "outer/DAVIS")
    assert len(open_davis(str(tmp_path / "outer"))) == 2


def test_order_is_that_of_the_numbers(root):
    for kind, suffix in (("JPEGImages", "jpg"), ("Annotations", "png")):
        folder = root / kind / "480p/one"
        for number in range(4):
            (folder / f"{number:05d}.{suffix}").rename(folder / f"{number + 8}.{suffix}")
    assert [f.stem for f in open_davis(str(root), ("one",))[0].frames] == ["8", "9", "10", "11"]


def test_hidden_files_and_others_are_no_frames(root):
    (root / "JPEGImages/480p/one/._00000.jpg").write_bytes(b"mac")
    (root / "JPEGImages/480p/one/Thumbs.db").write_bytes(b"windows")
    assert len(open_davis(str(root))[0]) == 4


def test_fingerprint_tells_data_apart(root, tmp_path):
    again = open_davis(str(write_folder(tmp_path / "e")))
    first = open_davis(str(root))
    assert [s.fingerprint for s in again] == [s.fingerprint for s in first]
    frame(root, 2).write_bytes(frame(root, 2).read_bytes() + b" ")
    changed = open_davis(str(root))
    assert changed[0].fingerprint != first[0].fingerprint
    assert changed[1].fingerprint == again[1].fingerprint


TROUBLES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda r: r.rename(r.with_name("gone")), "no such folder"),
    "no list": (lambda r: (r / "ImageSets/2017/val.txt").unlink(), "val.txt is missing"),
    "empty list": (lambda r: (r / "ImageSets/2017/val.txt").write_text("\n"), "val.txt is empty"),
    "absent": (
        lambda r: (r / "ImageSets/2017/val.txt").write_text("one\nthree\n"),
        "three: no such folder, but .* names three",
    ),
    "no frames": (lambda r: [frame(r, n).unlink() for n in range(4)], "no frame in it"),
    "two frames": (lambda r: [frame(r, n).unlink() for n in (2, 3)], "2 frames; the first and"),
    "no first mask": (lambda r: mask(r).unlink(), "00000.png is missing; the objects to follow"),
    "no later mask": (lambda r: mask(r, 2).unlink(), r"00002.png is missing \(1 of 4"),
    "not an image": (lambda r: frame(r, 1).write_bytes(b"no"), "00001.jpg is not an image"),
    "not a mask": (lambda r: mask(r, 1).write_bytes(b""), "00001.png is not an image"),
    "mask of another size": (
        lambda r: write_mask(mask(r, 1), np.ones((12, 21), np.uint8)),
        "00001.png: 21 x 12 pixels, but 00000.jpg of one has 20 x 12",
    ),
    "frame of another size": (
        lambda r: Image.new("RGB", (20, 13)).save(frame(r, 3)),
        "00003.jpg: 20 x 13 pixels",
    ),
    "no object": (
        lambda r: write_mask(mask(r), np.zeros(SIZE, np.uint8)),
        "00000.png: no object in the first mask$",
    ),
    "DAVIS-2016": (
        lambda r: write_mask(mask(r), np.full(SIZE, 255, np.uint8)),
        "no object in the first mask .*DAVIS-2016",
    ),
    "strange colour": (
        lambda r: Image.new("RGB", SIZE[::-1], (1, 2, 3)).save(mask(r)),
        r"the colour \(1, 2, 3\), which is not one of the DAVIS palette",
    ),
    "too high": (
        lambda r: Image.fromarray(np.full(SIZE, 300, np.uint16)).save(mask(r)),
        "the mask holds 300",
    ),
    "mode": (lambda r: Image.new("CMYK", SIZE[::-1]).save(mask(r), "TIFF"), "mode CMYK"),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_troubles_are_one_line(root, trouble):
    change, message = TROUBLES[trouble]
    change(root)
    with pytest.raises(InputError, match=message) as caught:
        open_davis(str(root))
    assert "\n" not in str(caught.value)


def test_unknown_choice(root):
    with pytest.raises(InputError, match=r"'tow' is not in .*did you mean two"):
        open_davis(str(root), ("tow",))
    with pytest.raises(InputError, match="no sequence was chosen"):
        open_davis(str(root), ())


def test_masks_of_every_kind_are_equal(tmp_path):
    """Palette, another palette, grey, RGB, RGBA, grey with alpha, 16 bit: the same ids."""
    ids = np.array([[0, 1, 2], [3, 17, 255]], np.uint8)
    wanted = np.array([[0, 1, 2], [3, 17, 0]], np.uint8)
    indexed = Image.fromarray(ids)
    indexed.putpalette(palette_bytes())
    other = Image.fromarray(ids)
    other.putpalette([255 - v for v in range(256) for _ in range(3)])
    kinds = {
        "palette": indexed,
        "other palette": other,
        "grey": Image.fromarray(ids),
        "RGB": indexed.convert("RGB"),
        "RGBA": indexed.convert("RGBA"),
        "grey and alpha": Image.fromarray(np.stack([ids, ids * 0 + 9], -1), "LA"),
        "16 bit": Image.fromarray(ids.astype(np.uint16)),
    }
    for name, image in kinds.items():
        image.save(tmp_path / "mask.png")
        np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), wanted, err_msg=name)
        kept = read_mask(tmp_path / "mask.png", keep_void=True)
        np.testing.assert_array_equal(kept, ids, err_msg=name)
    Image.fromarray(np.array([[False, True]])).save(tmp_path / "bits.png")
    assert read_mask(tmp_path / "bits.png").tolist() == [[0, 1]]


def test_written_masks_have_the_palette_of_davis(tmp_path, shared):
    theirs = Image.open(shared / "data/davis/Annotations/480p/dog/00000.png")
    write_mask(tmp_path / "m.png", np.asarray(theirs))
    ours = Image.open(tmp_path / "m.png")
    assert ours.mode == theirs.mode == "P"
    count = len(theirs.getpalette())
    assert ours.getpalette()[:count] == theirs.getpalette()
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def test_mask_that_cannot_be_written(tmp_path):
    with pytest.raises(InputError, match=r"cannot write .*another --out"):
        write_mask(tmp_path / "no/folder/m.png", np.zeros((2, 2), np.uint8))


def test_frames_of_every_kind(root, tmp_path):
    """Grey frames become three equal channels; a frame cut short is refused, never half grey."""
    Image.fromarray(np.full(SIZE, 77, np.uint8)).save(tmp_path / "grey.png")
    assert (read_frame(tmp_path / "grey.png") == 77).all()
    assert read_frame(tmp_path / "grey.png").shape == (*SIZE, 3)
    assert read_frame(frame(root), channels=1).shape == (*SIZE, 1)
    noise = np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    short = tmp_path / "short.jpg"
    short.write_bytes((tmp_path / "whole.jpg").read_bytes()[:2000])
    with pytest.raises(InputError, match=r"short.jpg: .*put the frame right"):
        read_frame(short)


def test_a_mask_cut_short(root):
    ids = np.random.default_rng(0).integers(0, 9, SIZE, dtype=np.uint8)
    write_mask(mask(root), ids)
    mask(root).write_bytes(mask(root).read_bytes()[:-60])
    with pytest.raises(InputError, match=r"00000.png: the mask cannot be read"):
        open_davis(str(root))


def test_pipes_are_not_waited_for(root):
    for path in (frame(root), root / "ImageSets/2017/val.txt"):
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(InputError, match="not a regular file"):
            open_davis(str(root))
    with pytest.raises(InputError, match="not a regular file"):
        read_frame(frame(root))
    mask(root).unlink()
    os.mkfifo(mask(root))
    with pytest.raises(InputError, match="not a regular file"):
        read_mask(mask(root))
