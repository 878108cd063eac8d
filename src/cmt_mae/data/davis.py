"""Videos with masks in the layout of DAVIS-2017, checked before long work starts.

ROOT/ImageSets/2017/val.txt               one sequence a line
ROOT/JPEGImages/480p/SEQ/00000.jpg        frames
ROOT/Annotations/480p/SEQ/00000.png       masks: 0 background, 1.. objects, 255 void
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cmt_mae.core.errors import InputError
from cmt_mae.data.decode import IMAGE_SUFFIXES, decode_image
from cmt_mae.data.files import is_litter, open_file, read_file
from cmt_mae.data.folder import with_content
from cmt_mae.data.source import BadImage

RESOLUTION = "480p"
LIST_BYTES = 2**24
"""A list of sequences above this is none."""
VOID = 255
"""Pixels without a label; the evaluation counts them as background (spec 9.3)."""

Mask = NDArray[np.uint8]


@dataclass(frozen=True)
class VideoSequence:
    """One video: frames and their masks, in order, all of one size."""

    name: str
    frames: tuple[Path, ...]
    masks: tuple[Path, ...]
    size: tuple[int, int]
    """Height and width of frames and masks in pixels."""
    objects: tuple[int, ...]
    """Ids in the first mask, rising; the objects to follow."""
    names_fingerprint: str
    """sha256 over the names and sizes in bytes of all files, which older results recorded."""
    fingerprint: str
    """Of the same and of what some of the files hold: same data, same text."""

    def __len__(self) -> int:
        return len(self.frames)


def open_davis(path: str, names: Sequence[str] | None = None) -> list[VideoSequence]:
    """The sequences of val.txt, or those of them that are named, in the order of val.txt.

    Every file is looked up, the header of every frame and mask and the whole first masks are read,
    so that what is wrong shows before any network runs.

    Args:
        path: the folder with JPEGImages, Annotations and ImageSets, or the folder around it when
            that one is called DAVIS.
        names: a choice among the sequences of val.txt.

    Raises:
        InputError: something is missing, empty or broken, or sizes differ; one line.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give the one that holds JPEGImages/")
    if not (root / "JPEGImages").is_dir() and (root / "DAVIS" / "JPEGImages").is_dir():
        root = root / "DAVIS"
    listed = read_list(root)
    for name in names or ():
        if name not in listed:
            near = difflib.get_close_matches(name, listed, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(f"sequence {name!r} is not in {list_file(root)}{hint}")
    chosen = listed if names is None else [name for name in listed if name in names]
    if not chosen:
        raise InputError(f"{root}: no sequence was chosen; leave the choice out to take all")
    return [open_sequence(root, name) for name in chosen]


def list_file(root: Path) -> Path:
    """Where DAVIS-2017 names its validation sequences."""
    return root / "ImageSets" / "2017" / "val.txt"


def read_list(root: Path) -> list[str]:
    """Names in val.txt, each once.

    Raises:
        InputError: the file is missing, unreadable or names nothing.
    """
    file = list_file(root)
    if not os.path.lexists(file):
        raise InputError(
            f"{file} is missing; the layout of DAVIS-2017 needs it, with one sequence a line"
        )
    try:
        names = list(dict.fromkeys(read_file(file, LIST_BYTES).decode("utf-8-sig").split()))
    except (BadImage, ValueError) as error:
        raise InputError(f"{file} cannot be read: {error}") from None
    if not names:
        raise InputError(f"{file} is empty; it needs one sequence a line")
    for name in names:  # they become names of folders: no ../, no control characters, no markup
        if not re.fullmatch(r"\w[\w.()+,=@-]{0,199}", name):
            raise InputError(f"{file}: {name[:80]!a} cannot be the name of a sequence; rename it")
    return names


def open_sequence(root: Path, name: str) -> VideoSequence:
    """One sequence, with all that can be checked without decoding its frames.

    Raises:
        InputError: as ``open_davis``.
    """
    folder = root / "JPEGImages" / RESOLUTION / name
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder, but {list_file(root)} names {name}; add it or take the line out"
        )
    frames = in_order(file for file in folder.iterdir() if is_image(file))
    if not frames:
        raise InputError(f"{folder}: no frame in it; add the JPEGs or take {name} out of the list")
    truth = root / "Annotations" / RESOLUTION / name
    masks = [truth / f"{frame.stem}.png" for frame in frames]
    if not masks[0].is_file():
        raise InputError(
            f"{masks[0]} is missing; the objects to follow come from the first frame's mask"
        )
    missing = [mask for mask in masks if not mask.is_file()]
    if missing:
        raise InputError(
            f"{missing[0]} is missing ({len(missing)} of {len(masks)} masks of {name}); J and F need "
            "one for every frame"
        )
    if len(frames) < 3:
        raise InputError(
            f"{folder}: {len(frames)} frames; the first and the last are not scored, so it needs 3"
        )
    size = header_size(frames[0])
    for file in (*frames, *masks):
        if (found := header_size(file)) != size:
            raise InputError(
                f"{file}: {found[1]} x {found[0]} pixels, but {frames[0].name} of {name} has "
                f"{size[1]} x {size[0]}; frames and masks of a sequence need one size"
            )
    objects = first_objects(masks[0])
    files = [*frames, *masks]
    names = names_fingerprint(name, files)
    prints = (names, with_content(names, files))
    return VideoSequence(name, tuple(frames), tuple(masks), size, objects, *prints)


def names_fingerprint(name: str, files: list[Path]) -> str:
    """sha256 over a sequence's name and its files' names and sizes in bytes."""
    digest = hashlib.sha256(name.encode())
    for file in files:
        digest.update(f"\n{file.name} {file.stat().st_size}".encode())
    return digest.hexdigest()


def is_image(file: Path) -> bool:
    """Whether the name is that of an image, and not of what systems leave beside them."""
    return file.suffix.lower() in IMAGE_SUFFIXES and not is_litter(file.name)


def in_order(files: object) -> list[Path]:
    """By number where every name is one (9 before 10), else by name."""
    found = sorted(files)  # type: ignore[call-overload]
    if all(file.stem.isdecimal() for file in found):
        found.sort(key=lambda file: int(file.stem))
    return found


def header_size(file: Path) -> tuple[int, int]:
    """Height and width as the file's header says; nothing is decoded.

    Raises:
        InputError: not an image.
    """
    try:
        with open_file(file) as opened, Image.open(opened) as image:
            return image.height, image.width
    except Exception as error:  # BadImage, and all that Pillow's plug-ins raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{file} is not an image that can be read ({reason})") from None


def first_objects(file: Path) -> tuple[int, ...]:
    """Ids of the objects in a first mask.

    Raises:
        InputError: there is none; a mask of 0 and 255 only is one of DAVIS-2016, where 255 is the object.
    """
    every = np.unique(read_mask(file, keep_void=True))
    objects = tuple(int(i) for i in every if i not in (0, VOID))
    if not objects:
        hint = " (255 is void; an object of DAVIS-2016 must become 1)" if VOID in every else ""
        raise InputError(f"{file}: no object in the first mask{hint}")
    return objects


def read_frame(file: Path, channels: int = 3) -> NDArray[np.uint8]:
    """A frame as uint8 (H, W, channels); grey ones get three equal channels.

    Raises:
        InputError: it cannot be decoded whole.
    """
    try:
        return decode_image(read_file(file), channels)
    except BadImage as error:
        raise InputError(f"{file}: {error}; put the frame right, then run again") from None


def read_mask(file: Path, keep_void: bool = False) -> Mask:
    """A mask as uint8 (H, W) of object ids; void pixels are background unless ``keep_void``.

    Indexed PNGs give their indices, whatever the palette; grey ones their values; RGB ones the
    indices of the DAVIS palette's colours.

    Raises:
        InputError: it cannot be decoded, or a colour or value that is no object.
    """
    try:
        with open_file(file) as opened, Image.open(opened) as image:
            image.load()
            mode = image.mode
            if mode in ("RGB", "RGBA"):
                pixels = np.asarray(image.convert("RGB"))
            elif mode in ("P", "L", "1", "LA", "I", "I;16"):
                pixels = np.asarray(image.getchannel(0) if mode == "LA" else image)
            else:
                raise InputError(f"{file}: a mask cannot be of mode {mode}; save an indexed PNG")
    except InputError:
        raise
    except Exception as error:  # BadImage, and all that Pillow's plug-ins raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{file}: the mask cannot be read ({reason})") from None
    if pixels.ndim == 3:
        mask = from_colours(pixels, file)
    elif pixels.size and int(pixels.max()) > VOID:
        raise InputError(
            f"{file}: the mask holds {pixels.max()}; ids go from 0 to 254, 255 is void"
        )
    else:
        mask = pixels.astype(np.uint8)
    if not keep_void:
        mask[mask == VOID] = 0
    return mask


def from_colours(pixels: NDArray[np.uint8], file: Path) -> Mask:
    """Ids (H, W) of a mask painted in the DAVIS palette's colours (H, W, 3)."""
    codes = np.frombuffer(palette_bytes(), dtype=np.uint8).astype(np.int64).reshape(-1, 3) @ (
        65536,
        256,
        1,
    )
    order = codes.argsort()
    wanted = pixels.astype(np.int64) @ (65536, 256, 1)
    ids = order[np.searchsorted(codes[order], wanted).clip(max=255)]
    strange = codes[ids] != wanted
    if strange.any():
        red, green, blue = pixels[strange][0]
        raise InputError(
            f"{file}: the mask has the colour ({red}, {green}, {blue}), which is not one of the DAVIS "
            "palette; save an indexed PNG"
        )
    return ids.astype(np.uint8)


@cache
def palette_bytes() -> bytes:
    """The 256 colours of DAVIS and VOC as Pillow takes them: bits of the index spread over red, green and blue."""
    colours = []
    for index in range(256):
        bits = [(index >> bit) & 1 for bit in range(9)]
        colours += [sum(bits[3 * k + c] << (7 - k) for k in range(3)) for c in range(3)]
    return bytes(colours)


def write_mask(file: Path, mask: Mask) -> None:
    """An indexed PNG in the DAVIS palette, as the official evaluation reads it. mask: uint8 (H, W).

    Raises:
        InputError: the file cannot be written.
    """
    image = Image.fromarray(mask)
    image.putpalette(palette_bytes())
    try:
        image.save(file)
    except OSError as error:
        raise InputError(
            f"cannot write {file}: {error.strerror or error}; free space or give another --out"
        ) from None
