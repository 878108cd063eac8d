"""Which numbers a setting can be, for settings whose range no other check knows."""

import math
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from cmt_mae.core.errors import InputError


@dataclass(frozen=True)
class Range:
    """From low to high, both in it unless ``above`` or ``below`` leave an end out."""

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False

    def holds(self, value: float) -> bool:
        """Whether the value lies in it."""
        over = value > self.low if self.above else value >= self.low
        return over and (value < self.high if self.below else value <= self.high)

    def words(self) -> str:
        """E.g. "a number of 1 or more"."""
        low = f"above {self.low:g}" if self.above else f"from {self.low:g}"
        if math.isfinite(self.high):
            return f"a number {low} {'and below' if self.below else 'to'} {self.high:g}"
        return f"a number {low}" if self.above else f"{self.low:g} or more"


ONE, ZERO, POSITIVE = Range(1), Range(0), Range(0, above=True)
SHARE, RATE = Range(0, 1), Range(0, 1, below=True)
# class of the settings -> field -> range; of a list, that of every number in it
RANGES: dict[str, dict[str, Range]] = {
    "PretrainConfig": {
        "epochs": POSITIVE,
        "batch_size": ONE,
        "stage1_share": SHARE,
        "stage1_epochs": ZERO,
        "alpha": SHARE,
        "alpha_mask": SHARE,
        "alpha_loss": SHARE,
        "alpha_ramp_epochs": ZERO,
        "seed": ZERO,
    },
    "DataConfig": {
        "std": POSITIVE,
        "max_bad": SHARE,
        "workers": Range(-1),
        "timeout_s": ZERO,
    },
    "StudentConfig": {
        "img_size": ONE,
        "patch_size": ONE,
        "in_chans": ONE,
        "width": ONE,
        "depth": ONE,
        "heads": ONE,
        "drop_path": RATE,
    },
    "TeacherConfig": {"last_k": ONE, "channels": ZERO, "view_size": ZERO, "project_to": ZERO},
    "MaskConfig": {
        "temperature": POSITIVE,
        "hint_share": SHARE,
        "square_side": ONE,
        "random_until_epoch": ZERO,
        "mix_random_start": SHARE,
        "mix_random_end": SHARE,
    },
    "TargetConfig": {"beta": POSITIVE, "momentum_last_k": ONE},
    "DecoderConfig": {"width": ONE, "depth": ONE, "heads": ONE},
    "MomentumConfig": {"start": SHARE, "end": SHARE},
    "OptimConfig": {
        "blr": ZERO,
        "weight_decay": ZERO,
        "betas": RATE,
        "warmup_epochs": ZERO,
        "min_lr": ZERO,
        "clip": ZERO,
    },
    "RuntimeConfig": {
        "micro_batch": ZERO,
        "log_every": ONE,
        "checkpoint_every": ZERO,
        "keep_last": ONE,
        "keep_every": ZERO,
        "picture_every": ZERO,
        "probe_every": ZERO,
        "max_nonfinite": ONE,
    },
    "DemoConfig": {
        "images": ONE,
        "epochs": POSITIVE,
        "batch_size": ONE,
        "seed": ZERO,
        "workers": ZERO,
    },
    "DoctorConfig": {
        "sample": ZERO,
        "images": ZERO,
        "seconds": POSITIVE,
        "watts": ZERO,
        "price_per_hour": ZERO,
    },
    "AppConfig": {"port": Range(0, 65535)},
    "KnnConfig": {
        "k": ONE,
        "temperature": POSITIVE,
        "size": ONE,
        "batch_size": ONE,
        "workers": ZERO,
        "timeout_s": ZERO,
        "seed": ZERO,
    },
    "LinearConfig": {
        "epochs": ONE,
        "batch_size": ONE,
        "blr": ZERO,
        "weight_decay": ZERO,
        "size": ONE,
        "forward_batch": ONE,
        "workers": ZERO,
        "timeout_s": ZERO,
        "seed": ZERO,
    },
    "DavisConfig": {
        "size": ONE,
        "context": ZERO,
        "radius": ZERO,
        "topk": ONE,
        "temperature": POSITIVE,
        "pictures": ZERO,
        "columns": ONE,
        "batch_size": ONE,
        "threads": ONE,
        "seed": ZERO,
    },
}
LENGTHS = {("OptimConfig", "betas"): 2}
"""Lists of a fixed number of values."""


def check_ranges(config: Any, prefix: str = "") -> None:
    """Raise InputError for the first number that its setting cannot be, in nested settings too."""
    kind = type(config).__name__
    known = RANGES.get(kind, {})
    for field in fields(config):
        name, value = f"{prefix}{field.name}", getattr(config, field.name)
        if is_dataclass(value):
            check_ranges(value, f"{name}.")
        values = value if isinstance(value, list | tuple) else [value]
        length = LENGTHS.get((kind, field.name), len(values))
        if len(values) != length:
            raise InputError(f"--{name} has {len(values)} values: give {length}")
        wanted = known.get(field.name)
        for one in values if wanted is not None else []:
            if isinstance(one, int | float) and wanted is not None and not wanted.holds(one):
                raise InputError(f"--{name} {one:g} is out of range: give {wanted.words()}")
