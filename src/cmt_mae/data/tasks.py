"""Batches of labelled samples for the training evaluations, exact over processes, workers and resumes.

As in pre-training (loader.py), what a sample is follows from (seed, epoch, index) alone, and which
samples make a step from (seed, step) alone.
"""

from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np

from cmt_mae.core.errors import InputError
from cmt_mae.core.settings import TIMEOUT_S
from cmt_mae.data.crops import sample_rng
from cmt_mae.data.source import BadImage
from cmt_mae.data.steps import Steps, few, iterate

Sample = Callable[[int, np.random.Generator], Any]
"""(index, the sample's own random stream) -> the sample. Raises InputError or BadImage."""
Collate = Callable[[list[Any]], Any]
"""Samples -> one micro-batch."""


class _Micros:
    """Item: one micro-batch, given (epoch, indexes). An InputError is returned (workers.iterate)."""

    def __init__(self, sample: Sample, collate: Collate, seed: int) -> None:
        self.sample, self.collate, self.seed = sample, collate, seed

    def names_of(self, key: tuple[int, np.ndarray]) -> str:
        return "images number " + few([str(index) for index in key[1][:4].tolist()])

    def __getitem__(self, key: tuple[int, np.ndarray]) -> Any:
        epoch, indexes = key
        try:
            return self.collate(
                [self.sample(i, sample_rng(self.seed, epoch, i)) for i in indexes.tolist()]
            )
        except InputError as error:
            return error
        except BadImage as error:
            return InputError(f"{error}; an evaluation skips no image, so fix or remove it")


def train_batches(
    sample: Sample,
    collate: Collate,
    n: int,
    *,
    seed: int,
    batch_size: int,
    micro_batch: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    start_step: int = 0,
    pin_memory: bool = False,
    timeout_s: float = TIMEOUT_S,
) -> Generator[Any, None, None]:
    """Endless micro-batches of this rank from optimizer step ``start_step`` on.

    n: number of samples, at least ``batch_size``, the images of a step over all ranks and
    accumulations. An epoch is n // batch_size steps; the rest of its order is dropped. timeout_s: a
    worker silent for so long counts as hung (0: never).
    Raises InputError: sizes that do not divide, fewer samples than a batch, a broken sample.
    """
    steps = Steps(n, seed, batch_size, micro_batch, rank, world, start_step)
    yield from iterate(_Micros(sample, collate, seed), steps.after, workers, pin_memory, timeout_s)


def each_once(
    sample: Sample,
    collate: Collate,
    indexes: Sequence[int],
    *,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    timeout_s: float = TIMEOUT_S,
) -> Generator[Any, None, None]:
    """Every one of ``indexes`` exactly once over all ranks, in order; the last batch may be smaller.

    The random stream of a sample is that of seed 0, epoch 0: an evaluation draws nothing that changes.
    """
    mine = np.asarray(indexes, dtype=np.int64)[rank::world]
    keys = [(0, mine[i : i + batch_size]) for i in range(0, len(mine), batch_size)]
    items = _Micros(sample, collate, 0)
    yield from iterate(items, lambda done: keys[done:], workers, timeout_s=timeout_s)
