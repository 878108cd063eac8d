"""Our loader against torchvision and timm, one process, one thread: images/s of a core."""

import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm.data
import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, v2

from benchmarks.speed_timing import OURS, Comparison, Options, alternate
from cmt_mae.data.loader import CropSettings, pretrain_batches
from cmt_mae.data.pack import PackConfig, pack
from cmt_mae.data.sources import open_source

SIZE = 224
SCALE = (0.2, 1.0)


def compare_loader(options: Options) -> Iterator[dict[str, Any]]:
    """Random crops of 224 px from full-size photos and from Imagenette, and from packed arrays."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sets = {"photos": ("photos", 60), "imagenette": ("imagenette/train", 240)}
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name, (place, count) in sets.items():
                path = options.shared / "data" / place
                yield loader_entry(
                    name, path, 20 if options.quick else count, Path(folder), options
                )
    finally:
        torch.set_num_threads(threads)


def loader_entry(
    name: str, path: Path, count: int, folder: Path, options: Options
) -> dict[str, Any]:
    """One set of images. ``count`` images a run, in batches of 20."""
    view = folder / f"{name}_view"  # ImageFolder wants class folders: photos gets one
    if any(child.is_dir() for child in path.iterdir()):
        view = path
    else:
        view.mkdir()
        (view / "all").symlink_to(path, target_is_directory=True)
    packed = folder / f"{name}_packed"
    pack_first(path, packed, max(count, 200), folder / f"{name}_first")
    contestants = {
        OURS: ours(path, count),
        "ours, packed at 256 px": ours(packed, count),
        "torchvision": torchvision_loader(view, count),
        "timm": timm_loader(view, count),
    }
    comparison = Comparison(
        "loader", f"loader/{name}",
        f"{count} random crops of {SIZE} px (scale 0.2 to 1, bicubic, flip) from {path.name} as uint8 batches of "
        "20, in one process with one thread. torchvision: ImageFolder, v2.RandomResizedCrop on PIL images. timm: "
        "its create_loader. Both stop at uint8 here, which spares them the normalisation that they usually do in "
        "the loader.",
        count, target={"torchvision": 2.0}, facts={"size": SIZE},
    )  # fmt: skip
    entry = comparison.measured(alternate(contestants, options.rounds, comparison.name))
    rows = entry["contestants"]
    entry["facts"]["packed_over_torchvision"] = (
        rows["torchvision"]["median"] / rows["ours, packed at 256 px"]["median"]
    )
    entry["facts"]["packed_over_torchvision_wanted"] = 20.0
    return entry


def pack_first(path: Path, out: Path, count: int, few: Path) -> None:
    """Pack at most ``count`` images at 256 px."""
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    step = max(1, len(files) // count)
    few.mkdir()
    for number, file in enumerate(files[::step][:count]):
        (few / f"{number:05d}{file.suffix}").symlink_to(file)
    pack(PackConfig(data=str(few), out=str(out), size=256, workers=0))


def ours(path: Path, count: int, batch: int = 20) -> Callable[[], object]:
    """Batches as `pretrain` reads them; an endless stream, so each run goes on where the last one stopped."""
    batches = pretrain_batches(
        open_source(str(path)), CropSettings((SIZE, SIZE), scale=SCALE), noise_length=0, seed=0,
        batch_size=batch, micro_batch=batch, workers=0,
    )  # fmt: skip
    return lambda: [next(batches) for _ in range(count // batch)]


def torchvision_loader(view: Path, count: int, batch: int = 20) -> Callable[[], object]:
    """The usual recipe of MAE, up to uint8."""
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, scale=SCALE, interpolation=InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
        ]
    )
    loader = DataLoader(
        ImageFolder(str(view), transform), batch_size=batch, shuffle=True, num_workers=0, drop_last=True
    )  # fmt: skip
    return lambda: list(itertools.islice(loader, count // batch))


def timm_loader(view: Path, count: int, batch: int = 20) -> Callable[[], object]:
    """timm's own pipeline with the same crops, up to the uint8 batch that its prefetcher would move."""
    loader = timm.data.create_loader(
        timm.data.ImageDataset(str(view)), (3, SIZE, SIZE), batch, is_training=True, scale=SCALE, hflip=0.5,
        color_jitter=0.0, interpolation="bicubic", num_workers=0, persistent_workers=False, use_prefetcher=True,
        device=torch.device("cpu"),
    )  # fmt: skip
    inner: Any = loader.loader  # type: ignore[union-attr]
    return lambda: list(itertools.islice(inner, count // batch))
