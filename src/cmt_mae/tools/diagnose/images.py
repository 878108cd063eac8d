"""The data folder: how many images, how large, which are broken, which are there twice.

Everything is looked at in small sets; of large ones a sample drawn by seed, and the report says so.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from cmt_mae.data.decode import decode_image
from cmt_mae.data.folder import left_out_of
from cmt_mae.data.source import BadImage, Source
from cmt_mae.data.sources import has_splits, open_split
from cmt_mae.data.steps import order
from cmt_mae.tools.diagnose.finding import Finding, problem, warning

NAMED = 5  # examples of each kind
FLAT = 2.0  # grey levels: an image whose pixels spread less shows nothing
MANY_FLAT = 0.1
MANY_TWICE = 0.01
LARGE_PIXELS = 4e6  # where decoding is most of the work


@dataclass
class Seen:
    """What the images of one split showed."""

    images: int = 0
    looked_at: int = 0
    broken: list[tuple[str, str]] = field(default_factory=list)
    """(name, reason)."""
    flat: list[str] = field(default_factory=list)
    """Names of images of one colour."""
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """(height, width) in pixels."""
    files: list[int] = field(default_factory=list)
    """Bytes of each encoded image."""
    hashes: dict[bytes, list[str]] = field(default_factory=dict)
    """Hash of the encoded file, or of a pack's pixels -> names."""
    mean: np.ndarray = field(default_factory=lambda: np.zeros(0))
    square: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """Sums over images of each channel's mean and mean square, in 0..1."""

    @property
    def good(self) -> int:
        """Images that could be read."""
        return len(self.sizes)

    def twice(self) -> list[list[str]]:
        """Groups of names of images with the same bytes."""
        return [names for names in self.hashes.values() if len(names) > 1]


def check_images(
    path: str, channels: int, sample: int, progress: bool, limits: Sequence[float] = ()
) -> tuple[dict[str, Any], list[Finding]]:
    """Facts about the images under ``path`` (its train split, and val where there is one), and what is wrong.

    sample: how many images of each split are read; 0: all. Raises InputError where there are none.
    """
    splits = {"train": open_split(path, "train", limits)}
    if has_splits(path):
        splits["val"] = open_split(path, "val", limits)
    seen = {name: look(source, channels, sample, progress, name) for name, source in splits.items()}
    train = seen["train"]
    facts: dict[str, Any] = {
        "path": path,
        "fingerprint": splits["train"].fingerprint(),
        "left_out": {name: dict(source.left_out) for name, source in splits.items()},
        "range": splits["train"].limits and list(splits["train"].limits),
        "classes": class_counts(splits["train"]),
        "splits": {name: summary(one) for name, one in seen.items()},
    }
    found = [
        *judge_left_out(splits),
        *judge_readable(train),
        *judge_content(train),
    ]
    if "val" in seen:
        facts["in_both_splits"] = in_both(train, seen["val"])
        found += judge_leak(facts["in_both_splits"], seen["val"])
        found += [one for one in judge_readable(seen["val"]) if one.what == "broken images"]
    return facts, found


def judge_left_out(splits: dict[str, Source]) -> list[Finding]:
    """Files in the folders that are no images by their suffix."""
    texts = [
        name + text
        for name, source in splits.items()
        if (text := left_out_of(len(source), source.left_out))
    ]
    if not texts:
        return []
    fix = "convert them to JPEG or PNG, give them the right suffix, or move them away"
    return [warning("data", "files left out", "; ".join(texts), fix)]


def look(source: Source, channels: int, sample: int, progress: bool, name: str = "") -> Seen:
    """Read, hash and decode the images, or ``sample`` of them drawn by seed 0."""
    chosen = order(len(source), 0, 0)[: sample or len(source)].tolist()
    seen = Seen(images=len(source), mean=np.zeros(channels), square=np.zeros(channels))
    shown = track(
        chosen, f"look at {len(chosen)} of {len(source)} images {name}".rstrip(), console=Console(stderr=True),
        disable=not progress, transient=True,
    )  # fmt: skip
    for index in shown:
        look_at(seen, source, int(index), channels)
    return seen


def look_at(seen: Seen, source: Source, index: int, channels: int) -> None:
    """One image into the account."""
    seen.looked_at += 1
    name = source.name(index)
    try:
        data = source.read(index)
        raw = data if isinstance(data, bytes) else np.ascontiguousarray(data).tobytes()
        seen.hashes.setdefault(hashlib.sha256(raw).digest(), []).append(name)
        image = (
            decode_image(data, channels, limits=source.limits) if isinstance(data, bytes) else data
        )
    except BadImage as error:
        seen.broken.append((name, str(error)))
        return
    pixels = image[::4, ::4].reshape(-1, channels).astype(np.float64) / 255
    seen.mean += pixels.mean(0)
    seen.square += (pixels**2).mean(0)
    if pixels.std(0).max() * 255 < FLAT:
        seen.flat.append(name)
    seen.sizes.append(image.shape[:2])
    seen.files.append(len(raw))


def summary(seen: Seen) -> dict[str, Any]:
    """The account of one split as plain numbers."""
    heights = sorted(h for h, _ in seen.sizes)
    widths = sorted(w for _, w in seen.sizes)
    sides = sorted(min(size) for size in seen.sizes)
    twice = seen.twice()
    good = max(1, seen.good)
    mean = seen.mean / good
    return {
        "images": seen.images,
        "looked_at": seen.looked_at,
        "broken": len(seen.broken),
        "broken_examples": [list(one) for one in seen.broken[:NAMED]],
        "copies": sum(len(names) - 1 for names in twice),
        "copies_examples": [names[:NAMED] for names in twice[:NAMED]],
        "one_colour": len(seen.flat),
        "one_colour_examples": seen.flat[:NAMED],
        "height": spread_of(heights),
        "width": spread_of(widths),
        "shorter_side": spread_of(sides),
        "kilobytes": spread_of([round(n / 1000, 1) for n in sorted(seen.files)]),
        "mean": [round(float(v), 4) for v in mean],
        "std": [round(float(v), 4) for v in np.sqrt(np.maximum(seen.square / good - mean**2, 0))],
    }


def spread_of(ordered: list[Any]) -> list[Any]:
    """Smallest, median and largest of an ordered list; empty for none."""
    return [ordered[0], ordered[len(ordered) // 2], ordered[-1]] if ordered else []


def class_counts(source: Source) -> dict[str, Any] | None:
    """How many classes, and their smallest and largest; None without labels."""
    if source.classes is None:
        return None
    counts = [0] * len(source.classes)
    for index in range(len(source)):
        label = source.label(index)
        if label is not None and 0 <= label < len(counts):
            counts[label] += 1
    least, most = int(np.argmin(counts)), int(np.argmax(counts))
    return {
        "count": len(counts),
        "least": [source.classes[least], counts[least]],
        "most": [source.classes[most], counts[most]],
    }


def in_both(first: Seen, second: Seen) -> list[list[str]]:
    """Pairs of names with the same bytes, one of each split."""
    both = first.hashes.keys() & second.hashes.keys()
    return sorted([first.hashes[one][0], second.hashes[one][0]] for one in both)


def of_sample(seen: Seen) -> str:
    """``of 500 images`` or ``of a sample of 2000 of 14000 images``."""
    if seen.looked_at == seen.images:
        return f"of {seen.images} images"
    return f"of a sample of {seen.looked_at} of {seen.images} images"


def judge_readable(seen: Seen) -> list[Finding]:
    """Broken images and slow ones."""
    found: list[Finding] = []
    if seen.broken:
        name, reason = seen.broken[0]
        share = len(seen.broken) / seen.looked_at
        made = problem if share > 0.01 else warning  # 0.01: data.max_bad, where a run stops
        found.append(made(
            "data", "broken images", f"{len(seen.broken)} {of_sample(seen)}, first {name}: {reason}",
            "repair or delete them (a run skips and counts them, and stops over data.max_bad); --json names more",
        ))  # fmt: skip
    areas = [h * w for h, w in seen.sizes]
    if areas and float(np.median(areas)) > LARGE_PIXELS:
        found.append(warning(
            "data", "very large images", f"half of them have over {np.median(areas) / 1e6:.1f} megapixels: "
            "decoding them takes most of the time",
            "shrink them once: cmt-mae pack --data DATA --out PACKED --size 256",
        ))  # fmt: skip
    return found


def judge_content(seen: Seen) -> list[Finding]:
    """Images that say nothing, and copies."""
    found: list[Finding] = []
    if seen.good and len(seen.flat) > MANY_FLAT * seen.good:
        found.append(problem(
            "data", "images say nothing", f"{len(seen.flat)} {of_sample(seen)} are of one colour, first "
            f"{seen.flat[0]}",
            "look at them: empty scans, failed downloads? delete them",
        ))  # fmt: skip
    elif seen.flat:
        found.append(warning(
            "data", "one-colour images", f"{len(seen.flat)} {of_sample(seen)}, first {seen.flat[0]}", "delete them"
        ))  # fmt: skip
    twice = seen.twice()
    copies = sum(len(names) - 1 for names in twice)
    if copies > MANY_TWICE * max(1, seen.good):
        made = problem if copies > 0.5 * seen.good else warning
        found.append(made(
            "data", "the same image many times", f"{copies} {of_sample(seen)} are byte for byte copies of "
            "others, e.g. "
            f"{' = '.join(twice[0][:3])}", "keep one of each: copies add epochs, not images",
        ))  # fmt: skip
    return found


def judge_leak(both: list[list[str]], val: Seen) -> list[Finding]:
    """Validation images that are training images."""
    if not both:
        return []
    return [problem(
        "data", "validation images in the training set", f"{len(both)} {of_sample(val)}, e.g. "
        f"{' = '.join(both[0])}",
        "delete them from one of the two: accuracy measured on them is too high",
    )]  # fmt: skip
