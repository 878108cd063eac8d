"""Loading images, against torchvision's and timm's loaders."""

import itertools
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import timm.data
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, v2

from benchmarks.timing import OURS, Comparison, alternate
from cmt_mae.data import jpeg
from cmt_mae.data.loader import CropSettings, pretrain_batches
from cmt_mae.data.pack import PackConfig, pack
from cmt_mae.data.sources import open_source

SIZE = 224
SCALE = (0.2, 1.0)
MOSAIC = (4000, 3000)
WHOLE = "ours, whole pictures"
PILLOW = "ours, by Pillow"
PACKED = "ours, packed"


def compare_loader(options: Any) -> Iterator[dict[str, Any]]:
    """Random crops of 224 px from full-size photos, packed arrays, Imagenette, and pictures of 12 megapixels."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    data = options.shared / "data"
    try:
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            count = 20 if options.quick else 60
            yield photos_entry(data / "photos", count, folder, options, 224, 256)
            yield photos_entry(data / "photos", count, folder, options, 96, 128)
            yield imagenette_entry(data / "imagenette/train", 20 if options.quick else 240, options)
            yield camera_entry(data / "photos", 1 if options.quick else 10, folder, options)
    finally:
        torch.set_num_threads(threads)


HOW = (
    "random crops (scale 0.2 to 1, bicubic, flip) as uint8 batches, in one process with one thread. "
    "torchvision: ImageFolder, v2.RandomResizedCrop on PIL images. timm: its create_loader. Both stop at uint8 "
    "here, which spares them the normalisation that they usually do in the loader. "
)


def photos_entry(
    path: Path, count: int, folder: Path, options: Any, size: int, packed: int
) -> dict[str, Any]:
    """Photos of the usual size of ImageNet, each means alone, and the same photos packed."""
    view, pack_path = folder / "view", folder / f"packed{packed}"
    if not view.exists():  # ImageFolder wants class folders
        view.mkdir()
        (view / "all").symlink_to(path, target_is_directory=True)
    pack(PackConfig(data=str(path), out=str(pack_path), size=packed, workers=0))
    contestants = {
        OURS: ours(path, count, size=size),
        WHOLE: with_patch("read_header", lambda *_: None, ours(path, count, size=size)),
        PILLOW: with_patch("simplejpeg", None, ours(path, count, size=size)),
        PACKED: ours(pack_path, count, size=size),
        "torchvision": torchvision_loader(view, count, size=size),
        "timm": timm_loader(view, count, size=size),
    }
    comparison = Comparison(
        "loader", f"loader/photos_{size}px",
        f"Crops of {size} px of {count} photos of about 500 x 375 px, 20 a batch: {HOW}'{WHOLE}' decodes no part, "
        f"'{PILLOW}' does without simplejpeg, '{PACKED}' reads what `cmt-mae pack --size {packed}` made of them.",
        count, target={"torchvision": 2.0}, facts={"size": size, "packed_size": packed},
    )  # fmt: skip
    entry = comparison.measured(alternate(contestants, options.rounds))
    rows = entry["contestants"]
    pairs = zip(rows["torchvision"]["seconds"], rows[PACKED]["seconds"], strict=True)
    entry["facts"]["packed_over_torchvision"] = statistics.median(a / b for a, b in pairs)
    entry["facts"]["packed_over_torchvision_wanted"] = 20.0
    return entry


def imagenette_entry(path: Path, count: int, options: Any) -> dict[str, Any]:
    """Pictures of just the size wanted."""
    contestants = {
        OURS: ours(path, count),
        "torchvision": torchvision_loader(path, count),
        "timm": timm_loader(path, count),
    }
    comparison = Comparison(
        "loader", "loader/imagenette",
        f"Crops of {SIZE} px of {count} pictures of 224 x 224 px, 20 a batch: {HOW}", count,
        target={"torchvision": 2.0}, facts={"size": SIZE},
    )  # fmt: skip
    return comparison.measured(alternate(contestants, options.rounds))


def camera_entry(path: Path, count: int, folder: Path, options: Any) -> dict[str, Any]:
    """Pictures as large as a camera's: mosaics of photos, for no such photos are at hand."""
    view = folder / "camera"
    mosaics(path, view / "all", count)
    contestants = {
        OURS: ours(view, count, batch=count),
        "ours, not shrunk": ours(view, count, batch=count, shrink=False),
        "torchvision": torchvision_loader(view, count, batch=count),
        "timm": timm_loader(view, count, batch=count),
    }
    comparison = Comparison(
        "loader", "loader/camera",
        f"Crops of {SIZE} px of {count} JPEG mosaics of photos, {MOSAIC[0]} x {MOSAIC[1]} px, {count} a batch: "
        f"{HOW}'ours, not shrunk' decodes the rows of a crop at full size.",
        count, target={"torchvision": 2.0}, facts={"size": SIZE},
    )  # fmt: skip
    return comparison.measured(alternate(contestants, options.rounds))


def mosaics(path: Path, out: Path, count: int) -> None:
    """``count`` pictures of MOSAIC pixels laid out with photos at their own size."""
    photos = [Image.open(file).convert("RGB") for file in sorted(path.iterdir())]
    out.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(count):
        whole = Image.new("RGB", MOSAIC)
        for left in range(0, MOSAIC[0], 500):
            for top in range(0, MOSAIC[1], 375):
                whole.paste(photos[random.integers(len(photos))], (left, top))
        whole.save(out / f"{number}.jpg", quality=90)


def with_patch(name: str, value: object, run: Callable[[], object]) -> Callable[[], object]:
    """The run with another value of ``cmt_mae.data.jpeg.NAME``, in the decoder and in the loader."""

    def patched() -> object:
        with mock.patch.object(jpeg, name, value):
            return run()

    return patched


def ours(
    path: Path, count: int, batch: int = 20, shrink: bool = True, size: int = SIZE
) -> Callable[[], object]:
    """Batches as `pretrain` reads them; an endless stream, so each run goes on where the last one stopped."""
    batches = pretrain_batches(
        open_source(str(path)), CropSettings((size, size), scale=SCALE, shrink=shrink),
        noise_length=0, seed=0, batch_size=batch, micro_batch=batch, workers=0,
    )  # fmt: skip
    return lambda: [next(batches) for _ in range(count // batch)]


def torchvision_loader(
    view: Path, count: int, batch: int = 20, size: int = SIZE
) -> Callable[[], object]:
    """The usual recipe of MAE, up to uint8."""
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=SCALE, interpolation=InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
        ]
    )
    loader = DataLoader(
        ImageFolder(str(view), transform), batch_size=batch, shuffle=True, num_workers=0, drop_last=True
    )  # fmt: skip
    return lambda: list(itertools.islice(loader, count // batch))


def timm_loader(view: Path, count: int, batch: int = 20, size: int = SIZE) -> Callable[[], object]:
    """timm's own pipeline with the same crops, up to the uint8 batch that its prefetcher would move."""
    loader = timm.data.create_loader(
        timm.data.ImageDataset(str(view)), (3, size, size), batch, is_training=True, scale=SCALE, hflip=0.5,
        color_jitter=0.0, interpolation="bicubic", num_workers=0, persistent_workers=False, use_prefetcher=True,
        device=torch.device("cpu"),
    )  # fmt: skip
    inner: Any = loader.loader  # type: ignore[union-attr]
    return lambda: list(itertools.islice(inner, count // batch))


