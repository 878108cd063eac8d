"""Which samples make which optimizer step, for any number of processes; and whole batches made in that order."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader

from cmt_mae.core.errors import InputError
from cmt_mae.core.settings import TIMEOUT_S

MAX_WORKERS = 1024  # processes; far above what any machine feeds, far below what stops one


def order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The epoch's order: a permutation of 0..n-1, int64."""
    key = np.array([seed, epoch], dtype=np.uint64)
    # Third counter word 1: a stream apart from those of the samples (see sample_rng).
    bits = np.random.Philox(key=key, counter=np.array([0, 0, 1, 0], dtype=np.uint64))
    return np.random.Generator(bits).permutation(n)


class Steps:
    """Endless sampler: the keys (epoch, indexes) of this rank's micro-batches from a position on.

    Position p is the p-th micro-batch of the rank since step 0. Step s uses rows
    [(s % per_epoch) * batch_size : + batch_size] of the order of epoch s // per_epoch; its
    accumulation a on rank r takes rows [(a * world + r) * micro_batch : + micro_batch] of those.
    """

    def __init__(
        self,
        n: int,
        seed: int,
        batch_size: int,
        micro_batch: int,
        rank: int,
        world: int,
        start_step: int,
    ) -> None:
        """batch_size: images of a step, over all ranks and accumulations. An epoch is n // batch_size steps; the
        rest of its order is dropped. Raises InputError: sizes that do not divide, fewer samples than a batch."""
        if micro_batch < 1 or batch_size % (world * micro_batch):
            raise InputError(
                f"batch size {batch_size} is not a multiple of processes x micro-batch = "
                f"{world} x {micro_batch}; change one of them"
            )
        if n < batch_size:
            raise InputError(f"{n} images are fewer than a batch of {batch_size}; lower it")
        self.n, self.seed, self.batch_size, self.micro_batch = n, seed, batch_size, micro_batch
        self.rank, self.world = rank, world
        self.accumulation = batch_size // (world * micro_batch)
        self.position = start_step * self.accumulation

    def after(self, done: int) -> Iterator[tuple[int, np.ndarray]]:
        """The keys that follow the first ``done`` ones."""
        per_epoch = self.n // self.batch_size
        step, accumulation = divmod(self.position + done, self.accumulation)
        epoch = -1
        while True:
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                permutation = order(self.n, self.seed, epoch)
            start = (step % per_epoch) * self.batch_size
            start += (accumulation * self.world + self.rank) * self.micro_batch
            yield epoch, permutation[start : start + self.micro_batch]
            accumulation += 1
            if accumulation == self.accumulation:
                step, accumulation = step + 1, 0


class Items(Protocol):
    """What workers make: one whole batch for each key."""

    def __getitem__(self, key: Any) -> Any: ...

    def names_of(self, key: Any) -> str:
        """The images of a key in a few words, for messages."""
        ...


def iterate(
    items: Items,
    keys_from: Callable[[int], Iterable[Any]],
    workers: int,
    pin_memory: bool = False,
    timeout_s: float = TIMEOUT_S,
) -> Generator[Any, None, None]:
    """items[key] for each key, in order, read ahead by `workers` processes (0: in this one).

    keys_from(n): the keys from the n-th on. What holds for processes: `workers.read_ahead`. With 0 workers there
    is no time limit. An item that is an InputError is raised here.
    """
    if timeout_s < 0:
        raise InputError(f"timeout_s {timeout_s:g} must not be negative (0: no time limit)")
    if not 0 <= workers <= MAX_WORKERS:
        raise InputError(f"workers {workers}: give 0 (in the main process) to {MAX_WORKERS}")
    if workers:
        from cmt_mae.data.workers import read_ahead

        yield from read_ahead(items, keys_from, workers, pin_memory, timeout_s)
        return
    loader: DataLoader[Any] = DataLoader(
        items,  # type: ignore[arg-type]  # a Dataset in all but name
        batch_size=None,
        sampler=keys_from(0),
        collate_fn=lambda item: item,  # torch's own would turn tuples into lists
        pin_memory=pin_memory,
        generator=torch.Generator(),  # without it torch would draw from the run's global stream
    )
    for item in loader:
        if isinstance(item, InputError):
            raise item
        yield item


def few(names: Sequence[str]) -> str:
    """The first three names."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
