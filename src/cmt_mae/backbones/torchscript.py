"""TorchScript archives (OpenAI's CLIP files) read as data.

`torch.jit.load` compiles and may run what the archive brings along. Here only the weights are
read: the archive is a zip whose `data.pkl` names the tensors and whose `data/N` hold their bytes.
The pickle is read by an unpickler that can make nothing but tensors, lists and empty holders.
"""

from __future__ import annotations

import collections
import io
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmt_mae.core.errors import InputError
from cmt_mae.core.text import one_line

MAX_PICKLE = 64 << 20
"""Bytes of a data.pkl beyond which it is no list of weights; CLIP's has about 0.1 MB."""

STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class _Parts:
    """Stands for an object of any class of the archive: its attributes and nothing else."""

    def __setstate__(self, state: Any) -> None:
        self.parts = dict(state) if isinstance(state, dict) else {}


class _Reader(pickle.Unpickler):
    """Unpickler of data.pkl: refuses every class that is not listed here."""

    def __init__(self, archive: zipfile.ZipFile, root: str, where: str) -> None:
        super().__init__(io.BytesIO(_entry(archive, f"{root}data.pkl", where, MAX_PICKLE)))
        self.archive, self.root, self.where = archive, root, where
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Parts
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._tensor
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch.jit._pickle" and name in _CONTAINERS:
            return _CONTAINERS[name]
        raise InputError(
            f"{self.where}: refused, the archive needs '{module}.{name}', which no weights need"
        )

    def persistent_load(self, pid: Any) -> Tensor:
        """('storage', type, key, device, count) -> flat tensor of the bytes in data/key."""
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise ValueError("unknown kind of storage")
        if not re.fullmatch(r"[A-Za-z0-9_.]{1,64}", str(key)) or not isinstance(count, int):
            raise ValueError("malformed name of a storage")
        if key not in self.storages:
            size = count * dtype.itemsize
            data = _entry(self.archive, f"{self.root}data/{key}", self.where, size)
            if len(data) != size:
                raise ValueError(f"storage {key} has {len(data)} bytes instead of {size}")
            flat = torch.frombuffer(bytearray(data), dtype=dtype) if size else torch.empty(0)
            self.storages[key] = flat.to(dtype)
        return self.storages[key]

    def _tensor(
        self, storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
    ) -> Tensor:
        return storage.as_strided(size, stride, offset)  # torch checks the bounds


def _same(value: Any, *_: Any) -> Any:
    return value


# Typed lists and dicts of TorchScript, whose type does not matter here.
_CONTAINERS = dict.fromkeys(
    ["build_intlist", "build_doublelist", "build_boollist", "build_tensorlist", "restore_type_tag"],
    _same,
)


def _entry(archive: zipfile.ZipFile, name: str, where: str, limit: int) -> bytes:
    """One entry of the zip, whose size is known to be sane before it is read."""
    info = archive.getinfo(name)
    if info.file_size > limit or info.compress_type != zipfile.ZIP_STORED:
        raise InputError(f"{where}: entry {name} is compressed or larger than its weights; refused")
    return archive.read(info)


def is_torchscript(path: Path) -> bool:
    """True for a zip of torch.jit.save (it has constants.pkl); False for all else."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(n.endswith("/constants.pkl") for n in archive.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError):
        return False


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Parameters and buffers of a TorchScript archive by their dotted names; nothing is run.

    InputError when the archive is damaged or needs anything beyond tensors and plain values.
    """
    where = str(path)
    try:
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if n.endswith("/data.pkl")]
            if len(names) != 1:
                raise ValueError("no data.pkl")
            top = _Reader(archive, names[0].removesuffix("data.pkl"), where).load()
        state: dict[str, Tensor] = {}
        _collect(top, "", state, set())
    except (
        pickle.UnpicklingError, zipfile.BadZipFile, EOFError, KeyError, IndexError, ValueError,
        TypeError, AttributeError, RuntimeError, NotImplementedError, MemoryError, OverflowError,
    ) as error:  # fmt: skip
        raise InputError(f"{where}: damaged TorchScript archive ({one_line(error)})") from error
    return state


def _collect(node: Any, prefix: str, state: dict[str, Tensor], seen: set[int]) -> None:
    """Tensors below a holder, each holder once; attribute names joined by dots."""
    if not isinstance(node, _Parts) or id(node) in seen:
        return
    seen.add(id(node))
    for name, value in getattr(node, "parts", {}).items():
        if isinstance(value, Tensor):
            state[f"{prefix}{name}"] = value
        else:
            _collect(value, f"{prefix}{name}.", state, seen)
