"""Images for the networks: found, read from files, cut to the input size, as they are shown."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cmt_mae.core.errors import InputError
from cmt_mae.data.centre import center_crop, load_image, resized_crop
from cmt_mae.data.decode import IMAGE_SUFFIXES, decode_image
from cmt_mae.data.files import read_file
from cmt_mae.data.source import BadImage, Limits, Source, shown
from cmt_mae.data.sources import limits_of, open_source
from cmt_mae.pretraining.assembly import crop_settings
from cmt_mae.tools.inspect.networks import Networks

SHOWN_SIDE = 224
"""Images are shown with at least so many pixels on the shorter side, whatever the network sees."""
NEXT = 20
"""How many images after a broken one are tried in its place."""


@dataclass
class Photo:
    """An image as it is on the disk."""

    name: str
    pixels: np.ndarray
    """uint8 (H, W, C)."""
    kind: str = ""
    """Name of its class, where the folder has classes."""


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
    photos: Tensor | None = None
    """uint8 (B, C, h, w): the whole photos, where the teacher sees those (``teacher.view photo``)."""
    boxes: Tensor | None = None
    """float32 (B, 4): top, left, height and width of the crop as shares of the photo; as ``photos``."""


class Album:
    """All images of some paths, none of them read yet: files, folders and every other source of `data`."""

    def __init__(self, paths: Sequence[str]) -> None:
        """Raises InputError for a path that is missing or holds no images."""
        self.paths = list(paths)
        self.files: list[Path] = []
        self.sources: list[Source] = []
        for path in paths:
            file = Path(path).expanduser()
            if file.suffix.lower() in IMAGE_SUFFIXES and not file.is_dir():
                self.files.append(file)
            else:
                self.sources.append(open_source(path))
        self.limits = limits_of("images", self.files)

    def read(self, channels: int, count: int) -> Iterator[Photo]:
        """Every file, and ``count`` images evenly over each folder; the next one in place of a broken one.

        Raises InputError for a broken file, or where no image is left.
        """
        some = False
        for file in self.files:
            some = True
            yield Photo(shown(file.name), read_image(file, channels, self.limits))
        for source in self.sources:
            for photo in spread(source, channels, count):
                some = True
                yield photo
        if not some:
            raise InputError(f"no image of {', '.join(self.paths)} can be read: give others")


def read_image(file: Path, channels: int, limits: Limits | None) -> np.ndarray:
    """One image file as uint8 (H, W, channels). Raises InputError where it is broken or not there.

    limits: values of black and white where it has more than 8 bits.
    """
    try:
        return decode_image(read_file(file), channels, limits=limits)
    except BadImage as error:
        raise InputError(f"{file}: {error}; give another image") from error


def spread(source: Source, channels: int, count: int) -> Iterator[Photo]:
    """``count`` images: one of each class, of evenly chosen classes; else evenly over the source.

    Where count is above the number of classes, and without classes, evenly; fewer where it has fewer.
    """
    taken: set[int] = set()
    for start in starts(source, count):
        for index in range(start, min(start + NEXT, len(source))):
            if index in taken:
                continue
            taken.add(index)
            try:
                pixels = load_image(source, index, channels)
            except BadImage as error:
                print(f"warning: {source.name(index)} is left out: {error}", file=sys.stderr)
                continue
            label = source.label(index)
            kind = source.classes[label] if source.classes and label is not None else ""
            yield Photo(source.name(index), pixels, kind)
            break


def starts(source: Source, count: int) -> list[int]:
    """Indices at which ``spread`` begins to look for a readable image, rising."""
    labels = [source.label(index) for index in range(len(source))] if source.classes else []
    first = {label: index for index, label in reversed(list(enumerate(labels)))}
    known = sorted(first.values())
    among = known if len(known) >= count else range(len(source))
    places = np.unique(np.linspace(0, len(among) - 1, count).round().astype(int)).tolist()
    return [among[place] for place in places]


def cut(photos: Sequence[Photo], networks: Networks) -> Inputs:
    """The largest centre crop of each photo that has the proportions of the networks' input."""
    size = networks.size
    crops = crop_settings(networks.config, networks.teacher)
    times = max(1, -(-SHOWN_SIDE // min(size)))

    def stack(goal: tuple[int, int]) -> Tensor:
        images = [center_crop(photo.pixels, goal, 1.0).transpose(2, 0, 1) for photo in photos]
        return torch.from_numpy(np.stack(images))

    inputs = Inputs(
        [photo.name for photo in photos],
        stack(size),
        None if crops.second_size is None else stack(crops.second_size),
        stack((size[0] * times, size[1] * times)),
    )
    if crops.photo_size is not None:
        whole = [
            resized_crop(p.pixels, (0, 0, *p.pixels.shape[:2]), crops.photo_size) for p in photos
        ]
        inputs.photos = torch.from_numpy(np.stack(whole)).permute(0, 3, 1, 2).contiguous()
        inputs.boxes = torch.tensor([centre_box(p.pixels.shape[:2], size) for p in photos])
    return inputs


def centre_box(photo: Sequence[int], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Top, left, height, width, as shares of a photo (height, width), of its largest centre crop of a shape."""
    scale = min(photo[0] / size[0], photo[1] / size[1])
    height, width = size[0] * scale / photo[0], size[1] * scale / photo[1]
    return (1 - height) / 2, (1 - width) / 2, height, width
