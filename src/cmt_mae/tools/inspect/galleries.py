"""Galleries from the files of evaluations, methods side by side: DAVIS strips, detections, segmentations."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from cmt_mae.core.errors import InputError
from cmt_mae.core.text import printable
from cmt_mae.data.ade20k import Ade20k, read_image, read_mask
from cmt_mae.data.coco import CocoSplit
from cmt_mae.data.davis import VideoSequence, read_frame
from cmt_mae.data.davis import read_mask as read_video_mask
from cmt_mae.data.decode import BadImage
from cmt_mae.evaluate.detection.pictures import (
    MOST_SHOWN,
    SHOWN_SCORE,
    best_by_image,
    draw_objects,
)
from cmt_mae.evaluate.segmentation_pictures import NAMES_SHOWN, UNLABELLED, class_colours
from cmt_mae.evaluate.video.pictures import Row, short, strip_figure
from cmt_mae.evaluate.video.sequence import Shelf
from cmt_mae.tools.inspect.canvas import SMALL, WIDTH, Picture, Sheet

MAX_BYTES = 1 << 30
"""A file of detections above this is not read."""


@dataclass
class Output:
    """What one evaluation of one method left on the disk."""

    name: str
    """Of the method, for titles."""
    folder: Path
    """davis: PROTOCOL-HASH with masks/ and scores/; else the folder that holds predictions/."""


def outputs(folders: Sequence[str], task: str) -> list[Output]:
    """Every output of ``task`` (davis, coco, ade20k) in these run directories or folders of evaluations.

    Raises InputError for a folder without any.
    """
    found = []
    for given in folders:
        root = Path(given)
        if task == "davis":
            places = sorted(p.parent for p in root.glob("davis/*/masks") if p.is_dir())
        else:
            inside = "bbox.json" if task == "coco" else "*.png"
            candidates = [root, *sorted(root.glob(f"evaluations/{task}-*"))]
            places = [p for p in candidates if any((p / "predictions").rglob(inside))]
        if not places:
            what = "--save_masks true" if task == "davis" else "--pictures 8"
            raise InputError(
                f"{given} holds no predictions of {task}: run `cmt-mae evaluate {task} {what}` first"
            )
        many = len(places) > 1
        for place in places:
            inner = f" {place.name}" if many else ""
            found.append(Output(root.resolve().name + inner, place))
    return found


def strips_figure(sequence: VideoSequence, methods: Sequence[Output], columns: int) -> Figure:
    """Frames, ground truth and each method's masks in rows (the paper's Figure 3).

    Raises InputError where a method has not been through this sequence.
    """
    numbers = np.unique(np.linspace(0, len(sequence) - 1, columns).round().astype(int)).tolist()
    rows: list[Row] = [("frames", [None] * len(numbers))]
    rows.append(("ground truth", [read_video_mask(sequence.masks[n]) for n in numbers]))
    for method in methods:
        shelf = Shelf(method.folder, masks=True)
        outcome = shelf.load(sequence)
        if outcome is None:
            raise InputError(
                f"{method.folder} holds no whole masks of {sequence.name} as it is in --data: run the "
                "evaluation on it first"
            )
        score = 50 * (np.mean(outcome.j) + np.mean(outcome.f))
        masks = [read_video_mask(shelf.mask_file(sequence, n)) for n in numbers]
        rows.append((f"{short(method.name)}\nJ&F {score:.1f}", list(masks)))
    frames = [read_frame(sequence.frames[n]) for n in numbers]
    return strip_figure(frames, rows, numbers, (WIDTH - 1.1) / len(frames))


def detections_sheet(split: CocoSplit, methods: Sequence[Output], count: int) -> Sheet:
    """A row an image: what is there, and what each method found with score SHOWN_SCORE or more."""
    there = [i for i in range(len(split)) if split.annotations(i)]
    places = np.unique(np.linspace(0, len(there) - 1, min(count, len(there))).round().astype(int))
    answers = [read_detections(method.folder / "predictions") for method in methods]
    sheet = Sheet(
        len(places), 1 + len(methods), 0.78, f"detections with score {SHOWN_SCORE} or more",
        below=True, largest=2.3, head_lines=lines_of(methods),
    )  # fmt: skip
    for row, place in enumerate(places):
        index = there[int(place)]
        image = split.image(index).permute(1, 2, 0).numpy()
        truth = split.annotations(index)
        draw_objects(sheet.axes[row, 0], image, truth, split)
        sheet.note(row, 0, f"{len(truth)} there")
        for column, by_image in enumerate(answers, start=1):
            found = by_image.get(int(split.ids[index]), [])
            draw_objects(sheet.axes[row, column], image, found[:MOST_SHOWN], split)
            sheet.note(row, column, f"{len(found)} found")
    sheet.plain_heads(["ground truth", *(short(method.name) for method in methods)])
    return sheet


def read_detections(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """Image id -> detections above SHOWN_SCORE, the best first. Raises InputError for damaged files."""
    try:
        rows: list[Any] = []
        for path in (folder / "bbox.json", folder / "segm.json"):
            if path.name == "segm.json" and not path.exists():  # data without masks
                rows.append(None)
                continue
            if path.stat().st_size > MAX_BYTES:
                raise ValueError("too large")
            rows.append(json.loads(path.read_bytes()))
        kept = best_by_image(*rows)
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(
            f"{folder} holds no detections that can be read ({printable(str(error))[:100]}): run the evaluation "
            "again"
        ) from error
    return kept


def segmentations_sheet(data: Ade20k, methods: Sequence[Output], count: int) -> Sheet:
    """A row an image: the image, its truth, each method's labels; a legend of the largest classes.

    Images are those that every method has a prediction of. Raises InputError where there is none.
    """
    root = Path(data.root) / "images" / "validation"
    kept: list[tuple[int, list[Path]]] = []
    for index, image in enumerate(data.val.images):
        place = Path(image).relative_to(root).with_suffix(".png")
        files = [method.folder / "predictions" / place for method in methods]
        if all(file.is_file() for file in files):
            kept.append((index, files))
    if not kept:
        raise InputError(
            f"these methods have no picture of {data.root} in common: run them with more --pictures"
        )
    places = np.unique(np.linspace(0, len(kept) - 1, min(count, len(kept))).round().astype(int))
    classes = len(data.classes)
    colours, counts = class_colours(classes), np.zeros(classes, dtype=np.int64)
    first = labels_of(data.val.masks[kept[0][0]], data)
    sheet = Sheet(
        len(places), 2 + len(methods), first.shape[0] / first.shape[1], "segmentations", below=True,
        side=1.0, largest=2.0, head_lines=lines_of(methods),
    )  # fmt: skip
    for row, place in enumerate(places):
        index, files = kept[int(place)]
        truth = labels_of(data.val.masks[index], data)
        sheet.show(row, 0, read_image(data.val.images[index], 3) / 255)
        labelled = truth >= 0
        for column, file in enumerate([None, *files], start=1):
            labels = truth if file is None else labels_of(str(file), data)
            counts += np.bincount(labels[labels >= 0].astype(np.int64), minlength=classes)
            right = 100 * float((labels == truth)[labelled].mean()) if labelled.any() else 0.0
            note = "" if file is None else f"{right:.0f} % right"
            sheet.show(row, column, painted(labels, colours), note)
    sheet.plain_heads(["image", "ground truth", *(short(method.name) for method in methods)])
    legend(sheet, counts, colours, data.classes)
    return sheet


def lines_of(methods: Sequence[Output]) -> int:
    """Of the longest title."""
    return max(short(method.name).count("\n") + 1 for method in methods)


def labels_of(file: str, data: Ade20k) -> np.ndarray:
    """int16 (H, W), negative = unlabelled. Raises InputError where the mask cannot be read."""
    try:
        return read_mask(file, len(data.classes), data.zero_label)
    except BadImage as error:
        raise InputError(f"{error}; fix it or run the evaluation again") from error


def painted(labels: np.ndarray, colours: np.ndarray) -> Picture:
    """Labels (H, W) in their classes' colours."""
    picture: Picture = np.where(
        (labels >= 0)[..., None], colours[np.maximum(labels, 0)], UNLABELLED
    )
    return picture


def legend(sheet: Sheet, counts: np.ndarray, colours: np.ndarray, names: Sequence[str]) -> None:
    """The classes with most pixels, at the right."""
    largest = [int(k) for k in np.argsort(-counts, kind="stable")[:NAMES_SHOWN] if counts[k]]
    handles = [
        Patch(color=colours[k], label=printable(names[k]).replace(";", ",").split(",")[0][:18])
        for k in largest
    ]
    handles.append(Patch(color=UNLABELLED, label="unlabelled"))
    made = sheet.figure.legend(
        handles=handles, loc="outside right upper", fontsize=SMALL - 0.5, frameon=False,
        handlelength=1.0, labelspacing=0.25,
    )  # fmt: skip
    for text in made.get_texts():
        text.set_parse_math(False)
