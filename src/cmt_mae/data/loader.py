"""Batches of uint8 crops, exact over processes, workers, epochs and resumes.

What a sample is (its crop, flip and mask noise) follows from (seed, epoch, index) alone, and which
samples make a step from (seed, step) alone. So ranks, workers and restarts cannot change a run.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import torch

from cmt_mae.core.errors import InputError
from cmt_mae.core.settings import TIMEOUT_S
from cmt_mae.data.crops import NO_EPOCH, Box, crop_box, cut, resize_into, sample_rng
from cmt_mae.data.source import MAX_PIXELS, BadImage, Limits, Source
from cmt_mae.data.steps import Steps, few, iterate

if TYPE_CHECKING:
    from cmt_mae.data import jpeg

# Broken images in a row, in place of one sample, after which the data itself is at fault.
MAX_REPLACED = 20
# Memory in which pictures are decoded, up to 1.4 megapixels.
SCRATCH_BYTES = 2**22
# Smallest noise: half the step of a float32 draw, so that noise lies in the open interval (0, 1).
_NOISE_MIN = np.float32(2**-25)


@dataclass(frozen=True)
class CropSettings:
    """How a pre-training image is cut."""

    size: tuple[int, int]
    """Height and width of the crop in pixels."""
    second_size: tuple[int, int] | None = None
    """Height and width of the same crop a second time, for a teacher with another input size."""
    photo_size: tuple[int, int] | None = None
    """Height and width to which the whole photo is squeezed, for a teacher that is shown photos."""
    scale: tuple[float, float] = (0.2, 1.0)
    """Range of the crop's share of the image area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the crop's aspect ratio, width over height."""
    channels: int = 3
    """Channels of an image."""
    fixed: bool = False
    """The same crop and flip of an image in every epoch (the noise still changes)."""
    shrink: bool = False
    """Decode a JPEG at 1/2, 1/4 or 1/8 where its crop is much larger than wanted (`data.jpeg`)."""

    @property
    def teacher_size(self) -> tuple[int, int] | None:
        """Height and width at which the teacher is shown a picture, where not at the student's."""
        return self.photo_size or self.second_size


class Batch(TypedDict):
    """A micro-batch of B samples on the CPU."""

    images: torch.Tensor
    """uint8 (B, C, H, W), channels last in memory, not flipped."""
    second: torch.Tensor | None
    """uint8 (B, C, h, w), channels last: the same crops at the second size, not flipped."""
    flip: torch.Tensor
    """bool (B,): which samples the consumer flips left to right (p = 1/2)."""
    noise: torch.Tensor
    """float32 (B, noise_length), uniform in the open interval (0, 1)."""
    box: torch.Tensor
    """float32 (B, 4): top, left, height and width of the crop, before any flip, as shares of the photo's
    height and width."""
    photos: torch.Tensor | None
    """uint8 (K, C, s, s), channels last: whole photos of the samples for which `photo_wanted` is true."""
    photo_rows: torch.Tensor
    """int64 (K,): which samples of the batch these are."""
    index: torch.Tensor
    """int64 (B,): the image's number in the source (the replacement's for a broken one)."""
    bad: list[tuple[int, str, str]]
    """Broken images met: (index, name, reason)."""


def decoded(data: bytes | np.ndarray, channels: int, limits: Limits | None) -> np.ndarray:
    """What a source read as uint8 (H, W, channels).

    Raises BadImage; InputError for a pack made with other channels.
    """
    if isinstance(data, bytes):
        from cmt_mae.data.decode import decode_image

        return decode_image(data, channels, limits=limits)
    have = data.shape[2]
    if have == 1 and channels == 3:
        return np.repeat(data, 3, axis=2)
    if have != channels:
        raise InputError(
            f"packed images have {have} channels, {channels} are wanted; "
            f"pack again with --channels {channels}"
        )
    return data


class _Micro:
    """Item: one whole micro-batch, given (epoch, indexes); an InputError is returned (iterate)."""

    def __init__(
        self,
        source: Source,
        crops: CropSettings,
        noise_length: int,
        seed: int,
        photo_wanted: Callable[[int], bool] | None,
    ) -> None:
        self.source, self.crops, self.photo_wanted = source, crops, photo_wanted
        self.noise_length, self.seed = noise_length, seed
        self.scratch = np.empty(SCRATCH_BYTES, dtype=np.uint8)

    def names_of(self, key: tuple[int, np.ndarray]) -> str:
        return few([self.source.name(index) for index in key[1][:4].tolist()])

    def __getitem__(self, key: tuple[int, np.ndarray]) -> Batch | InputError:
        try:
            return self._batch(*key)
        except InputError as error:
            return error

    def _batch(self, epoch: int, indexes: np.ndarray) -> Batch:
        crops, count = self.crops, len(indexes)
        images = empty_batch(count, crops.channels, crops.size)
        second = None
        if crops.second_size is not None:
            second = empty_batch(count, crops.channels, crops.second_size)
        flip = np.empty(count, dtype=bool)
        noise = np.empty((count, self.noise_length), dtype=np.float32)
        used = np.empty(count, dtype=np.int64)
        boxes = np.empty((count, 4), dtype=np.float32)
        photos: dict[int, torch.Tensor] = {}  # by row
        bad: list[tuple[int, str, str]] = []
        rng = None
        for row, index in enumerate(indexes.tolist()):
            rng = sample_rng(self.seed, NO_EPOCH if crops.fixed else epoch, index, again=rng)
            flip[row] = rng.random() < 0.5
            sample, used[row] = self._read(rng, index, bad)
            piece, boxes[row] = sample.piece, sample.box
            if sample.photo is not None:
                photos[row] = sample.photo
            resize_into(piece, images[row : row + 1])
            if second is not None:
                resize_into(piece, second[row : row + 1])
            # Last, so that crops do not depend on how much noise a method wants.
            noise_rng = sample_rng(self.seed, epoch, index) if crops.fixed else rng
            noise_rng.random(out=noise[row], dtype=np.float32)
        np.maximum(noise, _NOISE_MIN, out=noise)
        return Batch(
            images=images,
            second=second,
            flip=torch.from_numpy(flip),
            noise=torch.from_numpy(noise),
            box=torch.from_numpy(boxes),
            photos=torch.cat(list(photos.values())) if photos else None,
            photo_rows=torch.tensor(list(photos), dtype=torch.int64),
            index=torch.from_numpy(used),
            bad=bad,
        )

    def _read(
        self, rng: np.random.Generator, index: int, bad: list[tuple[int, str, str]]
    ) -> tuple["_Sample", int]:
        """A crop of image `index`, or in place of a broken one of another, drawn by the sample."""
        failed: list[tuple[int, str, str]] = []
        while len(failed) < MAX_REPLACED:
            try:
                return self._crop(rng, index), index
            except BadImage as error:
                failed.append((index, self.source.name(index), str(error)))
                bad.append(failed[-1])
            index = int(rng.integers(len(self.source)))
        named = "; ".join(f"{name}: {reason}" for _, name, reason in failed[:3])
        raise InputError(
            f"{MAX_REPLACED} images in a row cannot be read ({named}; ...); check the data"
        )

    def _crop(self, rng: np.random.Generator, index: int) -> "_Sample":
        """A random crop of image `index`, and the photo where it is wanted. Raises BadImage.

        A JPEG is decoded only as far as needed; the box is the same as of the decoded picture.
        """
        data = self.source.read(index)
        if isinstance(data, bytes) and self.crops.channels == 3:
            from cmt_mae.data.jpeg import read_header

            header = read_header(data, MAX_PIXELS)
            before = rng.bit_generator.state
            sample = None
            if header is not None:
                sample = self._cut(rng, index, header.size, partial(self._decode, data, header))
            if sample is not None:
                return sample
            rng.bit_generator.state = before  # as if this had not been tried
        image = decoded(data, self.crops.channels, self.source.limits)
        height, width = image.shape[:2]
        sample = self._cut(rng, index, (height, width), lambda box, _: cut(image, box))
        assert sample is not None
        return sample

    def _cut(
        self, rng: np.random.Generator, index: int, size: tuple[int, int], read: "_Read"
    ) -> "_Sample | None":
        """Draw a box in a photo of `size` (height, width) and read it; None where `read` cannot."""
        crops = self.crops
        box = crop_box(rng, *size, crops.scale, crops.ratio)
        sizes = [crops.size] if crops.second_size is None else [crops.size, crops.second_size]
        piece, photo = read(box, sizes), None
        if piece is None:
            return None
        if crops.photo_size and (self.photo_wanted is None or self.photo_wanted(index)):
            whole = read((0, 0, *size), [crops.photo_size])
            if whole is None:
                return None
            photo = empty_batch(1, crops.channels, crops.photo_size)
            resize_into(whole, photo)
        height, width = size
        return _Sample(
            piece, (box[0] / height, box[1] / width, box[2] / height, box[3] / width), photo
        )

    def _decode(
        self, data: bytes, header: "jpeg.Header", box: Box, sizes: list[tuple[int, int]]
    ) -> torch.Tensor | None:
        """A box of a JPEG, (1, C, h, w) uint8; None where it has to be decoded by other means."""
        from cmt_mae.data import jpeg

        shrink = jpeg.choose_shrink(box, sizes) if self.crops.shrink else 1
        piece = jpeg.decode(data, header, box, shrink, self.scratch)
        return None if piece is None else cut(piece, (0, 0, *piece.shape[:2]))


@dataclass
class _Sample:
    """One image of a batch."""

    piece: torch.Tensor
    """(1, C, h, w) uint8: the crop, not yet resized."""
    box: tuple[float, float, float, float]
    """Top, left, height, width of the crop as shares of the photo."""
    photo: torch.Tensor | None
    """(1, C, s, s) uint8."""


# A box of one photo, and the sizes it is wanted for -> (1, C, h, w) uint8; None: cannot be read so.
_Read = Callable[[Box, list[tuple[int, int]]], torch.Tensor | None]


def empty_batch(count: int, channels: int, size: tuple[int, int]) -> torch.Tensor:
    """A batch to be filled, in the layout that `resize` writes."""
    shape = (count, channels, *size)
    return torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)


def pretrain_batches(
    source: Source,
    crops: CropSettings,
    *,
    noise_length: int,
    seed: int,
    batch_size: int,
    micro_batch: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    start_step: int = 0,
    pin_memory: bool = False,
    timeout_s: float = TIMEOUT_S,
    photo_wanted: Callable[[int], bool] | None = None,
) -> Iterator[Batch]:
    """Endless micro-batches of this rank, beginning with optimizer step `start_step`.

    batch_size is global (all ranks, all accumulations of a step), micro_batch what one process puts
    through one forward pass; batch_size / (world * micro_batch) micro-batches make a step. An epoch
    is n // batch_size steps; the rest of its order is dropped. The same global batches come for any
    rank count and worker count. timeout_s: a worker silent for so long counts as hung (0: never).
    photo_wanted: given an image's number, whether its whole photo is part of the batch (`crops.photo_size`);
    called in the workers; None: always.
    Raises InputError: sizes that do not divide, fewer images than a batch, too many broken images,
    a worker that died or hung.
    """
    steps = Steps(len(source), seed, batch_size, micro_batch, rank, world, start_step)
    items = _Micro(source, crops, noise_length, seed, photo_wanted)
    for item in iterate(items, steps.after, workers, pin_memory, timeout_s):
        item["bad"] = [tuple(one) for one in item["bad"]]  # pinning makes lists of tuples
        yield item
