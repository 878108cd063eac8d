"""``cmt-mae embed``: features of images, in Python or from a folder into one file."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cmt_mae.backbones import Backbone, load_backbone
from cmt_mae.backbones.backbone import Embedding
from cmt_mae.core.backbone_facts import BackboneFacts
from cmt_mae.core.errors import InputError
from cmt_mae.core.files import write_atomically, write_json
from cmt_mae.core.lock import only_one
from cmt_mae.core.settings import Count, CountOrNone, check_fields
from cmt_mae.core.text import one_line, printable
from cmt_mae.data.centre import center_crop, load_image
from cmt_mae.data.decode import decode_image
from cmt_mae.data.source import BadImage, Limits
from cmt_mae.data.sources import Source, limits_of, open_source
from cmt_mae.engine.progress import evaluation_progress
from cmt_mae.evaluate.features import start_processes

SUFFIXES = (".npz", ".parquet", ".csv")
KEEP_EVERY = 512  # images between two files of what is done so far


@dataclass
class EmbedConfig(BackboneFacts):
    """Features of every image below a folder. The same command again goes on where it was stopped."""

    backbone: str
    """Run directory, checkpoint file, timm name or `embedded`."""
    images: str
    """Folder of images, tar shards, parquet files or a packed folder."""
    out: str
    """FILE.npz (arrays name, cls, mean, patches), FILE.parquet or FILE.csv (a row per image)."""
    range: list[float] = field(default_factory=list)
    """Values of black and white in images of more than 8 bits, as `pretrain --data.range`. Default: measured."""
    patches: bool = False
    """Keep every patch's feature too: N times as much; npz and parquet only."""
    key: str | None = None
    """`momentum` takes the momentum student of a run."""
    size: Count | None = None
    """Input size in pixels. Default: the backbone's own."""
    batch_size: Count = 64
    """Images in a forward pass. Does not change the result."""
    workers: CountOrNone = 2
    """Threads that decode images."""
    device: str = "auto"
    """auto, cpu or cuda."""
    progress: bool = True
    """Say on stderr how far it is."""


def embed(
    backbone: Backbone | str, images: Sequence[Any] | str | Path, *, batch_size: int = 64
) -> Embedding:
    """Features of images after the final norm, in their order, on the CPU: cls, mean and patches.

    backbone: as `load_backbone` gives it, or its name. images: a folder, or a list of paths, PIL images and
    (H, W, C) uint8 arrays. Each gets the evaluations' crop (`Backbone.transform`).
    Returns an Embedding of float32 tensors (B, D), (B, D), (B, N, D); cls is None without a class token.
    Raises InputError for no images, and for one that cannot be read (`embed_images` leaves such out).
    """
    network = load_backbone(backbone) if isinstance(backbone, str) else backbone
    source = open_source(str(images)) if isinstance(images, str | Path) else None
    items: Sequence[Any] = range(len(source)) if source is not None else list(images)  # type: ignore[arg-type]
    limits = None
    if source is None:
        limits = limits_of("images", [item for item in items if isinstance(item, str | Path)])
    if not len(items):
        raise InputError("no images to embed")
    parts: list[Embedding] = []
    for start in range(0, len(items), batch_size):
        some = items[start : start + batch_size]
        batch = [_pixels(item, source, network, limits) for item in some]
        done = network(torch.stack(batch))
        parts.append(Embedding(*(None if v is None else v.cpu() for v in done)))  # type: ignore[arg-type]
    cls, mean, patches = (
        torch.cat([p[i] for p in parts]) if parts[0][i] is not None else None  # type: ignore[misc]
        for i in range(3)
    )
    assert mean is not None
    assert patches is not None
    return Embedding(cls, mean, patches)


def _pixels(
    item: Any, source: Source | None, backbone: Backbone, limits: Limits | None
) -> torch.Tensor:
    """One image of a source (by number), a path (with these limits), PIL image or array, ready for the network."""
    channels = len(backbone.mean)
    name = str(item) if isinstance(item, str | Path | int) else type(item).__name__
    try:
        if source is not None:
            name, image = source.name(item), load_image(source, item, channels)
        elif isinstance(item, str | Path):
            image = decode_image(Path(item).read_bytes(), channels, limits=limits)
        elif hasattr(item, "convert") and channels == 3:
            if item.mode[0] in "IF":  # Pillow would cut values above 255 off
                raise InputError(
                    f"{name}: a PIL image of more than 8 bits (mode {item.mode}): give its path, or 8 bits"
                )
            image = np.asarray(item.convert("RGB"))
        else:
            image = np.asarray(item)
    except (BadImage, OSError) as error:
        raise InputError(f"{name}: cannot be read ({one_line(error)})") from error
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != channels:
        raise InputError(
            f"{name}: give a path, a PIL image or an array (H, W, {channels}) of uint8, not {image.dtype} "
            f"{image.shape}"
        )
    return prepared(image, backbone)


def prepared(image: np.ndarray, backbone: Backbone) -> torch.Tensor:
    """(H, W, C) uint8 -> (C, h, w) float32: the evaluation crop, normalised."""
    pixels = torch.from_numpy(center_crop(image, backbone.img_size)).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (backbone.mean, backbone.std))
    return (pixels - mean) / std


def embed_images(config: EmbedConfig) -> dict[str, Any]:
    """Features of every readable image into one file; unreadable ones are named and left out.

    Returns out, images, bad (name and reason of each), backbone (name, digest, facts) and the shapes written.
    Raises InputError for an unknown suffix, an unusable backbone, or a folder without a readable image.
    """
    check_fields(config)
    out = Path(config.out)
    if out.suffix not in SUFFIXES or out.is_dir():
        raise InputError(f"{out}: give --out a file that ends in {', '.join(SUFFIXES)}")
    if config.patches and out.suffix == ".csv":
        raise InputError("--patches does not fit into .csv: give --out a .npz or .parquet file")
    device = start_processes(config.device).device
    source = open_source(config.images, config.range)
    backbone = load_backbone(config.backbone, img_size=config.size, key=config.key, facts=config)
    about = {
        "backbone": config.backbone,
        "digest": backbone.digest,
        "facts": backbone.facts,
        "img_size": list(backbone.img_size),
        "images": [source.fingerprint(), source.limits],
        "patches": config.patches,
        "device": device.type,
    }
    parts = out.with_name(f"{out.name}.parts")
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    with only_one(parts, "embed.lock"):  # a second one would delete these parts when it is done
        bad = _fill(config, source, backbone, device, parts / name)
        arrays = _joined(parts / name)
        if not len(arrays["name"]):
            raise InputError(
                f"{config.images}: none of {len(source)} images can be read: check them"
            )
        _write(out, arrays, about)
        shutil.rmtree(parts, ignore_errors=True)
    for image, reason in list(bad.items())[:20]:
        print(printable(f"left out: {image} ({reason})"), file=sys.stderr)
    more = f", {len(bad)} left out" if bad else ""
    print(printable(f"{len(arrays['name'])} images in {out}{more}"), file=sys.stderr)
    return {
        "out": str(out),
        "images": len(arrays["name"]),
        "bad": bad,
        "about": about,
        "shapes": {k: list(v.shape) for k, v in arrays.items()},
    }


def _fill(
    config: EmbedConfig, source: Source, backbone: Backbone, device: torch.device, folder: Path
) -> dict[str, str]:
    """Write START.npz and START.json below ``folder`` for every KEEP_EVERY images; returns the unreadable ones."""
    backbone.model.to(device).eval()
    bad: dict[str, str] = {}
    channels = len(backbone.mean)

    def read(index: int) -> torch.Tensor | str:
        try:
            return prepared(load_image(source, index, channels), backbone)
        except BadImage as error:
            return one_line(error)

    with (
        ThreadPoolExecutor(max(1, config.workers)) as pool,
        evaluation_progress(config.progress) as bar,
    ):
        task = bar.add_task("images embedded", total=len(source))
        for start in range(0, len(source), KEEP_EVERY):
            stop = min(start + KEEP_EVERY, len(source))
            noted = folder / f"{start:012d}.json"  # written after its arrays
            if not noted.is_file():
                rows: dict[str, list[Any]] = {"name": [], "cls": [], "mean": [], "patches": []}
                missing: dict[str, str] = {}
                for first in range(start, stop, config.batch_size):
                    indexes = range(first, min(first + config.batch_size, stop))
                    read_now = list(zip(indexes, pool.map(read, indexes), strict=True))
                    missing |= {source.name(i): v for i, v in read_now if isinstance(v, str)}
                    good = [(source.name(i), v) for i, v in read_now if not isinstance(v, str)]
                    if good:
                        rows["name"] += [name for name, _ in good]
                        done = backbone(torch.stack([pixels for _, pixels in good]))
                        for part, value in done._asdict().items():
                            if value is not None and (part != "patches" or config.patches):
                                rows[part].append(value.cpu().numpy())
                    bar.advance(task, len(indexes))
                arrays = {k: np.concatenate(v) for k, v in rows.items() if k != "name" and v}
                _save_npz(
                    noted.with_suffix(".npz"), {"name": np.array(rows["name"], dtype=str), **arrays}
                )
                write_json(noted, missing)
            else:
                bar.advance(task, stop - start)
            bad |= json.loads(noted.read_text())
    return bad


def _joined(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of all parts, one after another."""
    loaded = []
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as part:
            loaded.append({k: part[k] for k in part.files})
    full = [part for part in loaded if len(part["name"])]
    names = full[0].keys() if full else ["name"]
    return {k: np.concatenate([part[k] for part in full or loaded]) for k in names}


def _save_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    write_atomically(path, lambda aside: aside.write_bytes(buffer.getbuffer()))


def _write(out: Path, arrays: dict[str, np.ndarray], about: dict[str, Any]) -> None:
    """One file by its suffix; what it was made of stands in it (npz: `about`, parquet: metadata) as JSON."""
    if out.suffix == ".npz":
        _save_npz(out, {**arrays, "about": np.array(json.dumps(about))})
    elif out.suffix == ".csv":
        numbers = {k: v for k, v in arrays.items() if k != "name"}
        head = ["name", *(f"{k}_{i}" for k, v in numbers.items() for i in range(v.shape[1]))]

        def write_rows(aside: Path) -> None:
            import csv

            with open(aside, "w", newline="", encoding="utf-8") as file:
                table = csv.writer(file)
                table.writerow(head)
                for row, name in enumerate(arrays["name"]):
                    table.writerow(
                        [name, *(repr(float(x)) for v in numbers.values() for x in v[row])]
                    )

        write_atomically(out, write_rows)
    else:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError as error:
            raise InputError(
                ".parquet needs pyarrow: pip install pyarrow, or give --out a .npz file"
            ) from error
        columns = {k: pa.array(v.tolist()) for k, v in arrays.items()}
        table = pa.table(columns).replace_schema_metadata({"cmt_mae": json.dumps(about)})
        write_atomically(out, lambda aside: pq.write_table(table, aside))
