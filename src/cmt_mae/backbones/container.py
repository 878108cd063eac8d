"""Files of weights into named tensors, without running anything that a file may contain."""

from __future__ import annotations

import argparse
import json
import logging
import pathlib
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmt_mae.backbones.build import some
from cmt_mae.backbones.names import without_wrappers
from cmt_mae.backbones.own_file import read_safetensors, tensors_of
from cmt_mae.backbones.torchscript import is_torchscript, read_torchscript
from cmt_mae.core.errors import InputError
from cmt_mae.core.text import one_line, printable

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")
LIBRARY_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
"""Names that Hugging Face, timm and open_clip give the weights that a config.json beside them is about."""
MAX_JSON = 1 << 20
"""A configuration of more bytes than this is none."""

# Settings and scores that training scripts leave beside their weights: they carry data, no code.
HARMLESS: list[Any] = [
    argparse.Namespace,
    pathlib.PosixPath,
    np.dtype,
    np.ndarray,
    np.float64(0).__reduce__()[0],  # numpy's rebuild function of single numbers
    *(type(np.dtype(name)) for name in ("f2", "f4", "f8", "i4", "i8", "u1", "?")),
]


@dataclass
class Container:
    """What one file holds: `tree` maps names to tensors, or to dicts of them one level down."""

    path: Path
    tree: Mapping[Any, Any]
    metadata: dict[str, str] = field(default_factory=dict)
    """The safetensors header."""
    torchscript: bool = False
    """It is an archive of torch.jit.save, as OpenAI's CLIP files are."""
    config: dict[str, Any] = field(default_factory=dict)
    """config.json beside it (Hugging Face, timm), empty if none."""
    preprocessor: dict[str, Any] = field(default_factory=dict)
    """preprocessor_config.json beside it, empty if none."""
    open_clip: dict[str, Any] = field(default_factory=dict)
    """open_clip_config.json beside it, empty if none."""


def read_container(path: Path) -> Container:
    """Read a file of weights. InputError with one line when it is missing, damaged or hostile."""
    if path.suffix == ".npz":
        raise InputError(f"{path}: .npz (JAX) weights are not read; take timm's conversion by name")
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: no file of weights; known endings: {', '.join(SUFFIXES)}")
    try:
        if path.stat().st_size == 0:
            raise InputError(f"{path}: the file is empty; copy or download it again")
        if path.suffix == ".safetensors":
            container = Container(path, *read_safetensors(path))
        elif is_torchscript(path):
            container = Container(path, read_torchscript(path), torchscript=True)
        else:
            container = Container(path, read_torch(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {one_line(error)}") from error
    if _is_configured(path):
        container.config = read_json(path.parent / "config.json")
        container.preprocessor = read_json(path.parent / "preprocessor_config.json")
        container.open_clip = read_json(path.parent / "open_clip_config.json")
    return container


def _is_configured(path: Path) -> bool:
    """Whether configurations beside a file are of it, and not of another file of weights that lies there."""
    if path.name in LIBRARY_FILES:
        return True
    others = sum(p.suffix in SUFFIXES and p != path for p in path.parent.iterdir())
    if others and (path.parent / "config.json").is_file():
        logging.getLogger(__name__).warning(
            "%s: the config.json beside it is not used, as %d other file(s) of weights lie there too",
            printable(str(path)), others,
        )  # fmt: skip
    return not others


def read_torch(path: Path) -> Mapping[Any, Any]:
    """The dict in a torch.save file, by torch.load(weights_only=True) and nothing else."""
    try:
        with torch.serialization.safe_globals(HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols; what matters is raised
            tree = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = _asked_for(error)
        if reason:
            raise InputError(
                f"{path}: refused, it holds more than weights and could run code ({reason}); "
                "save its state dict as safetensors where you trust it"
            ) from error
        raise InputError(
            f"{path}: damaged or no file of weights; copy or download it again"
        ) from error
    except (
        OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError,
        AssertionError, zipfile.BadZipFile, MemoryError, OverflowError,
    ) as error:  # fmt: skip
        raise InputError(
            f"{path}: damaged or no torch file ({one_line(error)}); copy or download it again"
        ) from error
    if not isinstance(tree, Mapping):
        raise InputError(f"{path}: holds a {type(tree).__name__}, not a dict of tensors")
    return tree


def _asked_for(error: BaseException) -> str:
    """What the pickle wanted, out of torch's many lines; "" when it is merely unreadable."""
    for line in str(error).splitlines():
        for mark in ("Unsupported global:", "Trying to", "Unsupported class", "Can only"):
            if mark in line:
                return one_line(line[line.index(mark) :])[:100]
    return ""


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON object, {} when there is no such file or it is no object."""
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > MAX_JSON:
            raise InputError(f"{path}: larger than {MAX_JSON} bytes; this is no configuration")
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({one_line(error)})") from error
    return loaded if isinstance(loaded, dict) else {}


def choose(
    container: Container, key: str | None, order: tuple[str, ...]
) -> tuple[dict[str, Tensor], str]:
    """The tensors of one entry of a nested file without wrappers' names, and the entry ("" for a flat file).

    `key` names an entry; without it the first of `order` that is there is taken, else the file
    itself. A key that is no entry may be the first part of names in it (MoCo v3's
    "momentum_encoder"); then those are taken, without that part. InputError lists what there is.
    """
    tree, path = container.tree, container.path
    entries = {k: v for k, v in tree.items() if isinstance(k, str) and isinstance(v, Mapping)}
    if key in entries:
        return _only_tensors(entries[key], path), key
    name = next((n for n in order if n in entries), "")
    tensors = _only_tensors(entries[name] if name else tree, path)
    if key is None:
        return tensors, name
    part = {k.removeprefix(f"{key}."): v for k, v in tensors.items() if k.startswith(f"{key}.")}
    if part:
        return without_wrappers(part), key
    raise InputError(f"{path}: no entry '{key}'; there is {some(entries) or 'one flat dict'}")


def _only_tensors(tree: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    tensors = tensors_of(tree, path)
    if not tensors:
        raise InputError(f"{path}: no weights in it; it holds: {some(map(str, tree)) or 'nothing'}")
    return without_wrappers(tensors)
