"""Small labelled pictures that come with the package, for the demo and the tests: ten classes of rendered things.

`sample/make.py` of the repository made them. They are in stored zips in `sample_files/`; the functions here
write a part of them as a folder of the usual layout.
"""

import io
import json
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from cmt_mae.core.errors import InputError

FILES = Path(__file__).with_name("sample_files")
CLASSES = ("ball", "can", "cone", "crate", "die", "drum", "mushroom", "pebble", "ring", "tree")
SEMANTIC_CLASSES = (*CLASSES, "ground", "wall", "sky")
"""Labels 1..13 of the semantic masks; 0: unlabelled."""
MOST_IMAGES = {"train": 2000, "val": 1000}
MOST_SCENES = {"train": 40, "val": 20}
MOST_VIDEOS, MOST_FRAMES = 2, 8
_ADE20K = {"train": ("training", "train"), "val": ("validation", "val")}


def write_imagefolder(out: str | Path, train: int, val: int, size: int = 96) -> None:
    """OUT/{train,val}/CLASS/*.webp, square, classes in turn. size: side in pixels, 96 as they are stored."""
    counts = _counts({"train": train, "val": val}, MOST_IMAGES)
    with _opened(out, "images") as archive:
        for name in _images(counts):
            if size == 96:
                _write(archive, name, Path(out, name))
                continue
            picture = Image.open(io.BytesIO(archive.read(name)))
            Path(out, name).parent.mkdir(parents=True, exist_ok=True)
            smaller = picture.resize((size, size), Image.Resampling.BICUBIC)
            smaller.save(Path(out, name), quality=90)


def pictures(count: int) -> list[np.ndarray]:
    """The first held-out ones, uint8 (96, 96, 3) each."""
    with zipfile.ZipFile(FILES / "images.zip") as archive:
        names = _images(_counts({"train": 0, "val": count}, MOST_IMAGES))
        return [np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in names]


def write_coco(out: str | Path, train: int, val: int) -> None:
    """OUT/{train,val}2017/*.jpg of at most 64 px and OUT/annotations/instances_{train,val}2017.json.

    Category ids have gaps, segments are polygons; the second and seventh of ten pictures have a heap of things
    that is one annotation with ``iscrowd`` 1, the fourth has no thing.
    """
    with _opened(out, "scenes") as archive:
        for split, count in _counts({"train": train, "val": val}, MOST_SCENES).items():
            file = f"annotations/instances_{split}2017.json"
            content = json.loads(archive.read(f"coco/{file}"))
            content["images"] = content["images"][:count]
            kept = {image["id"] for image in content["images"]}
            content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
            Path(out, file).parent.mkdir(parents=True, exist_ok=True)
            Path(out, file).write_text(json.dumps(content))
            Path(out, f"{split}2017").mkdir(exist_ok=True)
            for image in content["images"]:
                place = f"{split}2017/{image['file_name']}"
                _write(archive, f"coco/{place}", Path(out, place))


def write_ade20k(out: str | Path, train: int, val: int) -> None:
    """OUT/images/{training,validation}/*.jpg of at most 64 px, OUT/annotations/.../*.png, OUT/objectInfo.txt."""
    with _opened(out, "scenes") as archive:
        _write(archive, "ade20k/objectInfo.txt", Path(out, "objectInfo.txt"))
        for split, count in _counts({"train": train, "val": val}, MOST_SCENES).items():
            long, short = _ADE20K[split]
            for number in range(1, count + 1):
                for kind, suffix in (("images", "jpg"), ("annotations", "png")):
                    place = f"{kind}/{long}/ADE_{short}_{number:08d}.{suffix}"
                    _write(archive, f"ade20k/{place}", Path(out, place))


def write_davis(out: str | Path, videos: int = MOST_VIDEOS, frames: int = MOST_FRAMES) -> None:
    """OUT/JPEGImages/480p/SEQ/*.jpg, 64 px high, OUT/Annotations/480p/SEQ/*.png, OUT/ImageSets/2017/val.txt.

    The folder is called 480p as in DAVIS, whatever the size. Objects cross each other's way.
    """
    counts = _counts(
        {"videos": videos, "frames": frames}, {"videos": MOST_VIDEOS, "frames": MOST_FRAMES}
    )
    with _opened(out, "videos") as archive:
        listed = archive.read("ImageSets/2017/val.txt").decode().split()[: counts["videos"]]
        Path(out, "ImageSets/2017").mkdir(parents=True, exist_ok=True)
        Path(out, "ImageSets/2017/val.txt").write_text("".join(f"{name}\n" for name in listed))
        for name in listed:
            for number in range(counts["frames"]):
                for kind, suffix in (("JPEGImages", "jpg"), ("Annotations", "png")):
                    place = f"{kind}/480p/{name}/{number:05d}.{suffix}"
                    _write(archive, place, Path(out, place))


def _images(counts: dict[str, int]) -> Iterator[str]:
    """Names in images.zip."""
    for split, count in counts.items():
        for index in range(count):
            yield f"{split}/{CLASSES[index % len(CLASSES)]}/{index:06d}.webp"


def _counts(wanted: dict[str, int], most: dict[str, int]) -> dict[str, int]:
    for name, count in wanted.items():
        if not 0 <= count <= most[name]:
            raise InputError(f"sample data: {name} {count}: give 0 to {most[name]}")
    return wanted


def _opened(out: str | Path, name: str) -> zipfile.ZipFile:
    """A zip of this package. Raises InputError where ``out`` holds something already."""
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: holds something already; give a new folder for sample data")
    folder.mkdir(parents=True, exist_ok=True)
    return zipfile.ZipFile(FILES / f"{name}.zip")


def _write(archive: zipfile.ZipFile, name: str, path: Path) -> None:
    """One file of the zip to the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(name) as source, open(path, "wb") as target:
        shutil.copyfileobj(source, target)
