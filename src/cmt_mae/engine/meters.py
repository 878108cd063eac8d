"""Running means that stay on the device until they are read."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor


@dataclass(frozen=True)
class Bad:
    """What is known of a number that was not finite."""

    count: int
    """How often in the window, over all processes."""
    first: int
    """The step of the first time, as it was given to ``add``."""


class Meters:
    """Means of named numbers over a window of steps. ``add`` never waits for the device; ``read`` does.

    A non-finite number does not poison the mean: it is counted apart, under its name. With an accelerator
    the numbers of all processes are taken together, and ``read`` and ``state_dict`` are called by all of
    them; all have the same names.
    """

    def __init__(self, device: torch.device, accelerator: Accelerator | None = None) -> None:
        self.device = device
        self.accelerator = accelerator
        self.places: dict[str, int] = {}  # name -> row of the table
        # weighted sum, weight, non-finite count, step of the first non-finite one or infinity
        self.table = torch.empty((0, 4), device=device)
        self._known: dict[tuple[str, ...], Tensor] = {}  # names of a call -> their places

    @property
    def rows(self) -> dict[str, Tensor]:
        """name -> [weighted sum, weight, non-finite count]."""
        return {name: self.table[place, :3] for name, place in self.places.items()}

    @torch.no_grad()
    def add(self, numbers: dict[str, Tensor], step: int = 0, share: float = 1.0) -> None:
        """Scalars on the device, by name, of this step: a handful of operations for all of them.

        share: of the step that they stand for on this process, e.g. of one micro-batch among several. So
        every step weighs alike, also where processes or micro-batches change in the middle of a window.
        """
        if not numbers:
            return
        places = self._places(tuple(numbers))
        values = torch.stack([number.detach().float() for number in numbers.values()])
        finite = torch.isfinite(values)
        weights = finite.float() * (share / self._processes())
        sums = torch.stack(
            [torch.where(finite, values, 0.0) * weights, weights, (~finite).float()], 1
        )
        first = torch.where(finite, math.inf, float(step))
        self.table[:, :3].index_add_(0, places, sums)
        self.table[places, 3] = torch.minimum(self.table[places, 3], first)

    def _places(self, names: tuple[str, ...]) -> Tensor:
        """Rows of these names, new ones at the end."""
        if names not in self._known:
            new = [name for name in names if name not in self.places]
            self.places |= {name: len(self.places) + i for i, name in enumerate(new)}
            empty = torch.tensor([[0.0, 0.0, 0.0, math.inf]], device=self.device)
            self.table = torch.cat([self.table, empty.expand(len(new), -1)])
            self._known[names] = torch.tensor([self.places[n] for n in names], device=self.device)
        return self._known[names]

    def _forget(self) -> None:
        self.places, self._known = {}, {}
        self.table = torch.empty((0, 4), device=self.device)

    def read(self) -> tuple[dict[str, float], dict[str, Bad]]:
        """(means, the numbers that were not finite) by name, and forget them. One wait for the device.

        A number that was never finite has the mean nan.
        """
        if not self.places:
            return {}, {}
        names, table = list(self.places), self.table
        self._forget()
        each = table[None]
        if self._processes() > 1:
            assert self.accelerator is not None
            each = self.accelerator.gather(each)
        sums, firsts = each[..., :3].sum(0).tolist(), each[..., 3].amin(0).tolist()
        means = {n: (s / c if c else math.nan) for n, (s, c, _) in zip(names, sums, strict=True)}
        bad = {
            n: Bad(int(count), int(first))
            for n, (_, _, count), first in zip(names, sums, firsts, strict=True)
            if count
        }
        return means, bad

    def state_dict(self) -> list[dict[str, Any]]:
        """What a checkpoint in the middle of a window needs: the rows of each process."""
        own = dict(zip(self.places, self.table.tolist(), strict=True))
        if self._processes() == 1:
            return [own]
        everyone: list[dict[str, Any]] = gather_object([own])
        return everyone

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Continue a window. With another number of processes the first one takes over what was counted."""
        rank = 0 if self.accelerator is None else self.accelerator.process_index
        if len(state) == self._processes():
            own = state[rank]
        else:
            own = {name: [0.0, 0.0, 0.0, math.inf] for name in state[0]}
            for part in state if rank == 0 else ():
                for name, (*sums, first) in part.items():
                    before = own[name]
                    added = [a + b for a, b in zip(before[:3], sums, strict=True)]
                    own[name] = [*added, min(before[3], first)]
        self._forget()
        self.places = {name: place for place, name in enumerate(own)}
        if own:
            self.table = torch.tensor(list(own.values()), device=self.device)

    def _processes(self) -> int:
        return 1 if self.accelerator is None else self.accelerator.num_processes
