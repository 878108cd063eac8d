"""Broken annotations in the layouts of COCO, ADE20K and DAVIS, for shards.py."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.faults.calling import in_fork
from benchmarks.faults.campaign import Verdict
from benchmarks.faults.measured import Trial
from benchmarks.faults.pictures import MUTATIONS, encode, mutate
from cmt_mae.core.errors import InputError
from cmt_mae.data.ade20k import check_pairs, open_ade20k, read_image, read_mask
from cmt_mae.data.coco import open_coco
from cmt_mae.data.davis import open_davis, read_frame
from cmt_mae.data.davis import read_mask as read_objects
from cmt_mae.data.decode import BadImage
from cmt_mae.data.sample import write_ade20k, write_coco, write_davis

Record = Callable[[str, list[Trial], Verdict, float, int], None]
MIB = 700.0
LARGE_MIB = 4500.0
"""For an annotation file of 100 MB: Python's objects take up to thirty times as much as their text."""

NAN, INF = float("nan"), float("inf")
ABSURD: tuple[Any, ...] = (
    None, True, -1, 0, 1.5, 2**31, 2**53, 2**63, 10**30, NAN, INF, 1e300, "", "x", "../../x", "/etc/passwd",
    "a\0b",
    [], {}, [[]], [None], ["x"], [[[[[[0]]]]]], [NAN] * 4, [-1, -1, -1, -1], [0, 0, 0, 0], [0, 0, -5, 5],
    [INF] * 4,
    [1e5] * 4, [10**400] * 4, [[NAN] * 6], [[1, 1, 2, 2, 3, 3]], [[1e9] * 6], [[0, 0, 1e5, 1e5] * 9000],
    "9" * 3000,
    {"size": [2**31, 2**31], "counts": [2**62]}, {"size": [64, 64], "counts": "~" * 99}, {"size": [64, 64]},
    {"size": [64, 64], "counts": [-1, 4097]}, {"size": [64, 64], "counts": [True] * 4096},
    {"size": [64, 64], "counts": [0] * 10**5 + [4096]}, {"size": [64, 64], "counts": [NAN]}, {"counts": {}},
)  # fmt: skip
"""Put in the place of every value in turn."""


def layouts(
    folder: Path, rng: np.random.Generator, small: bool, verdict: Verdict, record: Record
) -> None:
    """All trials of the three layouts."""
    in_fork(lambda: write(folder))
    record("coco", list(coco_trials(folder, rng, 20 if small else 700, small)), verdict, MIB, 100)
    if not small:
        record("coco, 100 MB of annotations", large_trials(folder), verdict, LARGE_MIB, 1)
    record("ade20k", list(ade20k_trials(folder, rng, 12 if small else 300)), verdict, MIB, 50)
    record("davis", list(davis_trials(folder, rng, 12 if small else 300)), verdict, MIB, 50)


def write(folder: Path) -> None:
    """One small data set of each layout, without faults."""
    write_coco(folder / "coco", 4, 2)
    write_ade20k(folder / "ade20k", 3, 2)
    write_davis(folder / "davis", 2, 4)


# --- COCO -------------------------------------------------------------------------------------------


def use_coco(root: Path) -> str | None:
    """Open the training split and use everything of it; what is wrong."""
    split = open_coco(root, "train")
    for index in range(len(split)):
        example = split.example(index)
        height, width = example.size
        limits = torch.tensor([width, height, width, height])
        if not bool((example.boxes >= 0).all() and (example.boxes <= limits).all()):
            return f"boxes outside of image {index}"
        if example.masks.shape != (len(example.boxes), height, width):
            return f"masks of another size at image {index}"
    for row in split.ground_truth()["annotations"]:
        if not all(map(math.isfinite, [*row["bbox"], row["area"]])):
            return f"annotation {row['id']} is not finite"
    return None if len(split.fingerprint()) == 64 else "no fingerprint"


def with_file(root: Path, raw: bytes) -> str | None:
    """``use_coco`` with another annotation file."""
    file = root / "annotations" / "instances_train2017.json"
    before = file.read_bytes()
    file.write_bytes(raw)
    try:
        return use_coco(root)
    finally:
        file.write_bytes(before)


def coco_trials(folder: Path, rng: np.random.Generator, count: int, small: bool) -> Iterator[Trial]:
    """Every value absurd in turn, every key missing, mutations of the text, lists that refer to each other."""
    root = folder / "coco"
    whole = (root / "annotations" / "instances_train2017.json").read_bytes()
    content: dict[str, Any] = json.loads(whole)
    for category, other in zip(content["categories"], content["categories"][1:], strict=False):
        category["supercategory"], other["supercategory"] = other["name"], category["name"]
    yield "categories that refer to each other", partial(with_file, root, as_json(content))
    for rows in ("images", "annotations", "categories"):
        first = content[rows][0]
        for key in first:
            for value in ABSURD[:: 11 if small else 1]:
                changed = {**content, rows: [{**first, key: value}, *content[rows][1:]]}
                what = f"{rows}.{key} = {value!r:.40}"
                yield what, partial(with_file, root, as_json(changed))
            less = {k: v for k, v in first.items() if k != key}
            changed = {**content, rows: [less, *content[rows][1:]]}
            yield f"no {rows}.{key}", partial(with_file, root, as_json(changed))
        for value in ABSURD:
            yield (
                f"{rows} = {value!r:.40}",
                partial(with_file, root, as_json({**content, rows: value})),
            )
            mixed = {**content, rows: [value, *content[rows]]}
            yield f"{rows}[0] = {value!r:.40}", partial(with_file, root, as_json(mixed))
    for text in (
        b"",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"\xff",
        b"nul",
        b"9" * 100_000,
        whole * 2,
    ):
        yield f"text {text[:9]!r}", partial(with_file, root, text)
    for number in range(count):
        how = MUTATIONS[number % len(MUTATIONS)]
        yield f"{how} {number}", partial(with_file, root, mutate(whole, how, rng, whole[::-1]))


def as_json(content: Any) -> bytes:
    """With NaN and Infinity as Python writes them."""
    return json.dumps(content).encode()


def large_trials(folder: Path) -> list[Trial]:
    """Annotation files of 100 MB: real ones, and such that Python's objects are largest."""
    root, size = folder / "coco", 100_000_000
    whole = json.loads((root / "annotations" / "instances_train2017.json").read_bytes())

    def real() -> str | None:
        first = next(a for a in whole["annotations"] if isinstance(a["segmentation"], list))
        first = {**first, "segmentation": [[round(x, 2) for x in np.linspace(1.111, 60, 60)]]}
        one = len(as_json(first)) + 2
        ids = [image["id"] for image in whole["images"]]
        rows = [
            {**first, "id": 10**6 + i, "image_id": ids[i % len(ids)]} for i in range(size // one)
        ]
        text = as_json({**whole, "annotations": rows})
        del rows
        file = root / "annotations" / "instances_train2017.json"
        file.write_bytes(text)
        del text
        split = open_coco(root, "train")
        return None if split.counts.sum() == size // one else "annotations are missing"

    def filled(piece: bytes) -> str | None:
        body = b",".join([piece] * (size // (len(piece) + 1)))
        text = b'{"images":[],"categories":[],"annotations":[' + body + b"]}"
        return with_file(root, text)

    def one_mask(segmentation: Any) -> str | None:
        first = {**whole["annotations"][0], "segmentation": segmentation}
        first.pop("area")
        return with_file(root, as_json({**whole, "annotations": [first]}))

    return [
        ("a real one", real),
        ("empty lists", partial(filled, b"[]")),
        ("empty records", partial(filled, b"{}")),
        ("small records", partial(filled, b'{"a":[]}')),
        ("numbers", partial(filled, b"1.5")),
        ("one run of 100 MB", partial(one_mask, {"size": [64, 64], "counts": "0" * size})),
        ("one list of runs", partial(one_mask, {"size": [64, 64], "counts": [0] * (size // 3)})),
        ("one polygon", partial(one_mask, [[1.5] * (size // 5)])),
        ("many polygons", partial(one_mask, [[1, 1, 2, 2, 3, 3]] * (size // 20))),
    ]


# --- ADE20K and DAVIS -------------------------------------------------------------------------------


def use_ade20k(root: Path) -> str | None:
    """Open the data, check all pairs as a training does, read all of them."""
    data = open_ade20k(root)
    for pairs in (data.train, data.val):
        check_pairs(pairs, len(data.classes), range(len(pairs)))
        for image, mask in zip(pairs.images, pairs.masks, strict=True):
            try:
                labels = read_mask(mask, len(data.classes))
                if labels.shape != read_image(image, 3).shape[:2]:
                    return f"{image}: sizes"
            except BadImage as error:
                return None if Path(image).name in str(error) else f"not named: {error}"
            if labels.max() >= len(data.classes) or labels.min() < -1:
                return f"{mask}: labels {labels.min()}..{labels.max()}"
    return None


def use_davis(root: Path) -> str | None:
    """Open all sequences and read every frame and mask."""
    for sequence in open_davis(str(root)):
        for frame, mask in zip(sequence.frames, sequence.masks, strict=True):
            if read_objects(mask).shape != read_frame(frame).shape[:2]:
                raise InputError(f"{frame}: the evaluation compares sizes")
    return None


def spoiled(
    folder: Path, name: str, use: Callable[[Path], str | None], at: str, raw: bytes
) -> Trial:
    """The data set with another content of one file."""

    def trial() -> str | None:
        place = folder / "spoiled"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(folder / name, place)
        (place / at).write_bytes(raw)
        return use(place)

    return f"{at}: {raw[:24]!r}", trial


def masks(side: tuple[int, int]) -> Iterator[bytes]:
    """Masks (height, width) of kinds and values that are none."""
    height, width = side
    for mode, value in (
        ("L", 254), ("RGB", (1, 2, 3)), ("RGB", (5, 5, 5)), ("RGBA", (1, 1, 1, 0)), ("LA", (7, 0)), ("1", 1),
        ("P", 200),
    ):  # fmt: skip
        yield encode(Image.new(mode, (width, height), value), "PNG")
    for array in (np.full(side, 65535, np.uint16), np.full(side, 40000, np.uint16)):
        yield encode(Image.fromarray(array), "PNG")
    others: tuple[tuple[str, str, float], ...] = (
        ("TIFF", "F", NAN), ("TIFF", "I", 2**31 - 1), ("GIF", "P", 3), ("JPEG", "L", 3),
    )  # fmt: skip
    for kind, mode, number in others:
        yield encode(Image.new(mode, (width, height), number), kind)
    yield encode(Image.new("L", (width + 1, height), 1), "PNG")
    yield encode(Image.new("L", (1, 1), 1), "PNG")


def ade20k_trials(folder: Path, rng: np.random.Generator, count: int) -> Iterator[Trial]:
    """Class lists, masks of other kinds, mutations of every kind of file."""
    root = folder / "ade20k"
    spoil = partial(spoiled, folder, "ade20k", use_ade20k)
    lists = (
        b"", b"\n", b"Name\n", b"Name\na\n", b"Name\n" + b"a\n" * 40000, b"Idx\tName\n1\ta\n1\tb\n",
        b"\xff\xfe\x00",
        b"Idx\tName\n9223372036854775808\ta\n2\tb\n", b"Idx\tName\nnan\ta\n-1\tb\n", b"Idx\tName\n1\n2\n",
        b"[" * 10**5,
        b"Name\n" + b"\x1b[2J\n" * 3, b"x" * 10**7, b"a" * 2**25, b"Name\na\nb\n" + b"\0" * 99,
    )  # fmt: skip
    yield from (spoil("objectInfo.txt", text) for text in lists)
    mask = sorted((root / "annotations" / "training").iterdir())[0]
    image = sorted((root / "images" / "training").iterdir())[0]
    with Image.open(mask) as opened:
        side = opened.size[::-1]
    at = str(mask.relative_to(root))
    yield from (spoil(at, raw) for raw in masks(side))
    for number in range(count):
        path = (mask, image, root / "objectInfo.txt")[number % 3]
        raw, how = path.read_bytes(), MUTATIONS[number // 3 % len(MUTATIONS)]
        yield spoil(str(path.relative_to(root)), mutate(raw, how, rng, raw[::-1]))


def davis_trials(folder: Path, rng: np.random.Generator, count: int) -> Iterator[Trial]:
    """Lists of sequences, masks of other kinds, mutations of every kind of file."""
    root = folder / "davis"
    spoil = partial(spoiled, folder, "davis", use_davis)
    lists = (
        b"", b" \n ", b"../../etc", b"/etc", b"..", ".\u202e".encode(), b"nowhere", b"\xff\xfe", b"a\0b",
        b"x" * 10**6,
        b"a\n" * 10**6, b"x" * 2**25, b"[" * 10**5, b"<script>", b"\x1b[2J",
    )  # fmt: skip
    yield from (spoil("ImageSets/2017/val.txt", text) for text in lists)
    mask = sorted((root / "Annotations").rglob("00000.png"))[0]
    frame = sorted((root / "JPEGImages").rglob("00001.jpg"))[0]
    with Image.open(mask) as opened:
        side = opened.size[::-1]
    yield from (spoil(str(mask.relative_to(root)), raw) for raw in masks(side))
    for number in range(count):
        path = (mask, frame, root / "ImageSets/2017/val.txt")[number % 3]
        raw, how = path.read_bytes(), MUTATIONS[number // 3 % len(MUTATIONS)]
        yield spoil(str(path.relative_to(root)), mutate(raw, how, rng, raw[::-1]))
