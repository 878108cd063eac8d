"""Random crops of uint8 images, with randomness that belongs to the sample.

Resizing is bicubic with antialiasing in torch's uint8 kernel, the same filter as Pillow's up to the
rounding (seldom more than one grey level apart, no bias) and 2-3 times as fast on one core.
"""

import math

import numpy as np
import torch

Box = tuple[int, int, int, int]  # top, left, height, width, in pixels

# An epoch number that no run reaches: the stream of crops that do not change over epochs.
NO_EPOCH = 2**63
_NO_BUFFER = np.zeros(4, dtype=np.uint64)


def sample_rng(
    seed: int, epoch: int, index: int, again: np.random.Generator | None = None
) -> np.random.Generator:
    """The random stream of one sample in one epoch, the same on any rank and in any worker.

    Philox is counter-based: key = (seed, epoch), highest counter word = index, so streams of
    different samples can never overlap. Each argument lies in [0, 2**64). again: a generator made here
    that is no longer needed; it is set to the stream and returned, 4 times as fast as making one.
    """
    key = np.array([seed, epoch], dtype=np.uint64)
    counter = np.array([0, 0, 0, index], dtype=np.uint64)
    if again is None:
        return np.random.Generator(np.random.Philox(key=key, counter=counter))
    again.bit_generator.state = {
        "bit_generator": "Philox",
        "state": {"counter": counter, "key": key},
        "buffer": _NO_BUFFER, "buffer_pos": 4, "has_uint32": 0, "uinteger": 0,
    }  # fmt: skip
    return again


def crop_box(
    rng: np.random.Generator,
    height: int,
    width: int,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """Draw (top, left, h, w) by the law of torchvision's RandomResizedCrop.

    Area share uniform in `scale`, log aspect ratio (w / h) uniform in log `ratio`; ten tries, then
    the largest centred crop whose aspect ratio lies in `ratio`. MAE pre-training uses scale
    (0.2, 1) (mae main_pretrain.py:123-127).
    """
    area = height * width
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        u = rng.random(4).tolist()
        target = area * (scale[0] + (scale[1] - scale[0]) * u[0])
        aspect = math.exp(low + (high - low) * u[1])
        w = round(math.sqrt(target * aspect))
        h = round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            # u < 1, so the offsets are uniform over 0 .. height - h and 0 .. width - w.
            return int(u[2] * (height - h + 1)), int(u[3] * (width - w + 1)), h, w
    h, w = height, width
    if width / height < ratio[0]:
        h = min(height, round(width / ratio[0]))
    elif width / height > ratio[1]:
        w = min(width, round(height * ratio[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def cut(image: np.ndarray, box: Box) -> torch.Tensor:
    """The box of `image` (H, W, C) uint8 as (1, C, h, w) uint8, channels last in memory."""
    top, left, h, w = box
    # copy: a read-only or strided view would make torch warn and copy anyway. None first: torch knows
    # a batch as channels last by its strides, the batch's too, and then writes the same layout.
    piece = image[None, top : top + h, left : left + w].copy()
    return torch.from_numpy(piece).permute(0, 3, 1, 2)


def resize_into(image: torch.Tensor, row: torch.Tensor) -> None:
    """Resize (1, C, h, w) uint8 into `row` (1, C, *size) uint8 of a batch: bicubic, antialiased, rounded."""
    size = row.shape[-2:]
    if image.shape[-2:] == size:
        row.copy_(image)
        return
    # The operator behind F.interpolate, which cannot write into a given place.
    torch.ops.aten._upsample_bicubic2d_aa.out(image, list(size), False, None, None, out=row)
