"""A mask rule or target that a script passes in: how wide it is, and what a run records of it."""

import hashlib
import inspect
from collections.abc import Callable
from typing import Any

import torch

from cmt_mae.core.errors import InputError
from cmt_mae.method.cmtmae import TargetFunction
from cmt_mae.pretraining.settings import PretrainConfig


def target_width(config: PretrainConfig, target: TargetFunction | None) -> int:
    """Channels of a target's features, by trying it on one black image; 0 without one. Raises InputError."""
    if target is None:
        return 0
    if config.target.source != "pixel":
        raise InputError(
            f"a target of your own takes the place of pixels: set target.source {config.target.source} to pixel"
        )
    rows, columns = config.student.grid()
    found = target(torch.zeros(1, config.student.in_chans, *config.student.size()))
    if found.ndim != 3 or found.shape[:2] != (1, rows * columns):
        raise InputError(
            f"the target gave {tuple(found.shape)} for one image: it must give (1, {rows * columns}, channels), a "
            "feature for each patch in raster order"
        )
    return int(found.shape[2])


def source_of(function: Callable[..., Any] | None) -> str | None:
    """Name and hash of the source of a function that was passed in. Raises InputError where it has none."""
    if function is None:
        return None
    name = getattr(function, "__name__", type(function).__name__)
    try:
        text = inspect.getsource(function if hasattr(function, "__name__") else type(function))
    except (OSError, TypeError):
        raise InputError(
            f"{name} has no source to record: define it in a file, so that the run can be continued with it"
        ) from None
    return f"{name} {hashlib.sha256(text.encode()).hexdigest()[:16]}"
