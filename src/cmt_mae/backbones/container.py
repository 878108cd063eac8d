"""Files of weights into named tensors, without running anything that a file may contain."""

from __future__ import annotations

import argparse
import json
import pickle
import zipfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from cmt_mae.backbones.build import one_line, some
from cmt_mae.errors import InputError

SUFFIXES = {".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar"}
MAX_JSON = 1 << 20
"""A config.json of more bytes than this is not one."""


@dataclass
class Container:
    """What one file holds: `tree` maps names to tensors, or to dicts of them one level down."""

    path: Path
    tree: Mapping[str, Any]
    metadata: dict[str, str] = field(default_factory=dict)
    """The safetensors header."""
    torchscript: bool = False
    """An archive of torch.jit.save, as OpenAI's CLIP files are."""
    config: dict[str, Any] = field(default_factory=dict)
    """config.json beside it (Hugging Face, timm), empty if none."""
    preprocessor: dict[str, Any] = field(default_factory=dict)
    """preprocessor_config.json beside it, empty if none."""
    open_clip: dict[str, Any] = field(default_factory=dict)
    """open_clip_config.json beside it, empty if none."""


def read_container(path: Path) -> Container:
    """Read a file of weights. InputError with one line when it is missing, damaged or hostile."""
    from cmt_mae.backbones.torchscript import is_torchscript, read_torchscript

    if path.suffix == ".npz":
        raise InputError(f"{path}: .npz (JAX) weights are not read; take timm's conversion by name")
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: not a file of weights; known are {', '.join(sorted(SUFFIXES))}")
    try:
        if path.stat().st_size == 0:
            raise InputError(f"{path}: the file is empty; copy or download it again")
        if path.suffix == ".safetensors":
            tree, metadata = read_safetensors(path)
            container = Container(path, tree, metadata)
        elif is_torchscript(path):
            container = Container(path, read_torchscript(path), torchscript=True)
        else:
            container = Container(path, read_torch(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {one_line(error)}") from error
    folder = path.parent
    container.config = read_json(folder / "config.json")
    container.preprocessor = read_json(folder / "preprocessor_config.json")
    container.open_clip = read_json(folder / "open_clip_config.json")
    return container


def read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and header of a .safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{path}: damaged or no safetensors file ({one_line(error)}); copy or download it again"
        ) from error


def read_torch(path: Path) -> Mapping[str, Any]:
    """The dict in a torch.save file, by torch.load(weights_only=True) and nothing else.

    Settings that training scripts leave beside their weights (argparse.Namespace, numpy numbers)
    are let in: they carry data and no code.
    """
    harmless: list[Any] = [argparse.Namespace, np.dtype, np.ndarray, _numpy_scalar()]
    harmless += [type(np.dtype(t)) for t in ("f2", "f4", "f8", "i4", "i8", "u1", "?")]
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.serialization.safe_globals(harmless))
            tree = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: refused, it asks to run code or holds more than weights "
            f"({_refusal(error)}); save its state dict with safetensors"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError,
            zipfile.BadZipFile, UnicodeDecodeError, AssertionError) as error:
        raise InputError(
            f"{path}: damaged or no torch file ({one_line(error)}); copy or download it again"
        ) from error
    if not isinstance(tree, Mapping):
        raise InputError(f"{path}: holds a {type(tree).__name__}, not a dict of tensors")
    return tree


def _numpy_scalar() -> Any:
    """numpy's rebuild function of single numbers; it moved in numpy 2."""
    core = getattr(np, "_core", None) or np.core
    return core.multiarray.scalar


def _refusal(error: BaseException) -> str:
    """The telling part of torch's many lines: what was asked for."""
    lines = [line.strip() for line in str(error).splitlines()]
    for line in lines:
        for mark in ("Unsupported global:", "Unsupported operand", "Unsupported class"):
            if mark in line:
                return one_line(ValueError(line[line.index(mark) :].split(" was not")[0]))
    return one_line(ValueError(lines[0] if lines else "no reason given"))[:120]


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON object, {} when there is no such file. InputError when it is none."""
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > MAX_JSON:
            raise InputError(f"{path}: larger than {MAX_JSON} bytes; this is no configuration")
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({one_line(error)})") from error
    return loaded if isinstance(loaded, dict) else {}


def tensors_of(tree: Mapping[Any, Any]) -> dict[str, torch.Tensor]:
    """The entries of a dict that are tensors under a name (floats and integers alike)."""
    return {k: v for k, v in tree.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}


def choose(container: Container, key: str | None, order: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The tensors of one entry of a nested file: the one asked for, else the first of `order`.

    A flat file of tensors is its own only entry. InputError lists the entries when there is none.
    """
    tree = container.tree
    nested = {k: v for k, v in tree.items() if isinstance(v, Mapping) and tensors_of(v)}
    if key is not None:
        if key not in nested:
            found = some(str(k) for k in nested) or "none, it is one flat dict"
            raise InputError(f"{container.path}: no entry '{key}'; its entries are: {found}")
        return tensors_of(nested[key])
    for name in order:
        if name in nested:
            return tensors_of(nested[name])
    flat = tensors_of(tree)
    if not flat:
        found = some(str(k) for k in tree) or "nothing"
        raise InputError(f"{container.path}: no weights found; it holds: {found}")
    return flat
