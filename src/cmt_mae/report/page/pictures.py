"""The pictures of a run inside the page: shrunk, in a format that browsers share, within a budget of bytes."""

import base64
import io
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from cmt_mae.report.page.record import Record
from cmt_mae.text import one_line

SIDES = (1600, 1000, 640)
"""Longest side in pixels, tried from the left until the picture fits into its share."""
MAX_PIXELS = 64_000_000
STEP = re.compile(r"^(?P<what>.+?)_step_(?P<step>\d+)$")
WORDS = {
    "attention": "Attention and mask: one row an image; the photo, the map of each network, the patches left "
    "visible. Brighter = more attention than an even spread.",
    "confusion": "Confusion of classes: one row a true class, one column an answer.",
}


@dataclass(frozen=True)
class Shown:
    """One picture on the page."""

    source: str
    """data: address, or an address on the server of `watch`."""
    width: int
    height: int
    caption: str
    alt: str
    name: str
    """Path below pictures/."""


def chosen(record: Record, most: int) -> list[tuple[Path, str, int | None]]:
    """(file, kind, step) to show: of each kind the first, the last and evenly between; kinds share ``most``."""
    kinds: dict[str, list[tuple[Path, int | None]]] = {}
    for path in record.pictures:
        match = STEP.match(path.stem)
        folder = path.parent.relative_to(record.path / "pictures").as_posix()
        kind = match["what"] if match else path.stem
        kind = kind if folder == "." else f"{folder}/{kind}"
        kinds.setdefault(kind, []).append((path, int(match["step"][:15]) if match else None))
    shown: list[tuple[Path, str, int | None]] = []
    each = max(1, most // max(1, len(kinds)))
    for kind, files in list(kinds.items())[:most]:
        files.sort(key=lambda item: (item[1] is None, item[1] or 0, item[0].name))
        count = min(each, len(files))
        places = {round(i * (len(files) - 1) / max(1, count - 1)) for i in range(count)}
        if count == 1:
            places = {len(files) - 1}
        shown += [(files[p][0], kind, files[p][1]) for p in sorted(places)]
    return shown


def embedded(record: Record, budget: int, most: int = 12) -> tuple[list[Shown], list[str]]:
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
    left = len(record.pictures) - len(picked)
    if left > 0:
        notes.append(f"{left} more picture(s) are in {record.path / 'pictures'}")
    return found, notes


def linked(record: Record, most: int = 12) -> list[Shown]:
    """Pictures by their address on the server of `watch`."""
    from urllib.parse import quote

    found = []
    for path, kind, step in chosen(record, most):
        try:
            with Image.open(path) as image:
                size, description = image.size, described(image.info)
            changed = path.stat().st_mtime_ns
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue  # being written, or none
        below = path.relative_to(record.path).as_posix()
        source = f"/files/{quote(below)}?{changed}"
        found.append(_shown(record, path, kind, step, size, source, description))
    return found


def _shown(
    record: Record,
    path: Path,
    kind: str,
    step: int | None,
    size: tuple[int, int],
    source: str,
    description: str,
) -> Shown:
    name = one_line(kind.replace("_", " "), 80)
    caption = name if step is None else f"{name}, step {step}"
    says = description or WORDS.get(kind, "")
    alt = f"{caption}. {says}" if says else f"Picture {caption} of run {one_line(record.label, 80)}"
    below = path.relative_to(record.path / "pictures").as_posix()
    return Shown(source, size[0], size[1], caption, alt, one_line(below, 200))


@lru_cache(maxsize=64)
def fitted(path: Path, changed: int, most: int) -> tuple[tuple[int, int], bytes, str]:  # noqa: ARG001
    """(size, WebP of at most ``most`` bytes, description) of a picture; ``changed``: its time, for the cache.

    Raises OSError or ValueError where it is no picture, is too large, or cannot be made small enough.
    """
    with Image.open(path) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are too many")
        description = described(image.info)
        picture = image.convert("RGBA" if "transparency" in image.info else "RGB")
    for side in SIDES:
        small = picture.copy()
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        for quality in (90, 60):
            file = io.BytesIO()
            small.save(file, "WEBP", quality=quality, method=2)
            if file.tell() <= most:
                return small.size, file.getvalue(), description
    raise ValueError(f"it does not fit into {most // 1000} kB")


def described(info: dict[Any, Any]) -> str:
    """What the picture says of itself (PNG text Description), for the alternative text."""
    said = info.get("Description")
    return one_line(said, 500) if isinstance(said, str) else ""
