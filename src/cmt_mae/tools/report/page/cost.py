"""What a run has cost: images per second, hours, memory; energy where it was counted."""

import statistics

from cmt_mae.core.run_reader import RunRecord, section
from cmt_mae.core.text import duration

Pairs = list[tuple[str, str]]


def cost(record: RunRecord) -> Pairs:
    """Label and text of everything that can be said; only what was measured."""
    rows = [row for row in record.log_rows() if row.get("images_per_second", 0) > 0]
    if not rows:
        return []
    pairs = [("Images per second", speed(record, rows))]
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


def speed(record: RunRecord, rows: list[dict[str, float]]) -> str:
    """Median of each stage: lines with a k-NN measurement or a checkpoint in them do not move it."""
    switch = record.switch_step or 0
    parts = {
        "one": [r for r in rows if r["step"] <= switch],
        "two": [r for r in rows if r["step"] > switch],
    }
    medians = {
        name: f"{statistics.median(r['images_per_second'] for r in part):.4g}"
        for name, part in parts.items()
        if part
    }
    if len(medians) == 1:
        return f"{next(iter(medians.values()))} (median)"
    return ", ".join(f"{rate} in stage {name}" for name, rate in medians.items()) + " (medians)"


def training_seconds(record: RunRecord, rows: list[dict[str, float]]) -> float:
    """Wall time of all steps that count: images / (images per second), line by line. 0 where it is not known."""
    batch = record.setting("batch_size")
    if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
        return 0.0
    total, before = 0.0, 0.0
    for row in rows:
        total += max(0.0, row["step"] - before) * batch / row["images_per_second"]
        before = row["step"]
    return total
