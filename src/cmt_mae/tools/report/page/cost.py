"""What a run has cost: images a second, hours, FLOP/s, MFU, memory; energy where it was counted."""

import math
import statistics
from typing import Any

from cmt_mae.core.run_reader import RunRecord, section
from cmt_mae.core.text import duration

Pairs = list[tuple[str, str]]


def cost(record: RunRecord) -> Pairs:
    """Label and text of everything that can be said; only what was measured."""
    rows = [row for row in record.log_rows() if row.get("images_per_second", 0) > 0]
    if not rows:
        return []
    pairs = [("Images a second", speed(record, rows))]
    seconds = training_seconds(record, rows)
    if seconds:
        pairs.append(
            ("Time", f"{duration(seconds)} in all, k-NN, pictures and checkpoints included")
        )
        if not record.finished and record.total_steps:
            left = (record.total_steps - record.last_step) * seconds / max(1, record.last_step)
            pairs.append(("Still to go", f"about {duration(left)} at this speed"))
    waits = [row["data_wait_share"] for row in rows if "data_wait_share" in row]
    if waits:
        pairs.append(("Waiting for data", f"{statistics.fmean(waits):.1%} of the time"))
    pairs += arithmetic(record, rows)
    memory = [row["peak_memory_gb"] for row in rows if "peak_memory_gb" in row]
    if memory:
        of = (
            "the GPU"
            if section(record.facts, "placement").get("device") == "cuda"
            else "the process"
        )
        pairs.append(("Peak memory", f"{max(memory):.2f} GB of {of}"))
    joules = [row["gpu_joules"] for row in record.rows if row.get("gpu_joules", 0) > 0]
    if joules:
        pairs.append(("Energy", f"{sum(joules) / 3.6e6:.3g} kWh by the GPUs' own counters (NVML)"))
    return pairs


def by_stage(record: RunRecord, rows: list[dict[str, float]]) -> dict[str, list[dict[str, float]]]:
    """The lines of each stage; ``one`` alone where the run has one stage."""
    if not record.switch_step:
        return {"one": rows}
    parts = {
        "one": [row for row in rows if row["step"] <= record.switch_step],
        "two": [row for row in rows if row["step"] > record.switch_step],
    }
    return {name: part for name, part in parts.items() if part}


def rate(rows: list[dict[str, float]]) -> float:
    """Median of images a second: lines with a k-NN measurement or a checkpoint in them do not move it."""
    return statistics.median(row["images_per_second"] for row in rows)


def speed(record: RunRecord, rows: list[dict[str, float]]) -> str:
    """Median of each stage."""
    parts = by_stage(record, rows)
    if len(parts) == 1:
        return f"{rate(rows):.4g} (median)"
    return (
        ", ".join(f"{rate(part):.4g} in stage {name}" for name, part in parts.items())
        + " (medians)"
    )


def training_seconds(record: RunRecord, rows: list[dict[str, float]]) -> float:
    """Wall time of all steps that count: images / (images a second), line by line. 0 where it is not known."""
    batch = record.setting("batch_size")
    if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
        return 0.0
    total, before = 0.0, 0.0
    for row in rows:
        total += max(0.0, row["step"] - before) * batch / row["images_per_second"]
        before = row["step"]
    return total


def arithmetic(record: RunRecord, rows: list[dict[str, float]]) -> Pairs:
    """FLOP/s by the count of multiplications in run.json, and MFU where the machine's peak is known."""
    counts = section(section(record.facts, "cost"), "flop_per_image")
    peak, how = peak_of(record)
    processes = section(record.facts, "placement").get("processes")
    devices = processes if isinstance(processes, int) and processes > 0 else 1
    speeds, shares = [], []
    parts = by_stage(record, rows)
    for name, part in parts.items():
        flop = _positive(counts.get(name))
        if flop is None:
            continue
        done = rate(part) * flop
        stage = f" in stage {name}" if record.switch_step else ""
        speeds.append(f"{flops(done)}{stage}")
        if peak:
            shares.append(f"{done / (peak * devices):.1%}{stage}")
    pairs: Pairs = []
    if speeds:
        pairs.append(("Arithmetic", f"{', '.join(speeds)} (multiplications of matrices alone)"))
    if shares:
        pairs.append(("MFU", f"{', '.join(shares)} of {flops(peak)} a device, {how}"))
    elif speeds:
        pairs.append(
            (
                "MFU",
                "not known: the peak of this machine was not measured (cmt-mae bench --recipe "
                "RUN/config.yaml --out RUN does it)",
            )
        )
    return pairs


def peak_of(record: RunRecord) -> tuple[float, str]:
    """FLOP/s of one device and where the number is from; 0 where nobody knows."""
    for source in (section(record.facts, "cost"), record.bench):
        peak = section(source, "peak")
        known = _positive(peak.get("flops"))
        if known is not None:
            return known, str(peak.get("how", "how is not said"))[:200]
    return 0.0, ""


def flops(value: float) -> str:
    """``1.23 TFLOP/s``."""
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G")):
        if value >= size:
            return f"{value / size:.3g} {unit}FLOP/s"
    return f"{value / 1e6:.3g} MFLOP/s"


def _positive(number: Any) -> float | None:
    good = isinstance(number, int | float) and not isinstance(number, bool)
    return float(number) if good and math.isfinite(number) and number > 0 else None
