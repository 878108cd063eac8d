"""Scenes on disk in the layouts of ImageFolder, COCO and ADE20K."""

import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from rich.progress import track

from cmt_mae.core.errors import InputError
from cmt_mae.data.scenes.outlines import polygons, run_lengths
from cmt_mae.data.scenes.scene import SEMANTIC_CLASSES, Scene, render_scene
from cmt_mae.data.scenes.things import CLASSES

VERSION = 1
"""Raised whenever the same seed gives other pictures; kept in the marker of each data set."""

MARKER = "scenes.json"

COCO_IDS = (1, 2, 3, 4, 6, 7, 8, 10, 11, 13)
"""Category id of each class in the COCO files: with gaps, as the real ones."""

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """One picture to render and save."""

    seed: tuple[int, ...]
    size: int
    width: int
    label: int
    path: Path
    objects: bool = True
    crowd: bool = False


def claim(out: str | Path, layout: str, **settings: int) -> Path | None:
    """Folder to write into, or None where the same data set already lies there, finished.

    Raises:
        InputError: ``out`` is a file, or holds anything else; or a number of pictures is negative.
    """
    folder = Path(out)
    wanted = {"layout": layout, "version": VERSION, **settings}
    if any(value < 0 for value in settings.values()):
        raise InputError(f"scenes need numbers of 0 or more, got {settings}")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: give a folder to write the scenes into")
    if folder.is_dir() and any(folder.iterdir()):
        try:
            found = json.loads((folder / MARKER).read_text())
            finished = found.pop("finished")
        except (OSError, ValueError, KeyError, AttributeError):
            found, finished = None, False
        if found != wanted:
            raise InputError(
                f"{folder} already holds something else: choose another folder or empty this one"
            )
        if finished:
            return None
    folder.mkdir(parents=True, exist_ok=True)
    _mark(folder, {**wanted, "finished": False})
    return folder


def finish(folder: Path) -> None:
    """Note in the marker that the data set is complete."""
    _mark(folder, {**json.loads((folder / MARKER).read_text()), "finished": True})


def _mark(folder: Path, content: dict[str, Any]) -> None:
    (folder / MARKER).write_text(json.dumps(content) + "\n")


def progress(items: Iterable[T], total: int, what: str, frames: int = 1) -> Iterable[T]:
    """A bar where the wait is long: from 200 pictures, ``frames`` to an item."""
    if total * frames < 200:
        return items
    return track(items, f"scenes: {what}", total=total)


def save_jpeg(image: np.ndarray, path: Path, quality: int = 90) -> None:
    """Write a uint8 RGB picture (H, W, 3)."""
    Image.fromarray(image).save(path, quality=quality)


def _render(job: Job) -> Scene:
    return render_scene(
        job.seed, job.size, job.label, width=job.width, objects=job.objects, crowd=job.crowd
    )


def _save(job: Job) -> None:
    # Pictures of different compression, as on the web.
    quality = int(np.random.default_rng(job.seed).integers(75, 96))
    save_jpeg(_render(job).image, job.path, quality)


def _render_and_save(job: Job) -> Scene:
    scene = _render(job)
    save_jpeg(scene.image, job.path)
    return scene


def write_imagefolder(
    out: str | Path, n_train: int, n_val: int, size: int = 96, seed: int = 0, workers: int = 1
) -> None:
    """Labelled square pictures: OUT/train/CLASS/*.jpg and OUT/val/CLASS/*.jpg, classes balanced.

    Args:
        out: new or empty folder; a folder that holds the same data set is left as it is.
        n_train, n_val: numbers of pictures.
        size: side in pixels.
        seed: of the whole data set; train and val share no scene.
        workers: processes; their number changes no byte.

    Raises:
        InputError: ``out`` holds something else, or a number out of range.
    """
    folder = claim(out, "imagefolder", n_train=n_train, n_val=n_val, size=size, seed=seed)
    if folder is None:
        return
    jobs = []
    for split, (name, count) in enumerate((("train", n_train), ("val", n_val))):
        for kind in CLASSES:
            (folder / name / kind).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            label = index % len(CLASSES)
            path = folder / name / CLASSES[label] / f"{index:06d}.jpg"
            jobs.append(Job((seed, 1, split, index), size, size, label, path))
    if workers > 1:
        with ProcessPoolExecutor(workers) as pool:
            done: Iterable[None] = pool.map(_save, jobs, chunksize=16)
            for _ in progress(done, len(jobs), str(folder)):
                pass
    else:
        for job in progress(jobs, len(jobs), str(folder)):
            _save(job)
    finish(folder)


_ASPECTS = ((1, 1), (3, 4), (4, 3))  # of height to width; the longer side has the full size


def _varied(
    seed: tuple[int, ...], size: int, numbers: range, folder: Path, name: str
) -> Iterator[Job]:
    """Pictures of several aspects, whose main classes take turns; ``name`` formats the number."""
    for index, number in enumerate(numbers):
        high, wide = _ASPECTS[index % len(_ASPECTS)]
        height, width = size * high // max(high, wide), size * wide // max(high, wide)
        path = folder / name.format(number)
        yield Job((*seed, index), height, width, index % len(CLASSES), path)


def write_coco(out: str | Path, n_train: int, n_val: int, size: int = 96, seed: int = 0) -> None:
    """Detection data: OUT/{train,val}2017/*.jpg, OUT/annotations/instances_{train,val}2017.json.

    As in the real files, category ids have gaps (:data:`COCO_IDS`), segments are polygons, and
    heaps of things are one annotation with ``iscrowd`` 1 and an uncompressed RLE. Of every ten
    pictures the fourth has no thing at all, the second and seventh have a crowd.

    Args:
        out, n_train, n_val, seed: as :func:`write_imagefolder`.
        size: longer side in pixels; pictures are square, 4:3 or 3:4.

    Raises:
        InputError: as :func:`write_imagefolder`.
    """
    folder = claim(out, "coco", n_train=n_train, n_val=n_val, size=size, seed=seed)
    if folder is None:
        return
    (folder / "annotations").mkdir(exist_ok=True)
    categories = [
        {"id": number, "name": name, "supercategory": "thing"}
        for number, name in zip(COCO_IDS, CLASSES, strict=True)
    ]
    for split, (name, count) in enumerate((("train2017", n_train), ("val2017", n_val))):
        (folder / name).mkdir(exist_ok=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        base = split * n_train + 1
        jobs = _varied(
            (seed, 2, split), size, range(base, base + count), folder / name, "{:012d}.jpg"
        )
        for index, job in enumerate(progress(jobs, count, f"{folder}/{name}")):
            scene = _render_and_save(replace(job, objects=index % 10 != 3, crowd=index % 5 == 1))
            images.append(
                {
                    "id": base + index,
                    "file_name": job.path.name,
                    "width": job.width,
                    "height": job.size,
                }
            )
            annotations.extend(_annotations(scene, base + index, len(annotations) + 1))
        content = {
            "info": {"description": "generated scenes", "version": str(VERSION)},
            "licenses": [],
            "images": images,
            "annotations": annotations,
            "categories": categories,
        }
        (folder / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))
    finish(folder)


def _annotations(scene: Scene, image_id: int, first_id: int) -> Iterator[dict[str, Any]]:
    """COCO's record of each instance of a scene."""
    things = zip(scene.instance_masks, scene.boxes, scene.classes, scene.crowd, strict=True)
    for offset, (mask, box, kind, crowd) in enumerate(things):
        yield {
            "id": first_id + offset,
            "image_id": image_id,
            "category_id": COCO_IDS[kind],
            "iscrowd": int(crowd),
            "area": float(mask.sum()),
            "bbox": [float(side) for side in box],
            "segmentation": run_lengths(mask) if crowd else polygons(mask),
        }


def write_ade20k(out: str | Path, n_train: int, n_val: int, size: int = 96, seed: int = 0) -> None:
    """Semantic data: OUT/images/{training,validation}/*.jpg, OUT/annotations/.../*.png.

    The masks have one byte a pixel: 0 = unlabelled, 1..13 = :data:`SEMANTIC_CLASSES`. The columns
    of OUT/objectInfo.txt are those of ADE20K's, tabs apart: Idx, Ratio (of labelled training
    pixels), Train, Val (pictures that show it), Name.

    Args:
        out, n_train, n_val, seed: as :func:`write_imagefolder`.
        size: longer side in pixels; pictures are square, 4:3 or 3:4.

    Raises:
        InputError: as :func:`write_imagefolder`.
    """
    folder = claim(out, "ade20k", n_train=n_train, n_val=n_val, size=size, seed=seed)
    if folder is None:
        return
    pixels = np.zeros((2, len(SEMANTIC_CLASSES)), dtype=np.int64)
    shown = np.zeros_like(pixels)
    splits = (("training", "train", n_train), ("validation", "val", n_val))
    for split, (name, short, count) in enumerate(splits):
        for part in ("images", "annotations"):
            (folder / part / name).mkdir(parents=True, exist_ok=True)
        place = folder / "images" / name
        file = f"ADE_{short}_{{:08d}}.jpg"
        jobs = _varied((seed, 3, split), size, range(1, count + 1), place, file)
        for job in progress(jobs, count, str(place)):
            scene = _render_and_save(job)
            png = folder / "annotations" / name / f"{job.path.stem}.png"
            Image.fromarray(scene.semantic).save(png)
            counts = np.bincount(scene.semantic.ravel(), minlength=len(SEMANTIC_CLASSES) + 1)[1:]
            pixels[split] += counts
            shown[split] += counts > 0
    ratio = pixels[0] / max(1, pixels[0].sum())
    rows = ["Idx\tRatio\tTrain\tVal\tName"]
    for i, kind in enumerate(SEMANTIC_CLASSES):
        rows.append(f"{i + 1}\t{ratio[i]:.4f}\t{shown[0][i]}\t{shown[1][i]}\t{kind}")
    (folder / "objectInfo.txt").write_text("\n".join(rows) + "\n")
    finish(folder)
