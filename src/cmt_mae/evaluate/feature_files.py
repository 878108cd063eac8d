"""Features kept on disk: a file for each part, named by what they were made of."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from cmt_mae.core.errors import InputError
from cmt_mae.core.files import sweep, write_atomically
from cmt_mae.data.source import Source

if TYPE_CHECKING:
    from cmt_mae.backbones import Backbone

CACHE_VERSION = 1  # raise it when the same key would stand for other numbers


def cache_key(backbone: Backbone, source: Source, size: tuple[int, int], precision: str) -> str:
    """Name of one set of features: changes with the weights, the data or a setting."""
    what = {
        "version": CACHE_VERSION,
        "digest": backbone.digest,
        "facts": backbone.facts,
        "architecture": [backbone.architecture, backbone.kwargs],
        "normalisation": [backbone.mean, backbone.std],
        "data": [source.fingerprint(), source.limits],
        "size": size,
        "precision": precision,
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:24]


def read_cache(files: dict[str, Path], world: int) -> tuple[dict[str, Tensor], Tensor]:
    """What the cache holds. All processes must see a file, or none uses it (they work together)."""
    here = [part for part, path in files.items() if path.is_file()]
    if world > 1:
        everywhere: Any = gather_object([here])
        here = [part for part in here if all(part in other for other in everywhere)]
    found, labels = {}, torch.empty(0, dtype=torch.int64)
    for part in here:
        try:
            stored = load_file(files[part])
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{files[part]}: kept features cannot be read ({error}); delete the file"
            ) from None
        found[part], labels = stored["features"], stored["labels"]
    return found, labels


def write_cache(path: Path, features: Tensor, labels: Tensor) -> None:
    """Store one part atomically, so that a half-written file is never read."""
    data = save({"features": features.contiguous(), "labels": labels})
    try:
        # what killed processes left; the writing says what is wrong
        with contextlib.suppress(OSError):
            sweep(path.parent)
        write_atomically(path, lambda aside: aside.write_bytes(data))
    except InputError as error:
        raise InputError(f"features cannot be kept: {error}; or give another --cache") from None
