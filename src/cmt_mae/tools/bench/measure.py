"""Seconds by part of a step, rates, the peak of the machine and of its memory."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from cmt_mae.data.loader import Batch
from cmt_mae.engine import trainer as engine_trainer
from cmt_mae.engine.processes import peak_memory
from cmt_mae.engine.trainer import Trainer
from cmt_mae.method import cmtmae, frozen
from cmt_mae.pretraining.task import Pretraining
from cmt_mae.tools.bench.peak import synchronise

PARTS = (
    "wait", "prepare", "teacher", "momentum", "mask", "targets", "encoder", "decoder", "backward",
    "optimizer", "ema", "other",
)  # fmt: skip


def spread(numbers: list[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(numbers), "low": min(numbers), "high": max(numbers)}


class Spans:
    """Seconds by name; a span inside another counts for itself only. The device is waited for at each border."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Time what happens inside under this name."""
        self._book()
        self._open.append(name)
        try:
            yield
        finally:
            self._book()
            self._open.pop()

    def _book(self) -> None:
        """Credit the time since the last border to the span that is open now."""
        synchronise(self.device)
        now = time.perf_counter()
        if self._open:
            name = self._open[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now

    def timed(self, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Wrap a function so that its calls are spans."""

        def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: Any, **options: Any) -> Any:
                with self.span(name):
                    return function(*arguments, **options)

            return run

        return wrap

    def by_network(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a method of ``CachedForwards`` whose first argument names the network it runs."""

        def run(look: Any, name: str, *arguments: Any, **options: Any) -> Any:
            with self.span(name):
                return function(look, name, *arguments, **options)

        return run


@contextmanager
def replaced(
    owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """``owner.name`` wrapped, for a while."""
    own, before = name in vars(owner), getattr(owner, name)
    setattr(owner, name, wrap(before))
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


@contextmanager
def watched(trainer: Trainer, spans: Spans) -> Iterator[None]:
    """Time the parts of every step of ``trainer`` (not its results: the same functions run)."""
    timed, task = spans.timed, trainer.task
    assert isinstance(task, Pretraining)
    wrapped: list[tuple[Any, str, Callable[..., Any]]] = [
        (task, "to_device", timed("prepare")),
        (frozen.CachedForwards, "state", spans.by_network),
        (frozen.CachedForwards, "features", spans.by_network),
        (frozen.CachedForwards, "attention", timed("mask")),
        (frozen.FrozenNetworks, "_scores", timed("mask")),
        (frozen, "sample_mask", timed("mask")),
        (frozen.FrozenNetworks, "_targets", timed("targets")),
        (trainer, "model", timed("decoder")),  # less the encoder inside it
        (cmtmae, "encode_visible", timed("encoder")),
        (trainer.accelerator, "backward", timed("backward")),
        (trainer, "_clip_gradients", timed("optimizer")),
        (engine_trainer, "skip_unless", timed("optimizer")),
        (task.optimizer, "step", timed("optimizer")),
        (task.optimizer, "zero_grad", timed("optimizer")),
        (task.frozen_networks, "update_momentum", timed("ema")),
    ]
    with ExitStack() as stack:
        for owner, name, wrap in wrapped:
            stack.enter_context(replaced(owner, name, wrap))
        yield


def watched_batches(batches: Iterator[Batch], spans: Spans) -> Iterator[Batch]:
    """The same batches; the time until each is there counts as ``wait``."""
    while True:
        with spans.span("wait"):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def shares(trainer: Trainer, batches: Iterator[Batch], step: int, count: int) -> dict[str, Any]:
    """Share of each part in ``count`` steps (after one that is not counted), and the seconds of a step."""
    spans = Spans(trainer.device)
    seen = watched_batches(batches, spans)
    with watched(trainer, spans):
        trainer.step(seen, step)
        spans.seconds.clear()
        for _ in range(count):
            with spans.span("other"):
                trainer.step(seen, step)
    total = sum(spans.seconds.values())
    return {
        "step_seconds": total / count,
        "shares": {part: spans.seconds.get(part, 0.0) / total for part in PARTS},
        "steps": count,
    }


def rates(
    trainer: Trainer, batches: Iterator[Batch], step: int, images: int, rounds: int, steps: int
) -> dict[str, Any]:
    """Images a second of this process: each round times ``steps`` steps with one wait for the device."""
    for _ in range(2):  # allocations, kernels chosen, loader filled
        trainer.step(batches, step)
    seconds, waits = [], []
    for _ in range(rounds):
        synchronise(trainer.device)
        trainer.waited, begin = 0.0, time.perf_counter()
        for _ in range(steps):
            trainer.step(batches, step)
        synchronise(trainer.device)
        seconds.append(time.perf_counter() - begin)
        waits.append(trainer.waited)
    return {
        "images_per_second": spread([images * steps / s for s in seconds]),
        "step_seconds": spread([s / steps for s in seconds]),
        "data_wait_share": sum(waits) / sum(seconds),
        "rounds": rounds,
        "steps_per_round": steps,
        "round_seconds": seconds,
    }


def forget_peak(device: torch.device) -> bool:
    """Start the peak of memory anew; False where the system cannot (then it is that of the whole process)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmHWM") is not None
    return False


def peak_gb(device: torch.device) -> float:
    """Peak of memory in GB since ``forget_peak``: of the GPU, or resident memory of this process on a CPU."""
    high = _status("VmHWM") if device.type != "cuda" else None
    return peak_memory(device) if high is None else high


def _status(name: str) -> float | None:
    """A number of /proc/self/status in GB, None where there is none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024 / 1e9
    return None
