"""Photos made on the spot, in tar shards. Imports little: each process that makes some imports it anew."""

import io
import multiprocessing
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

PHOTO = (500, 375)  # width and height near ImageNet's mean
QUALITY = 90


def photo(seed: int, size: tuple[int, int] = PHOTO) -> bytes:
    """A JPEG with large shapes, edges and grain; about 80 kB at 500 x 375 (ImageNet: 110 kB)."""
    rng = np.random.default_rng(seed)
    layers = np.zeros((size[1], size[0], 3), np.float32)
    for side, weight in ((4, 60.0), (16, 35.0), (64, 20.0)):
        small = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        resample = Image.Resampling.NEAREST if side == 16 else Image.Resampling.BICUBIC
        layers += (np.asarray(small.resize(size, resample), np.float32) - 128) * (weight / 74)
    layers += rng.normal(0, 9, layers.shape).astype(np.float32)
    out = io.BytesIO()
    Image.fromarray((128 + layers).clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=QUALITY)
    return out.getvalue()


def make_tars(folder: Path, count: int, processes: int, size: tuple[int, int] = PHOTO) -> int:
    """``count`` photos in shards of at most 1,000; bytes of all photos."""
    folder.mkdir(parents=True)
    context = multiprocessing.get_context("spawn")  # CUDA may be in use, a fork of it may not
    if processes > 1:
        with context.Pool(processes) as pool:
            made = pool.starmap(photo, [(seed, size) for seed in range(count)], chunksize=16)
    else:
        made = [photo(seed, size) for seed in range(count)]
    for start in range(0, count, 1000):
        with tarfile.open(folder / f"{start // 1000:05d}.tar", "w") as tar:
            for number in range(start, min(count, start + 1000)):
                info = tarfile.TarInfo(f"{number:07d}.jpg")
                info.size = len(made[number])
                tar.addfile(info, io.BytesIO(made[number]))
    return sum(map(len, made))
