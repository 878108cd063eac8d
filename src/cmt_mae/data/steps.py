"""Which samples make which optimizer step: it follows from (seed, step), for any rank count."""

from collections.abc import Iterator

import numpy as np


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
        self, n: int, seed: int, batch_size: int, micro_batch: int, rank: int, world: int
    ) -> None:
        self.n, self.seed, self.batch_size, self.micro_batch = n, seed, batch_size, micro_batch
        self.rank, self.world = rank, world
        self.accumulation = batch_size // (world * micro_batch)
        self.position = 0

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        return self.after(0)

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
