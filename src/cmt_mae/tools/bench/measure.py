"""Images per second, and the peak of memory."""

import contextlib
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from cmt_mae.data.loader import Batch
from cmt_mae.engine.processes import peak_memory
from cmt_mae.engine.trainer import Trainer
from cmt_mae.tools.bench.peak import synchronise


def spread(numbers: list[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(numbers), "low": min(numbers), "high": max(numbers)}


def rates(
    trainer: Trainer, batches: Iterator[Batch], step: int, images: int, rounds: int, steps: int
) -> dict[str, Any]:
    """Images per second of this process: each round times ``steps`` steps with one wait for the device."""
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
    """Measure the peak of memory from here on; False where the system cannot: then it is the whole process's."""
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
