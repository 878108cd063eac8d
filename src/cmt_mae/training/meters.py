"""Running means that stay on the device until they are read."""

import math
from typing import Any

import torch
from torch import Tensor


class Meters:
    """Means of named numbers over a window of steps. ``add`` never waits for the device; ``read`` does.

    A non-finite number does not poison the mean: it is counted apart, under its name.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rows: dict[str, Tensor] = {}  # name -> [sum, count, non-finite count]

    @torch.no_grad()
    def add(self, numbers: dict[str, Tensor]) -> None:
        """Scalars on the device, by name."""
        for name, number in numbers.items():
            finite = torch.isfinite(number)
            row = torch.stack(
                [torch.where(finite, number, 0.0).float(), finite.float(), (~finite).float()]
            )
            self.rows[name] = self.rows[name] + row if name in self.rows else row

    def read(self) -> tuple[dict[str, float], dict[str, int]]:
        """(means, counts of non-finite numbers above zero) by name, and forget them. One wait for the device."""
        if not self.rows:
            return {}, {}
        table = torch.stack(list(self.rows.values())).tolist()
        names = list(self.rows)
        self.rows = {}
        means = {n: (s / c if c else math.nan) for n, (s, c, _) in zip(names, table, strict=True)}
        return means, {n: int(bad) for n, (_, _, bad) in zip(names, table, strict=True) if bad}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint in the middle of a window needs."""
        return {name: row.tolist() for name, row in self.rows.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a window."""
        self.rows = {name: torch.tensor(row, device=self.device) for name, row in state.items()}
