"""The pictures of a run inside the page: shrunk, in a format that browsers share, within a budget of bytes."""

import base64
import io
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from cmt_mae.core.run_reader import RunRecord
from cmt_mae.core.text import one_line

SIDES = (1600, 1000, 640)
"""Longest side in pixels, tried from the left until the picture fits into its share."""
MAX_PIXELS = 64_000_000
PER_INCH = 130
"""CSS pixels for an inch of a picture: letters of 6.5 points are then 12 pixels high."""
STEP = re.compile(r"^(?P<what>.+?)_step_(?P<step>\d+)$")
WORDS = {
    "attention": "One row per image: the photo, the attention map of each network, the patches left visible. "
    "Brighter is more attention than an even spread.",
    "heads": "The attention of each head by itself.",
    "growth": "The student's attention at several checkpoints in a row, from the random start on.",
    "masks": "What each mask rule leaves visible of the same images.",
    "features": "Patch features, three principal axes as red, green and blue: equal colours are equal features.",
    "predictions": "Predicted features beside their targets, in the same colours.",
    "reconstruction": "Pixels that the network predicts for hidden patches.",
    "neighbours": "The nearest images of each image by the features.",
    "confusion": "One row per true class, one column per answer.",
    "detections": "Found objects beside the true ones.",
    "segmentations": "Predicted masks beside the true ones.",
    "davis": "Frames of videos with the true and the carried masks.",
}
"""What a picture of this kind shows, for those who cannot see it and do not know it."""
LEFT_OUT = ("curves",)
"""The page draws its own."""


@dataclass(frozen=True)
class Shown:
    """One picture on the page."""

    source: str
    """data: address, or an address on the server of `watch`."""
    width: int
    height: int
    """In CSS pixels, by the size in inches that the file states: equal scale for all pictures of the page."""
    caption: str
    alt: str
    name: str
    """Path below pictures/."""


def chosen(record: RunRecord, most: int) -> list[tuple[Path, str, int | None]]:
    """(file, kind, step) to show: of each kind the first, the last and evenly between; kinds share ``most``."""
    kinds: dict[str, list[tuple[Path, int | None]]] = {}
    for path in record.pictures:
        match = STEP.match(path.stem)
        folder = path.parent.relative_to(record.path / "pictures").as_posix()
        kind = match["what"] if match else path.stem
        kind = kind if folder == "." else f"{folder}/{kind}"
        if kind in LEFT_OUT:
            continue
        kinds.setdefault(kind, []).append((path, int(match["step"][:15]) if match else None))
    counts = dict.fromkeys(list(kinds)[:most], 1)
    while sum(counts.values()) < most:  # what is left goes round to those that have more
        hungry = [kind for kind, count in counts.items() if count < len(kinds[kind])]
        if not hungry:
            break
        for kind in hungry[: most - sum(counts.values())]:
            counts[kind] += 1
    shown: list[tuple[Path, str, int | None]] = []
    for kind, count in counts.items():
        files = sorted(kinds[kind], key=lambda item: (item[1] is None, item[1] or 0, item[0].name))
        last = len(files) - 1
        places = {round(i * last / (count - 1)) for i in range(count)} if count > 1 else {last}
        shown += [(files[p][0], kind, files[p][1]) for p in sorted(places)]
    return shown


def embedded(record: RunRecord, budget: int, most: int = 12) -> tuple[list[Shown], list[str]]:
    """Pictures as data: addresses of at most ``budget`` characters together, and a note for each left out."""
    picked = chosen(record, most)
    found: list[Shown] = []
    notes: list[str] = []
    for place, (path, kind, step) in enumerate(picked):
        share = budget // (len(picked) - place)
        try:
            size, data, description = fitted(path, path.stat().st_mtime_ns, share * 3 // 4 - 100)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            notes.append(f"picture {one_line(path.name, 80)} is left out: {one_line(error, 120)}")
            continue
        source = "data:image/webp;base64," + base64.b64encode(data).decode()
        budget -= len(source)
        found.append(_shown(record, path, kind, step, size, source, description))
    left = sum(path.stem not in LEFT_OUT for path in record.pictures) - len(picked)
    if left > 0:
        notes.append(f"{left} more picture(s) are in {record.path / 'pictures'}")
    return found, notes


def linked(record: RunRecord, most: int = 12) -> list[Shown]:
    """Pictures by their address on the server of `watch`."""
    from urllib.parse import quote

    found = []
    for path, kind, step in chosen(record, most):
        try:
            with Image.open(path) as image:
                size, description = page_size(image), description_of(image.info)
            changed = path.stat().st_mtime_ns
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue  # being written, or none
        below = path.relative_to(record.path).as_posix()
        source = f"/files/{quote(below)}?{changed}"
        found.append(_shown(record, path, kind, step, size, source, description))
    return found


def _shown(
    record: RunRecord,
    path: Path,
    kind: str,
    step: int | None,
    size: tuple[int, int],
    source: str,
    description: str,
) -> Shown:
    name = one_line(kind.replace("_", " "), 80)
    caption = name if step is None else f"{name}, step {step}"
    says = description or WORDS.get(kind.rsplit("/", 1)[-1].split("_")[0], "")
    alt = f"{caption}. {says}" if says else f"Picture {caption} of run {one_line(record.label, 80)}"
    below = path.relative_to(record.path / "pictures").as_posix()
    return Shown(source, size[0], size[1], caption, alt, one_line(below, 200))


@lru_cache(maxsize=64)
def fitted(path: Path, changed: int, most: int) -> tuple[tuple[int, int], bytes, str]:  # noqa: ARG001
    """(page_size, WebP of at most ``most`` bytes, description) of a picture; ``changed``: its time, for the cache.

    Raises OSError or ValueError where it is no picture, is too large, or cannot be made small enough.
    """
    with Image.open(path) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are too many")
        description, size = description_of(image.info), page_size(image)
        clear = "A" in image.getbands() or "transparency" in image.info
        picture = image.convert("RGBA" if clear else "RGB")
    for side in SIDES:
        small = picture.copy()
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        for quality in (90, 60):
            file = io.BytesIO()
            small.save(file, "WEBP", quality=quality, method=2)
            if file.tell() <= most:
                return size, file.getvalue(), description
    raise ValueError(f"it does not fit into {most // 1000} kB")


def page_size(image: Image.Image) -> tuple[int, int]:
    """Width and height in CSS pixels, PER_INCH where the file says how large it is; else its own pixels."""
    dpi = image.info.get("dpi", (PER_INCH, PER_INCH))[0]
    scale = PER_INCH / dpi if isinstance(dpi, int | float) and 30 <= dpi <= 1200 else 1.0
    return max(1, round(image.width * scale)), max(1, round(image.height * scale))


def description_of(info: dict[Any, Any]) -> str:
    """What the picture says of itself (PNG text Description), for the alternative text."""
    said = info.get("Description")
    return one_line(said, 500) if isinstance(said, str) else ""
