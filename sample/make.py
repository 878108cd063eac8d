"""Make the sample data that the package ships: `python sample/make.py` (half a minute).

Small photographic-looking scenes with ground truth: ten classes of things with their own shapes and surface
structures, in free colours, among clutter, with light, shadows, occlusion and a camera's blur and grain,
rendered by a small ray caster in numpy. A stored zip each, in src/cmt_mae/data/sample_files/:

- images.zip: {train,val}/CLASS/NUMBER.webp, 2000 and 1000 pictures of 96 x 96, classes in turn.
- scenes.zip: 40 and 20 pictures of at most 64 px with boxes and polygons (COCO's layout, category ids with
  gaps, heaps as crowds; the fourth of ten has no thing) and semantic masks (ADE20K's layout).
- videos.zip: 2 videos of 8 frames, 64 px high, in the layout of DAVIS-2017.
"""

import io
import json
import sys
import zipfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from outlines import polygons, run_lengths
from PIL import Image
from scene import SEMANTIC_CLASSES, Scene, render_scene
from things import CLASSES
from video import render_video

from cmt_mae.data.davis import palette_bytes

OUT = Path(__file__).parents[1] / "src/cmt_mae/data/sample_files"
SEED = 0
IMAGES = {"train": 2000, "val": 1000}
SCENES = {"train": 40, "val": 20}
VIDEOS, FRAMES = 2, 8
SIDE, SMALL = 96, 64  # pixels: of the pictures in class folders, of the others
ASPECTS = ((1, 1), (3, 4), (4, 3))  # of height to width; the longer side has the full size
COCO_IDS = (1, 2, 3, 4, 6, 7, 8, 10, 11, 13)  # with gaps, as the real ones
ADE_NAMES = {"train": ("training", "train"), "val": ("validation", "val")}

File = tuple[str, bytes]


def encode(image: np.ndarray, kind: str, quality: int = 90, palette: bytes | None = None) -> bytes:
    """A picture (H, W, 3) or a mask (H, W), uint8, as the bytes of a file."""
    picture, file = Image.fromarray(image), io.BytesIO()
    if palette is not None:
        picture.putpalette(palette)
    picture.save(
        file,
        kind,
        **({"quality": quality, "method": 6} if kind == "WEBP" else {"quality": quality}),
    )
    return file.getvalue()


def labelled(job: tuple[str, int]) -> File:
    """One picture for the class folders."""
    split, index = job
    label = index % len(CLASSES)
    scene = render_scene((SEED, 1, list(IMAGES).index(split), index), SIDE, SIDE, label)
    return f"{split}/{CLASSES[label]}/{index:06d}.webp", encode(scene.image, "WEBP", 75)


def annotated(split: str) -> Iterator[File]:
    """Pictures of one split, each in COCO's and in ADE20K's folder, with what is known of them."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    long, short = ADE_NAMES[split]
    base = 1 if split == "train" else SCENES["train"] + 1
    for index in range(SCENES[split]):
        high, wide = ASPECTS[index % len(ASPECTS)]
        height, width = SMALL * high // max(high, wide), SMALL * wide // max(high, wide)
        scene = render_scene(
            (SEED, 2, list(SCENES).index(split), index), height, width, index % len(CLASSES),
            objects=index % 10 != 3, crowd=index % 5 == 1,
        )  # fmt: skip
        number, jpeg = base + index, encode(scene.image, "JPEG", 88)
        name = f"{number:012d}.jpg"
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        annotations.extend(records(scene, number, len(annotations) + 1))
        yield f"coco/{split}2017/{name}", jpeg
        ade = f"{long}/ADE_{short}_{index + 1:08d}"
        yield f"ade20k/images/{ade}.jpg", jpeg
        yield f"ade20k/annotations/{ade}.png", encode(scene.semantic, "PNG")
    categories = [{"id": i, "name": name} for i, name in zip(COCO_IDS, CLASSES, strict=True)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    yield f"coco/annotations/instances_{split}2017.json", json.dumps(content).encode()


def records(scene: Scene, image_id: int, first_id: int) -> Iterator[dict[str, Any]]:
    """COCO's record of each thing of a scene."""
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


def videos() -> Iterator[File]:
    """DAVIS-2017: frames, palette masks (the index is the object) and the list."""
    names = []
    for index in range(VIDEOS):
        video = render_video((SEED, 4, index), FRAMES, SMALL)
        names.append(f"{'-'.join(CLASSES[kind] for kind in video.classes)}-{index:03d}")
        for number, (image, mask) in enumerate(zip(video.images, video.masks, strict=True)):
            yield f"JPEGImages/480p/{names[-1]}/{number:05d}.jpg", encode(image, "JPEG")
            png = encode(mask, "PNG", palette=palette_bytes())
            yield f"Annotations/480p/{names[-1]}/{number:05d}.png", png
    yield "ImageSets/2017/val.txt", "".join(f"{name}\n" for name in names).encode()


def scenes() -> Iterator[File]:
    """Both splits and the names of the semantic labels 1..13 (0: unlabelled), as ADE20K lists them."""
    rows = ["Idx\tName", *(f"{i}\t{name}" for i, name in enumerate(SEMANTIC_CLASSES, 1))]
    yield "ade20k/objectInfo.txt", ("\n".join(rows) + "\n").encode()
    for split in SCENES:
        yield from annotated(split)


def write(path: Path, files: Iterator[File]) -> None:
    """A stored zip without dates: the same files give the same bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files:
            archive.writestr(zipfile.ZipInfo(name), data)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB", file=sys.stderr)


def main() -> None:
    """All three."""
    OUT.mkdir(exist_ok=True)
    write(OUT / "videos.zip", videos())
    write(OUT / "scenes.zip", scenes())
    jobs = [(split, index) for split, count in IMAGES.items() for index in range(count)]
    with ProcessPoolExecutor() as pool:
        write(OUT / "images.zip", iter(pool.map(labelled, jobs, chunksize=16)))


if __name__ == "__main__":
    main()
