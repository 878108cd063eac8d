"""TorchScript archives."""
from pathlib import Path
from typing import Any


def is_torchscript(path: Path) -> bool:
    return False


def read_torchscript(path: Path) -> dict[str, Any]:
    return {}
