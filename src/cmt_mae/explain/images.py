"""Images for the networks: read from files, cut to the input size, as they are shown."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cmt_mae import assemble
from cmt_mae.data.crops import center_crop
from cmt_mae.data.decode import IMAGE_SUFFIXES, BadImage, decode_image
from cmt_mae.data.folder import read_file, shown
from cmt_mae.data.loader import load_image
from cmt_mae.data.sources import Source, open_source
from cmt_mae.errors import InputError
from cmt_mae.explain.networks import Networks

SHOWN_SIDE = 224
"""Images are shown with at least so many pixels on the shorter side, whatever the network sees."""


@dataclass
class Photo:
    """An image as it is on the disk."""

    name: str
    pixels: np.ndarray
    """uint8 (H, W, C)."""


@dataclass
class Inputs:
    """The same B images as the networks see them and as they are shown."""

    names: list[str]
    images: Tensor
    """uint8 (B, C, H, W), the student's input size."""
    second: Tensor | None
    """uint8 (B, C, h, w): the same crop at the teacher's size, where it is cut from the photo again."""
    shown: Tensor
    """uint8 (B, C, kH, kW): the same crop, a whole number of times as large."""


def read_photos(paths: Sequence[str], channels: int, count: int) -> list[Photo]:
    """At most ``count`` images of files and folders (or any other source), evenly spread over each folder.

    A broken image of a folder is left out with a line on stderr. Raises InputError for a path that is
    missing or cannot be read, and where nothing is left.
    """
    photos: list[Photo] = []
    share = max(1, count // max(1, len(paths)))
    for number, path in enumerate(paths):
        wanted = count - len(photos) if number == len(paths) - 1 else share
        file = Path(path).expanduser()
        if file.is_file() and file.suffix.lower() in IMAGE_SUFFIXES:
            photos.append(Photo(shown(file.name), read_image(file, channels)))
        else:
            photos += spread(open_source(path), channels, wanted)
    if not photos:
        raise InputError(f"no image of {', '.join(paths)} can be read: give others with --images")
    return photos[: max(1, count)]


def read_image(file: Path, channels: int) -> np.ndarray:
    """One image file as uint8 (H, W, channels). Raises InputError where it is broken."""
    try:
        return decode_image(read_file(file), channels)
    except BadImage as error:
        raise InputError(f"{file}: {error}; give another image with --images") from error


def spread(source: Source, channels: int, count: int) -> list[Photo]:
    """``count`` images evenly over the source; the next one that can be read for a broken one."""
    found: list[Photo] = []
    taken: set[int] = set()
    for start in np.unique(np.linspace(0, len(source) - 1, count).round().astype(int)).tolist():
        for index in range(start, min(start + 20, len(source))):
            if index in taken:
                continue
            taken.add(index)
            try:
                found.append(Photo(source.name(index), load_image(source, index, channels)))
                break
            except BadImage as error:
                print(f"warning: {source.name(index)} is left out: {error}", file=sys.stderr)
    return found


def cut(photos: Sequence[Photo], networks: Networks) -> Inputs:
    """The largest centre crop of each photo that has the proportions of the networks' input."""
    size = networks.size
    second = assemble.crop_settings(networks.config, networks.teacher).second_size
    times = max(1, -(-SHOWN_SIDE // min(size)))

    def stack(goal: tuple[int, int]) -> Tensor:
        crops = [center_crop(photo.pixels, goal, 1.0).transpose(2, 0, 1) for photo in photos]
        return torch.from_numpy(np.stack(crops))

    return Inputs(
        [photo.name for photo in photos],
        stack(size),
        None if second is None else stack(second),
        stack((size[0] * times, size[1] * times)),
    )
