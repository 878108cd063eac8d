"""Frozen features of a labelled data set: one forward pass per image, kept on disk if wanted."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import gather, gather_object, pad_across_processes
from torch import Tensor, nn

from cmt_mae.core.backbone_facts import BackboneFacts
from cmt_mae.core.errors import InputError
from cmt_mae.core.settings import TIMEOUT_S, Amount, Count, CountOrNone, Device, PartOf
from cmt_mae.data.centre import eval_batches
from cmt_mae.data.source import SHARE_SEED, Source, joined_fingerprint
from cmt_mae.data.sources import open_split
from cmt_mae.engine.processes import meeting
from cmt_mae.evaluate.feature_files import cache_key, read_cache, write_cache

if TYPE_CHECKING:
    from rich.progress import Progress

    from cmt_mae.backbones import Backbone

Precision = Literal["fp32", "bf16"]
GATHER_ROWS = 16384  # rows a process sends at a time, so that gathering needs little device memory
WIDEST_GAP = 1000  # labels from here on must not be ten times as many as the classes that occur


@dataclass
class FrozenSettings(BackboneFacts):
    """What evaluations on frozen features of labelled images have in common."""

    backbone: str
    """Run directory, checkpoint file, timm name or `embedded`."""
    data: str
    """Labelled data set with a train and a val split."""
    val_share: PartOf = 0.0
    """Share of each class to hold out as val where there is no val split."""
    range: tuple[float, ...] = ()
    """Values of black and white in images of more than 8 bits; empty: measured on some of them."""
    out: str | None = None
    """Folder for results/*.json. Default: the run directory, if the backbone is one."""
    pools: tuple[str, ...] | None = None
    """Features: cls, mean, cls+mean, blocksK. Default: the protocol's."""
    size: Count | None = None
    """Input size in pixels. Default: the backbone's own."""
    key: str | None = None
    """`momentum` evaluates the momentum student of a run."""
    device: Device = "auto"
    """auto, cpu or cuda."""
    precision: Precision = "fp32"
    """Of the backbone's forward pass: fp32 or bf16. What is trained on top is always fp32."""
    workers: CountOrNone = 2
    """Processes that decode images, for each process that computes."""
    timeout_s: Amount = TIMEOUT_S
    """A loader process that gives no answer for so many seconds counts as hung; 0: wait for ever."""
    cache: str | None = None
    """Folder that keeps features, so the same backbone and data need no second pass."""
    progress: bool = True
    """Say on stderr how far it is."""
    seed: CountOrNone = 0
    """Of everything that is drawn; recorded with the result where nothing is."""


@dataclass
class Features:
    """Features of N images, in the order of the data set, on the CPU."""

    pools: dict[str, Tensor]
    """Name of the pool -> (N, D) float32."""
    labels: Tensor
    """(N,) int64; -1 where the image has no label."""

    def __len__(self) -> int:
        return len(self.labels)


def default_pools(backbone: Backbone) -> tuple[str, ...]:
    """``cls``, ``mean`` and both side by side; only ``mean`` without a class token."""
    return ("cls", "mean", "cls+mean") if backbone.has_cls else ("mean",)


CENTRE_CROP = "centre crop, shorter side 256/224 of the size, bicubic"
"""How ``extract`` takes an image, in the words of a result's protocol."""


class Where(NamedTuple):
    """One process among those that evaluate together."""

    device: torch.device
    rank: int
    world: int


def start_processes(device: str) -> Where:
    """This process's place among those that torchrun or accelerate started; alone without them.

    Args:
        device: ``auto`` (a GPU if there is one), ``cpu`` or ``cuda``.

    Raises:
        InputError: unknown name, or ``cuda`` without a GPU.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"unknown device {device!r}; use auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda, but torch sees no GPU here; use --device cpu or auto")
    with meeting(on_cpu=device == "cpu" or not torch.cuda.is_available()):
        state = PartialState(cpu=device == "cpu")
    where = torch.device("cpu") if device == "cpu" else state.device
    return Where(where, state.process_index, state.num_processes)


def open_labelled(
    path: str, limits: Sequence[float] = (), val_share: float = 0.0
) -> tuple[Source, Source]:
    """The training and validation images under ``path``, every one labelled, with equal classes.

    limits, val_share: see ``open_split``.

    Raises:
        InputError: a split is missing, an image has no label, or the classes differ.
    """
    train = open_split(path, "train", limits, val_share)
    val = open_split(path, "val", limits, val_share)
    a, b = train.classes, val.classes
    if a is not None and b is not None and a != b:
        gap = f"only in train: {_few(set(a) - set(b))}; only in val: {_few(set(b) - set(a))}"
        if set(a) == set(b):
            gap = "the same names in another order"
        raise InputError(f"{path}: train and val have different classes ({gap}); make them equal")
    known = set(label_list(train, path))
    # a head has an output for every number up to the largest
    if max(known) >= max(WIDEST_GAP, 10 * len(known)):
        raise InputError(
            f"{path}: label {max(known)} among {len(known)} different ones; number the classes 0, 1, 2, ..."
        )
    unknown = set(label_list(val, path)) - known
    if unknown:
        raise InputError(
            f"{path}: val has labels that train lacks ({_few(unknown)}); "
            "evaluate on classes that have training images"
        )
    return train, val


def label_list(source: Source, path: str) -> list[int]:
    """The label of every image.

    Raises:
        InputError: an image has none.
    """
    labels = []
    for i in range(len(source)):
        label = source.label(i)
        if label is None or label < 0:
            raise InputError(
                f"{path}: {source.name(i)} has no label (looked for {source.looked_for}); an evaluation needs "
                "labelled images in train and val"
            )
        labels.append(int(label))
    return labels


def _few(values: set[Any]) -> str:
    """At most five of the values, for an error of one line."""
    more = f" and {len(values) - 5} more" if len(values) > 5 else ""
    return (", ".join(map(str, sorted(values)[:5])) or "none") + more


def data_facts(path: str, train: Source, val: Source) -> dict[str, Any]:
    """``Result.data`` of a data set with two splits."""
    more: dict[str, Any] = {} if train.limits is None else {"range": list(train.limits)}
    if val.parent is not None:
        more["held_out"] = f"{len(val)} images of train, drawn by seed {SHARE_SEED}"
    return {
        "path": path,
        "fingerprint": joined_fingerprint(train, val),
        "train": len(train),
        "val": len(val),
        "classes": count_classes(train),
        **more,
    }


def count_classes(train: Source) -> int:
    """Number of classes: of the list of names if there is one, else the highest label + 1."""
    if train.classes is not None:
        return len(train.classes)
    return 1 + max(label_list(train, "the training split"))


def normalise(images: Tensor, backbone: Backbone) -> Tensor:
    """uint8 images (B, C, H, W) as the backbone wants them: (x / 255 - mean) / std, float32."""
    mean = torch.tensor(backbone.mean, device=images.device).view(1, -1, 1, 1)
    std = torch.tensor(backbone.std, device=images.device).view(1, -1, 1, 1)
    # The loader's batches are channels last in memory, the networks want planes.
    planes = images.to(torch.float32, memory_format=torch.contiguous_format)
    return (planes / 255 - mean) / std


def pool_parts(pool: str, backbone: Backbone) -> list[str]:
    """The parts that a pool is made of, laid side by side: ``cls+mean`` -> [cls, mean].

    Raises:
        InputError: unknown pool, a class token that is not there, or more blocks than there are.
    """
    model: Any = backbone.model
    parts = pool.split("+")
    for part in parts:
        blocks = re.fullmatch(r"blocks([1-9]\d*)", part)
        if part not in ("cls", "mean") and blocks is None:
            raise InputError(
                f"unknown pool {pool!r}; use cls, mean, blocksK (class token of the last K blocks) "
                "or several joined by +"
            )
        if part != "mean" and not backbone.has_cls:
            raise InputError(f"pool {pool!r}: {backbone.architecture} has no class token; use mean")
        depth = len(model.blocks)
        if blocks is not None and int(blocks[1]) > depth:
            raise InputError(f"pool {pool!r}: {backbone.architecture} has {depth} blocks")
    return parts


@torch.no_grad()
def forward_parts(
    backbone: Backbone, images: Tensor, parts: list[str], precision: Precision = "fp32"
) -> dict[str, Tensor]:
    """Parts of the feature of uint8 images (B, C, H, W), each (B, D) float32.

    ``cls`` is the class token after the final norm, ``mean`` the mean of the patch tokens (without
    class and register tokens) after the final norm, ``blocksK`` the class tokens of the last K
    blocks, each after the final norm, side by side (DINO's feature for small ViTs). A network
    trained with pooling keeps its norm behind the pool (timm's fc_norm); then that is applied.
    """
    model: Any = backbone.model
    deepest = max([int(part[6:]) for part in parts if part.startswith("blocks")], default=0)
    device = images.device.type
    with torch.autocast(device, torch.bfloat16) if precision == "bf16" else nullcontext():
        x = normalise(images, backbone)
        class_tokens: list[Tensor] = []
        if deepest:
            tokens, kept = model.forward_intermediates(
                x, indices=deepest, norm=True, output_fmt="NLC", return_prefix_tokens=True
            )
            class_tokens = [prefix[:, 0] for _, prefix in kept]
        else:
            tokens = model.forward_features(x)
        after: nn.Module = getattr(model, "fc_norm", None) or nn.Identity()
        found = {}
        for part in parts:
            if part == "cls":
                value = after(tokens[:, 0])
            elif part == "mean":
                value = after(tokens[:, backbone.prefix_tokens :].mean(1))
            else:
                value = torch.cat([after(t) for t in class_tokens[-int(part[6:]) :]], 1)
            found[part] = value.float()
    return found


def join_parts(parts: dict[str, Tensor], pools: tuple[str, ...]) -> dict[str, Tensor]:
    """The pools, put together from their parts."""
    return {pool: torch.cat([parts[p] for p in pool.split("+")], 1) for pool in pools}


def extract(
    backbone: Backbone,
    source: Source,
    *,
    device: torch.device,
    pools: tuple[str, ...] = ("cls", "mean", "cls+mean"),
    size: tuple[int, int] | None = None,
    batch_size: int = 64,
    workers: int = 0,
    timeout_s: float = TIMEOUT_S,
    cache: Path | None = None,
    rank: int = 0,
    world: int = 1,
    precision: Precision = "fp32",
    progress: Progress | None = None,
    title: str = "features",
) -> Features:
    """Features of every image's centre crop (shorter side to 256/224 of the size, bicubic).

    Each process forwards its share; every process returns all of them, each image once. With
    ``cache`` the parts are kept there under a name made of the weights' digest, the data's
    fingerprint and the settings, so only what was never computed is computed.

    Args:
        size: height and width of the crop; the backbone's own by default.
        batch_size: images in a forward pass of one process.

    Raises:
        InputError: impossible pool, broken image, unwritable cache.
    """
    parts = list(dict.fromkeys(p for pool in pools for p in pool_parts(pool, backbone)))
    size = size or backbone.img_size
    files = {
        part: cache / f"{cache_key(backbone, source, size, precision)}-{part}.safetensors"
        for part in parts
        if cache is not None
    }
    found, labels = read_cache(files, world)
    missing = [part for part in parts if part not in found]
    if missing:
        batches: Iterator[Any] = eval_batches(
            source,
            size=size,
            channels=len(backbone.mean),
            batch_size=batch_size,
            rank=rank,
            world=world,
            workers=workers,
            timeout_s=timeout_s,
        )
        if progress is not None:
            total = -(-len(source) // (batch_size * world))
            batches = iter(progress.track(batches, total=total, description=title))
        where = Where(device, rank, world)
        new, labels = _forward_all(backbone, batches, len(source), missing, where, precision)
        if not all(value.isfinite().all() for value in new.values()):
            raise InputError(
                f"features of {backbone.source} are not finite; its weights or its precision "
                f"({precision}) are at fault"
            )
        found |= new
        if rank == 0:
            for part in missing:
                if part in files:
                    write_cache(files[part], found[part], labels)
    return Features(join_parts(found, pools), labels)


def extract_split(
    settings: FrozenSettings,
    backbone: Backbone,
    source: Source,
    split: str,
    pools: tuple[str, ...],
    where: Where,
    batch_size: int,
    progress: Progress,
) -> Features:
    """``extract`` as the settings say. split: its name beside the progress bar."""
    return extract(
        backbone,
        source,
        device=where.device,
        pools=pools,
        batch_size=batch_size,
        workers=settings.workers,
        timeout_s=settings.timeout_s,
        cache=Path(settings.cache) if settings.cache else None,
        rank=where.rank,
        world=where.world,
        precision=settings.precision,
        progress=progress,
        title=f"features of {split}",
    )


def _forward_all(
    backbone: Backbone,
    batches: Iterator[Any],
    n: int,
    parts: list[str],
    where: Where,
    precision: Precision,
) -> tuple[dict[str, Tensor], Tensor]:
    """Forward this process's batches and gather those of all: parts (n, D) and labels (n,)."""
    was_training = backbone.model.training  # a run in progress may lend its student
    backbone.model.to(where.device).eval()
    rows: list[dict[str, Tensor]] = []
    for images, labels, index in batches:
        images = images.to(where.device, non_blocking=True)
        row = {k: v.cpu() for k, v in forward_parts(backbone, images, parts, precision).items()}
        rows.append({**row, "labels": labels, "index": index})
    backbone.model.train(was_training)
    local = {k: torch.cat([row[k] for row in rows]) for k in rows[0]} if rows else {}
    if where.world > 1:
        shapes: Any = gather_object([{k: (v.shape[1:], v.dtype) for k, v in local.items()}])
        for k, (shape, dtype) in max(shapes, key=len).items():  # a process may have had no image
            local.setdefault(k, torch.empty((0, *shape), dtype=dtype))
    index = gather_rows(local["index"], where)
    if not torch.equal(index.sort().values, torch.arange(n)):
        raise RuntimeError(f"{len(index)} features for {n} images: some counted twice or never")
    place = index.argsort()
    everything = {k: gather_rows(local[k], where)[place] for k in [*parts, "labels"]}
    return {part: everything[part] for part in parts}, everything["labels"]


def gather_rows(rows: Tensor, where: Where) -> Tensor:
    """Rows (n, ...) of all processes, one process after the other, on the CPU; n may differ."""
    if where.world == 1:
        return rows.cpu()
    counts: Any = gather_object([len(rows)])
    pieces: list[list[Tensor]] = [[] for _ in counts]
    for start in range(0, max(counts), GATHER_ROWS):
        piece = rows[start : start + GATHER_ROWS].to(where.device)
        padded: Any = gather(pad_across_processes(piece, dim=0))
        width = len(padded) // len(counts)
        for r, count in enumerate(counts):
            have = min(max(count - start, 0), GATHER_ROWS)
            pieces[r].append(padded[r * width : r * width + have].cpu())
    return torch.cat([piece for process in pieces for piece in process])
