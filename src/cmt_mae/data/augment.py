"""MAE's augmentation for fine-tuning, one image at a time: crop, flip, RandAugment, erasing (spec 6.3).

RandAugment and erasing are timm's, which draw from the global generators of python, numpy and torch. Here
they draw from the sample's own stream: no process, worker or restart changes an image.
"""

import random
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import posterize, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from cmt_mae.core.errors import InputError
from cmt_mae.data.centre import resize
from cmt_mae.data.crops import crop_box, cut


@contextmanager
def seeded(seed: int) -> Generator[None]:
    """The global CPU generators of python, numpy and torch begin at ``seed`` inside, and go on as before after.

    seed: 0 .. 2^32 - 1.
    """
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach for the GPU
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


class Erased(NamedTuple):
    """A rectangle of an image replaced by noise."""

    top: int
    left: int
    pixels: Tensor
    """(C, h, w) float32 from N(0, 1): values of the *normalised* image, where timm and MAE erase."""


@dataclass
class Augment:
    """Random crop and flip, RandAugment, random erasing."""

    size: tuple[int, int]
    """Height and width in pixels."""
    mean: tuple[float, ...]
    """Per channel mean of the backbone's input in 0..1: the grey that RandAugment fills empty corners with."""
    smallest_crop: float = 0.08
    """Smallest share of the image's area that a crop takes; the largest is all of it."""
    rand_augment: str = "rand-m9-mstd0.5-inc1"
    """timm's text for RandAugment, or ``none``."""
    erasing: float = 0.25
    """Probability that a rectangle (2 % to 1/3 of the area) is erased by noise."""

    def __post_init__(self) -> None:
        """Build timm's transforms. Raises InputError for a text that timm does not know, and for channels."""
        self._rand = self._rand_augment()
        self._eraser = RandomErasing(self.erasing, mode="pixel", max_count=1, device="cpu")

    def _rand_augment(self) -> Any:
        if self.rand_augment == "none":
            return None
        if len(self.mean) not in (1, 3):
            raise InputError(
                f"RandAugment knows images of 1 or 3 channels, not {len(self.mean)}: use rand_augment none"
            )
        grey = tuple(min(255, round(255 * m)) for m in self.mean)
        # as timm's create_transform sets it up for interpolation="bicubic"
        options = {
            "translate_const": int(min(self.size) * 0.45),
            "img_mean": grey if len(grey) == 3 else grey[0],
            "interpolation": Image.Resampling.BICUBIC,
        }
        try:
            if not self.rand_augment.startswith("rand-"):
                raise ValueError("it begins with rand-")
            rand = rand_augment_transform(self.rand_augment, options)
        except (ValueError, AssertionError, KeyError, TypeError) as error:
            raise InputError(
                f"rand_augment {self.rand_augment!r} is no RandAugment of timm ({error}); use for example "
                "rand-m9-mstd0.5-inc1, or none"
            ) from None
        for op in rand.ops:
            if op.aug_fn is posterize:
                op.aug_fn = _posterize
        return rand

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Erased | None]:
        """(H, W, C) uint8 of any size -> ((C, *size) uint8, what is to be erased after normalisation)."""
        height, width = image.shape[:2]
        box = crop_box(rng, height, width, (self.smallest_crop, 1.0))
        picture = resize(cut(image, box), self.size)
        if rng.random() < 0.5:
            picture = picture.flip(2)
        with seeded(int(rng.integers(2**32))):
            if self._rand is not None:
                picture = self._distorted(picture)
            erased = self._erased(len(picture))
        return picture, erased

    def _distorted(self, picture: Tensor) -> Tensor:
        """RandAugment on (C, h, w) uint8."""
        array = picture.permute(1, 2, 0).numpy()
        flat = np.ascontiguousarray(array[:, :, 0] if array.shape[2] == 1 else array)
        changed = np.array(self._rand(Image.fromarray(flat)))
        return torch.from_numpy(changed.reshape(array.shape)).permute(2, 0, 1)

    def _erased(self, channels: int) -> Erased | None:
        """timm's erasing of an empty canvas shows place and noise."""
        canvas = self._eraser(torch.full((channels, *self.size), torch.nan))
        filled = ~canvas[0].isnan()
        if not filled.any():
            return None
        rows, columns = filled.any(1).nonzero().flatten(), filled.any(0).nonzero().flatten()
        top, bottom = int(rows[0]), int(rows[-1]) + 1
        left, right = int(columns[0]), int(columns[-1]) + 1
        return Erased(top, left, canvas[:, top:bottom, left:right].clone())


def _posterize(image: Image.Image, bits: int, **more: Any) -> Image.Image:
    """timm's posterize, and black where no bit is kept.

    timm keeps 0 bits at the highest magnitude, which MAE's text draws for about one image in 700: Pillow gave a
    black image then, as the recipe was made; from Pillow 13 on it raises.
    """
    if bits < 1:
        return Image.new(image.mode, image.size)
    return posterize(image, bits, **more)
