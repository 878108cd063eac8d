"""Semantic data in ADE20K's layout: images/{training,validation} and annotations/{training,validation}.

A mask is a PNG of the image's size and name, one label a pixel: 0 = unlabelled, k = class k of the list; or, with
``zero_label`` class, k = class k + 1 (mmseg's reduce_zero_label=False, Cityscapes' trainIds).
"""

import hashlib
import io
import os
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from cmt_mae.core.errors import InputError
from cmt_mae.data.decode import IMAGE_SUFFIXES, decode_image
from cmt_mae.data.files import is_litter, open_file, read_file
from cmt_mae.data.folder import with_content
from cmt_mae.data.source import BadImage, Limits
from cmt_mae.data.sources import limits_of, report_left_out

IGNORED = -1
"""What a mask in memory holds where nothing counts: unlabelled (0) and void (255) in the file."""
ZeroLabel = Literal["ignored", "class"]
FREQUENT = 0.01
"""Share of the pixels from which label 0 is frequent."""
LISTS = ("objectInfo.txt", "objectInfo150.txt", "objectInfo.csv", "objectInfo150.csv")
MOST_CLASSES = 32000
MOST_LIST_BYTES = 2**24
_TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange height and width


@dataclass(frozen=True)
class Pairs:
    """One split: images and their masks, sorted by name."""

    images: tuple[str, ...]
    masks: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Ade20k:
    """An opened data set."""

    root: str
    classes: tuple[str, ...]
    train: Pairs
    val: Pairs
    fingerprint: str
    """Of classes, names and sizes in bytes of all images and masks, and of what some of them hold."""
    zero_label: ZeroLabel | None = None
    """What label 0 is; None: ignored, as nothing else was said."""
    limits: Limits | None = None
    """Values of black and white in images of more than 8 bits, from the training images."""


def open_ade20k(
    root: str | Path, classes: str | None = None, zero_label: ZeroLabel | None = None
) -> Ade20k:
    """Find images, masks and the class list; reads no pixels (``check_pairs`` does).

    classes: see ``read_classes``. zero_label: see ``Ade20k``.
    Raises InputError: a missing folder, an image without a mask, two images for one mask, no class list.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise InputError(f"{root}: no such folder; give --data a folder in ADE20K's layout")
    names = read_classes(folder, classes)
    train, val = (_find_pairs(folder, split) for split in ("training", "validation"))
    digest = hashlib.sha256("\n".join(names).encode())
    paths = (*train.images, *train.masks, *val.images, *val.masks)
    for path in paths:
        name = os.path.relpath(path, folder)
        try:
            size = os.path.getsize(path)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}; fix or remove it") from None
        digest.update(f"{name}\0{size}\n".encode(errors="surrogateescape"))
    fingerprint = with_content(digest.hexdigest(), paths)
    limits = limits_of(str(root), train.images)
    return Ade20k(str(root), tuple(names), train, val, fingerprint, zero_label, limits)


def _find_pairs(folder: Path, split: str) -> Pairs:
    """Every image below images/SPLIT with annotations/SPLIT/(same place).png."""
    images, masks = folder / "images" / split, folder / "annotations" / split
    for place in (images, masks):
        if not place.is_dir():
            raise InputError(
                f"{place}: no such folder; ADE20K's layout has images/ and annotations/, each with "
                "training/ and validation/"
            )
    files = [
        path
        for path in sorted(images.rglob("*"))
        if not any(map(is_litter, path.relative_to(images).parts)) and not path.is_dir()
    ]
    found = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    others = [path.suffix.lower() for path in files if path.suffix.lower() not in IMAGE_SUFFIXES]
    report_left_out(str(images), len(found), Counter(kind or "without suffix" for kind in others))
    if not found:
        raise InputError(f"{images}: no image in it; copy the {split} images there")
    wanted = [masks / path.relative_to(images).with_suffix(".png") for path in found]
    for path, mask, before in zip(found, wanted, [None, *wanted], strict=False):
        if mask == before:
            raise InputError(
                f"{path}: another image has the same mask {mask}; rename or remove one"
            )
        if not mask.is_file():
            raise InputError(f"{path}: its mask {mask} is missing; add it or remove the image")
    return Pairs(tuple(map(str, found)), tuple(map(str, wanted)))


def read_classes(folder: Path, given: str | None) -> list[str]:
    """Names of the classes 1, 2, ... in order.

    given: None (the folder's objectInfo.txt or objectInfo150.txt), a file, names with commas between them, or
    how many there are. A file has a head line with the column Name, and Idx if the order is not that of the
    lines; columns are divided by tabs or commas. Without a column Name every line is a name.
    Raises InputError: no list, an empty one, numbers that are not 1, 2, ..., n.
    """
    if given is None:
        path = next((folder / name for name in LISTS if (folder / name).is_file()), None)
        if path is None:
            raise InputError(
                f"{folder}: no class list ({', '.join(LISTS[:2])}); give --classes a file, names with commas "
                "between them, or their number"
            )
    elif given.isdecimal() and len(given) < 10:
        return _counted([f"class {k + 1}" for k in range(min(int(given), MOST_CLASSES + 1))], given)
    elif os.path.isfile(given):  # unlike Path.is_file, silent about names that are too long
        path = Path(given)
    elif "," in given:
        return _counted([name.strip() for name in given.split(",") if name.strip()], given)
    else:
        raise InputError(
            f"classes '{given}' is no file: give a file, names with commas between them, or their number"
        )
    try:
        lines = read_file(path, MOST_LIST_BYTES).decode("utf-8-sig").splitlines()
    except (BadImage, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({error}); fix the class list") from None
    return _counted(_parse_list([line for line in lines if line.strip()], path), str(path))


def _parse_list(lines: list[str], path: Path) -> list[str]:
    """The names in the lines of a class list."""
    head = lines[0] if lines else ""
    divider = "\t" if "\t" in head else ","
    columns = [word.strip() for word in head.split(divider)]
    if "Name" not in columns:
        return [line.strip() for line in lines]
    # a name may hold commas itself, and is the last column then
    rows = [line.split(divider, len(columns) - 1) for line in lines[1:]]
    place = columns.index("Name")
    short = next(
        (line for line, row in zip(lines[1:], rows, strict=True) if len(row) <= place), None
    )
    if short is not None:
        raise InputError(f"{path}: the line {short.strip()[:60]!a} has no name; fix the class list")
    names = [row[place].strip().strip('"') for row in rows]
    if "Idx" not in columns:
        return names
    numbers = [row[columns.index("Idx")].strip() for row in rows]
    if sorted(numbers) != sorted(str(k + 1) for k in range(len(rows))):
        raise InputError(f"{path}: Idx is not 1, 2, ..., {len(rows)}; fix the class list")
    return [name for _, name in sorted(zip(map(int, numbers), names, strict=True))]


def _counted(names: list[str], where: str) -> list[str]:
    if not 2 <= len(names) <= MOST_CLASSES:
        raise InputError(
            f"class list '{where[:200]}' has {len(names)} class(es); give 2 to {MOST_CLASSES}"
        )
    if long := next((name for name in names if len(name) > 200), None):
        raise InputError(f"class list '{where}': the name {long[:60]!a}... is too long; shorten it")
    return names


def read_image(path: str, channels: int, limits: Limits | None = None) -> np.ndarray:
    """uint8 (H, W, channels); grey becomes RGB. limits: `Ade20k.limits`. Raises BadImage with the path."""
    try:
        return decode_image(read_file(os.fsencode(path)), channels, limits=limits)
    except BadImage as error:
        raise BadImage(f"{path}: {error}") from None


def read_labels(path: str) -> np.ndarray:
    """int32 (H, W): the numbers in a mask's file.

    Palette and 16-bit masks hold them as they are; RGB is taken where the three channels are equal.
    Raises InputError: colours instead of labels; BadImage: no readable PNG.
    """
    try:
        with Image.open(io.BytesIO(read_file(os.fsencode(path))), formats=("PNG",)) as image:
            labels = np.asarray(image.convert("RGB") if image.mode in ("RGBA", "LA") else image)
    except BadImage as error:
        raise BadImage(f"{path}: {error}") from None
    except Exception as error:  # Pillow raises SyntaxError, OSError, ... alike
        raise BadImage(
            f"{path}: no mask that can be read ({' '.join(str(error).split())})"
        ) from None
    if labels.ndim == 3:
        if not ((labels[:, :, 0] == labels[:, :, 1]) & (labels[:, :, 0] == labels[:, :, 2])).all():
            raise InputError(
                f"{path}: holds colours, not labels; save masks with one channel (or a palette), 0 = unlabelled"
            )
        labels = labels[:, :, 0]
    return labels.astype(np.int32)


def to_classes(
    labels: np.ndarray, path: str, classes: int, zero_label: ZeroLabel | None
) -> np.ndarray:
    """Labels of a file -> int16 (H, W): 0 .. classes - 1, or IGNORED.

    0 and 255 (65535 at 16 bit) are ignored, k is class k; 255 is a class where there are so many. With
    ``zero_label`` class 0 is the first class, 1 the second. Raises InputError for a label out of range.
    """
    first = 0 if zero_label == "class" else 1  # the label of the first class
    last = classes - 1 + first
    void = (labels < first) | (labels == 65535) | ((labels == 255) if last < 255 else False)
    bad = labels[~void & (labels > last)]
    if bad.size:
        counted = " counted from 0 (--zero_label class)" if first == 0 else ""
        raise InputError(
            f"{path}: label {int(bad[0])} is out of range, the list has {classes} classes{counted}; correct the "
            "mask, or give --classes" + (" or --zero_label ignored" if first == 0 else "")
        )
    return np.where(void, IGNORED, labels - first).astype(np.int16)


def read_mask(path: str, classes: int, zero_label: ZeroLabel | None = None) -> np.ndarray:
    """int16 (H, W): ``to_classes`` of ``read_labels``, which name what they raise."""
    return to_classes(read_labels(path), path, classes, zero_label)


def check_pair(image: str, mask: str, classes: int, zero_label: ZeroLabel | None) -> np.ndarray:
    """int64 (2 + classes,): pixels of label 0, all that are ignored, and those of each class.

    The image's size is compared, its pixels are not read. Raises InputError: unreadable, of another size than its
    image, labels out of range.
    """
    try:
        raw = read_labels(mask)
    except BadImage as error:
        raise InputError(f"{error}; correct or remove it") from None
    labels = to_classes(raw, mask, classes, zero_label)
    try:
        with open_file(image) as file, Image.open(file) as header:
            width, height = header.size
            if header.getexif().get(0x0112, 1) in _TURNED:
                width, height = height, width
    except Exception as error:  # BadImage, and all that Pillow's plug-ins raise
        raise InputError(
            f"{image}: no image that can be read ({' '.join(str(error).split())}); correct or remove it"
        ) from None
    if labels.shape != (height, width):
        raise InputError(
            f"{mask}: the mask has {labels.shape[1]} x {labels.shape[0]} pixels, its image {image} "
            f"{width} x {height}; they must be equal"
        )
    counts = np.bincount(labels.ravel().astype(np.int64) - IGNORED, minlength=1 + classes)
    return np.concatenate([[np.count_nonzero(raw == 0)], counts])


def check_pairs(data: Ade20k, pairs: Pairs, indexes: Iterable[int], threads: int = 8) -> np.ndarray:
    """The sum of ``check_pair`` over these pairs. Raises InputError for the first one that is wrong."""
    classes = len(data.classes)

    def check(i: int) -> np.ndarray:
        return check_pair(pairs.images[i], pairs.masks[i], classes, data.zero_label)

    with ThreadPoolExecutor(threads) as pool:
        counts = pool.map(check, list(indexes))
        try:
            return sum(counts, np.zeros(2 + classes, dtype=np.int64))
        except InputError:
            pool.shutdown(cancel_futures=True)
            raise


def check_labels(data: Ade20k, train: np.ndarray, val: np.ndarray) -> None:
    """Raise InputError where the labels cannot mean what ``zero_label`` says. train, val: ``check_pairs`` of all.

    Labels from 0 read as labels from 1 make every class the one before it, and the first one unlabelled: the
    number that comes out is of something else.
    """
    for split, counts in (("training", train), ("validation", val)):
        if not counts[2:].any():
            only = "255" if data.zero_label == "class" else "0 or 255"
            raise InputError(
                f"{data.root}: no labelled pixel in the {split} masks; all are {only}, which never counts: save "
                "the classes as numbers in a row"
            )
    zeros, last = train[0] / train[1:].sum(), data.classes[-1]
    if data.zero_label is None and zeros >= FREQUENT and train[-1] == 0:
        raise InputError(
            f"{data.root}: {zeros:.0%} of the training pixels are 0, unlabelled, and none has the last label "
            f"{len(data.classes)} ({last}), as if labels began at 0: give --zero_label class if 0 is "
            f"{data.classes[0]}, or --zero_label ignored if 0 means unlabelled"
        )
    present = np.flatnonzero(train[2:])
    if len(present) == 1:
        name = data.classes[int(present[0])]
        raise InputError(
            f"{data.root}: all labelled pixels of the training masks are {name}, so there is nothing to tell "
            "apart; labels are numbers in a row, and 255 is always unlabelled"
        )
