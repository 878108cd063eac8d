"""Detection data in COCO's layout: ROOT/annotations/instances_{train,val}2017.json and the images beside it.

Everything that may be wrong with the annotations is found when the split is opened, not hours later.
"""

import hashlib
import json
import math
import os
import warnings
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faster_coco_eval.core import mask as coco_mask
from PIL import Image

from cmt_mae.core.errors import InputError
from cmt_mae.core.text import one_line
from cmt_mae.data.coco_masks import (
    box_of,
    checked_segmentation,
    coordinates,
    filled_box,
    mask_of,
    rle_of,
)
from cmt_mae.data.decode import decode_image
from cmt_mae.data.detection_crops import Example
from cmt_mae.data.files import open_file, read_file
from cmt_mae.data.folder import with_content
from cmt_mae.data.source import MAX_PIXELS, BadImage
from cmt_mae.data.sources import limits_of

LARGEST_ID = 2**53
"""Ids from here on are not the same number in every JSON reader, and overflow in the evaluation."""
LARGEST_FILE = 2**31
"""Bytes of an annotation file. (COCO's largest has 0.45 GB; read, it takes up to thirty times as much.)"""
LARGEST_MASKS = 2**31
"""Bytes of all masks of one image, a byte a pixel and object."""


class CocoSplit:
    """One checked split: images, their objects, and the classes.

    Image i has file ``names[i]``, COCO id ``ids[i]`` and (height, width) ``sizes[i]``; class k (1..K in
    labels) has COCO id ``category_ids[k - 1]`` and name ``classes[k - 1]``: in order of the ids, whatever
    gaps they have. ``has_masks``: whether every object has one; else none has.
    """

    def __init__(self, annotation_file: Path, folder: Path) -> None:
        """Raises InputError for whatever is missing or impossible in the file or beside it."""
        self.path, self.folder = annotation_file, folder
        content, digest = _read(annotation_file)
        categories = _categories(content["categories"], annotation_file)
        self.category_ids = sorted(categories)
        self.classes = [categories[number] for number in self.category_ids]
        images = _images(content["images"], annotation_file)
        self.ids = np.array([image["id"] for image in images], dtype=np.int64)
        self.names = [image["file_name"] for image in images]
        self.sizes = [(image["height"], image["width"]) for image in images]
        places = {int(number): place for place, number in enumerate(self.ids)}
        by_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
        seen: set[int] = set()
        rows = content["annotations"]
        masks = [isinstance(raw, dict) and bool(raw.get("segmentation")) for raw in rows]
        self.has_masks = any(masks)
        for number, raw in enumerate(rows):
            where = f"{annotation_file}: annotation {_name(raw, number)}"
            if self.has_masks and isinstance(raw, dict) and not masks[number]:
                raise InputError(
                    f"{where}: it has no mask ('segmentation'), and others have one: give it one, or remove all "
                    "masks of both splits to train and measure boxes alone"
                )
            one = _annotation(raw, where, places, self.sizes, categories)
            if one["id"] in seen:
                raise InputError(f"{where}: its id is there twice; number annotations uniquely")
            seen.add(one["id"])
            by_image[places[one["image_id"]]].append(one)
        self.counts = np.array(
            [sum(not a["iscrowd"] for a in by_image[i]) for i in range(len(images))], dtype=np.int64
        )
        if not self.counts.any():
            raise InputError(
                f"{annotation_file}: no annotation of a single object (iscrowd 0), so there is nothing to learn "
                "or to measure: annotate it"
            )
        self._check_counts()
        self.crowds = sum(a["iscrowd"] for rows in by_image.values() for a in rows)
        # One block of bytes: objects would be copied into every loader process as they are touched.
        texts = [json.dumps(by_image[i]).encode() for i in range(len(images))]
        self._ends = np.cumsum([len(text) for text in texts])
        self._bytes = np.frombuffer(b"".join(texts), dtype=np.uint8)
        for size in check_files(annotation_file, folder, self.names, self.sizes):
            digest.update(f"{size}\n".encode())
        paths = [folder / name for name in self.names]
        self._fingerprint = with_content(digest.hexdigest(), paths)
        self.limits = limits_of(str(folder), paths)
        """Values of black and white in images of more than 8 bits; an evaluation gives val those of train."""

    def __len__(self) -> int:
        return len(self.names)

    def _check_counts(self) -> None:
        """Raises InputError where the masks of an image would not fit into the memory."""
        for name, (height, width), count in zip(self.names, self.sizes, self.counts, strict=True):
            if int(count) * height * width > LARGEST_MASKS:
                raise InputError(
                    f"{self.path}: {name} has {count} objects of {width} x {height} pixels; their masks would "
                    f"take over {LARGEST_MASKS >> 30} GiB: cut the image up, or remove objects"
                )

    def fingerprint(self) -> str:
        """Of the annotation file, the sizes in bytes of the images, in its order, and what some of them hold."""
        return self._fingerprint

    def annotations(self, index: int) -> list[dict[str, Any]]:
        """COCO's records of one image, checked, crowds among them."""
        start = int(self._ends[index - 1]) if index else 0
        rows: list[dict[str, Any]] = json.loads(self._bytes[start : self._ends[index]].tobytes())
        return rows

    def image(self, index: int, channels: int = 3) -> torch.Tensor:
        """(C, H, W) uint8, upright; grey and palette images become RGB. Raises InputError: broken file."""
        path = self.folder / self.names[index]
        try:
            array = decode_image(read_file(os.fsencode(path)), channels, limits=self.limits)
        except BadImage as error:
            raise InputError(
                f"{path}: {error}; an evaluation skips no image, fix or remove it"
            ) from None
        return torch.from_numpy(array.copy()).permute(2, 0, 1).contiguous()

    def example(self, index: int, channels: int = 3) -> Example:
        """The image with its single objects: what is trained on. Heaps (``iscrowd``) are left out.

        Where the data have no masks those of the example are the boxes, filled.
        """
        image = self.image(index, channels)
        height, width = image.shape[1:]
        rows = [a for a in self.annotations(index) if not a["iscrowd"]]
        boxes = torch.tensor([a["bbox"] for a in rows], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        limits = torch.tensor([width, height, width, height], dtype=torch.float32)
        labels = [self.category_ids.index(a["category_id"]) + 1 for a in rows]
        masks = [
            mask_of(a["segmentation"], height, width)
            if self.has_masks
            else filled_box(a["bbox"], height, width)
            for a in rows
        ]
        return Example(
            image=image,
            boxes=boxes.clamp(min=0).minimum(limits),
            labels=torch.tensor(labels, dtype=torch.int64),
            masks=torch.from_numpy(np.stack(masks))
            if masks
            else torch.zeros((0, height, width), dtype=torch.uint8),
        )

    def ground_truth(self) -> dict[str, Any]:
        """The checked annotations as one dictionary in COCO's format."""
        return {
            "images": [
                {"id": int(i), "file_name": name, "height": size[0], "width": size[1]}
                for i, name, size in zip(self.ids, self.names, self.sizes, strict=True)
            ],
            "annotations": [a for i in range(len(self)) for a in self.annotations(i)],
            "categories": [
                {"id": i, "name": n} for i, n in zip(self.category_ids, self.classes, strict=True)
            ],
        }


def open_coco(root: str | Path, split: str) -> CocoSplit:
    """The split ``train`` or ``val`` of a data set in COCO's layout.

    Reads ROOT/annotations/instances_SPLIT*.json (SPLIT2017 first) and the images in the folder that the
    file is named after: ROOT/SPLIT2017 or ROOT/images/SPLIT2017.
    Raises InputError: nothing there, several to choose from, or a file that is wrong.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"{root} is no folder: give --data the folder that holds annotations/")
    found = sorted((root / "annotations").glob(f"instances_{split}*.json"))
    usual = root / "annotations" / f"instances_{split}2017.json"
    if not found:
        raise InputError(
            f"no annotation file {usual}: COCO's layout has annotations/instances_{split}2017.json and "
            f"the images in {split}2017/"
        )
    if len(found) > 1 and usual not in found:
        names = ", ".join(path.name for path in found[:5])
        raise InputError(f"{root}/annotations holds several files of {split} ({names}): leave one")
    file = usual if usual in found else found[0]
    name = file.stem.removeprefix("instances_")
    for folder in (root / name, root / "images" / name):
        if folder.is_dir():
            return CocoSplit(file, folder)
    raise InputError(f"the images of {file} are missing: put them into {root / name}")


def same_classes(train: CocoSplit, val: CocoSplit) -> None:
    """InputError unless both splits have the same category ids and names."""
    one, other = (
        dict(zip(split.category_ids, split.classes, strict=True)) for split in (train, val)
    )
    if one != other:
        differing = sorted(k for k in {*one, *other} if one.get(k) != other.get(k))[:5]
        raise InputError(
            f"{train.path.name} and {val.path.name} have different categories (ids {differing}): "
            "give both files the same list"
        )


def _read(path: Path) -> tuple[dict[str, Any], Any]:
    """The file's content with its three lists, and a running sha256 that has seen its bytes."""
    try:
        raw = read_file(path, LARGEST_FILE)
        content = json.loads(raw)
    except BadImage as error:
        raise InputError(f"cannot read {path}: {error}") from None
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is no JSON ({reason}): download or write it again") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise InputError(f"{path} has no list '{key}': it is no COCO instances file")
        if key != "annotations" and not content[key]:
            raise InputError(f"{path}: the list '{key}' is empty")
    return content, hashlib.sha256(raw)


def _name(raw: Any, number: int) -> str:
    """How an error names a record: its id, or its place in the list."""
    given = raw.get("id") if isinstance(raw, dict) else None
    return str(given)[:30] if given is not None else f"number {number}"


def _integer(raw: Any, key: str, where: str, low: int = 0, high: int = LARGEST_ID) -> int:
    """raw[key] as an integer low <= x < high, or InputError."""
    value = raw.get(key) if isinstance(raw, dict) else None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value < high:
        raise InputError(
            f"{where}: '{key}' must be an integer in {low}..{high - 1}, not {value!r:.60}"
        )
    return value


def _categories(rows: list[Any], path: Path) -> dict[int, str]:
    """Category id -> name."""
    found: dict[int, str] = {}
    for number, raw in enumerate(rows):
        where = f"{path}: category {_name(raw, number)}"
        identity = _integer(raw, "id", where)
        if identity in found:
            raise InputError(f"{where}: its id is there twice; give every category its own")
        if not isinstance(raw.get("name"), str):
            raise InputError(f"{where}: it has no 'name'")
        found[identity] = raw["name"]
    return found


def _images(rows: list[Any], path: Path) -> list[dict[str, Any]]:
    """The checked records of images."""
    seen: set[int] = set()
    for number, raw in enumerate(rows):
        where = f"{path}: image {_name(raw, number)}"
        identity = _integer(raw, "id", where)
        if identity in seen:
            raise InputError(f"{where}: its id is there twice; number images uniquely")
        seen.add(identity)
        name = raw.get("file_name")
        if not isinstance(name, str) or not name or name[0] == "/" or ".." in Path(name).parts:
            raise InputError(
                f"{where}: 'file_name' must be a path below the images, not {name!r:.80}"
            )
        pixels = 1
        for side in ("height", "width"):
            raw[side] = _integer(raw, side, where, 1, MAX_PIXELS + 1)
            pixels *= raw[side]
        if pixels > MAX_PIXELS:
            raise InputError(
                f"{where}: {raw['width']} x {raw['height']} pixels, over the limit of {MAX_PIXELS}"
            )
    return rows


def _annotation(
    raw: Any,
    where: str,
    places: dict[int, int],
    sizes: Sequence[tuple[int, int]],
    categories: dict[int, str],
) -> dict[str, Any]:
    """One record with exactly the keys that are used; missing ``iscrowd``, ``area`` and ``bbox`` are filled in.

    Without a mask it has no ``segmentation``.
    """
    image = _integer(raw, "image_id", where)
    category = _integer(raw, "category_id", where)
    if image not in places:
        raise InputError(f"{where}: its image {image} is not in the list of images; remove it")
    if category not in categories:
        raise InputError(f"{where}: its category {category} is not in the list of categories")
    height, width = sizes[places[image]]
    heap = raw.get("iscrowd", 0)
    crowd = (
        int(heap) if isinstance(heap, bool) else _integer({"iscrowd": heap}, "iscrowd", where, 0, 2)
    )
    segmentation = raw.get("segmentation") or None
    if segmentation is not None:
        segmentation = checked_segmentation(segmentation, where, height, width)
    box = raw.get("bbox")
    if box is None and segmentation is not None:
        box = box_of(segmentation, height, width)
    if not coordinates(box) or len(box) != 4 or box[2] < 0 or box[3] < 0:
        raise InputError(
            f"{where}: 'bbox' must be [x, y, width, height] in pixels, not {box!r:.60}"
        )
    area = raw.get("area")
    if area is None and segmentation is None:
        area = box[2] * box[3]
    elif area is None:
        area = float(coco_mask.area(rle_of(segmentation, height, width)))
    if not coordinates([area], largest=math.inf) or area < 0:
        raise InputError(f"{where}: 'area' must be a number of pixels, not {area!r:.60}")
    return {
        "id": _integer(raw, "id", where),
        "image_id": image,
        "category_id": category,
        "iscrowd": crowd,
        "area": float(area),
        "bbox": [float(side) for side in box],
        **({} if segmentation is None else {"segmentation": segmentation}),
    }


def check_files(
    annotation_file: Path, folder: Path, names: Sequence[str], sizes: Sequence[tuple[int, int]]
) -> list[int]:
    """Sizes in bytes of all images, whose headers are read: each must be there and as large as stated.

    Raises InputError that counts the absent ones, or names one that is broken or of another size.
    """

    def look(name: str) -> tuple[int, tuple[int, int] | str]:
        path = folder / name
        try:
            about = path.stat()
        except (OSError, ValueError):
            return -1, ""
        try:
            with open_file(path) as file, Image.open(file) as image:
                turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
                return about.st_size, image.size if turned else image.size[::-1]
        except Exception as error:  # BadImage, and all that Pillow's plug-ins raise
            return about.st_size, " ".join(str(error).split())[:150]

    with warnings.catch_warnings(), ThreadPoolExecutor(8) as pool:
        warnings.simplefilter("ignore")  # of size and of broken EXIF
        found = list(pool.map(look, names))
    absent = [name for name, (size, _) in zip(names, found, strict=True) if size < 0]
    if absent:
        first = ", ".join(one_line(name, 80) for name in absent[:3])
        raise InputError(
            f"{annotation_file.name} names {len(absent)} image(s) that are not in {folder}: "
            f"{first}{' ...' if len(absent) > 3 else ''}; add them, or take them out of it"
        )
    for name, stated, (_, real) in zip(names, sizes, found, strict=True):
        if isinstance(real, str):
            raise InputError(f"{folder / name} is no image ({real}): fix or remove it")
        if real != stated:
            raise InputError(
                f"{folder / name} has {real[1]} x {real[0]} pixels, but {annotation_file.name} says "
                f"{stated[1]} x {stated[0]}: its boxes and masks are for another picture"
            )
    return [size for size, _ in found]
