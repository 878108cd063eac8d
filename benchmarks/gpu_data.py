"""Images as tar shards and packed, and the step fed by the real loader."""

import time
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks.gpu_photos import PHOTO, make_tars
from cmt_mae.data.loader import CropSettings, pretrain_batches
from cmt_mae.data.pack import PackConfig, pack
from cmt_mae.data.sources import open_source
from cmt_mae.method.masking import noise_length
from cmt_mae.pretraining import assemble
from cmt_mae.pretraining.stepping import Stepper
from cmt_mae.tools.bench import measure


def make_data(folder: Path, count: int, workers: int, photos: str, quick: bool) -> dict[str, Any]:
    """{"tar": path, "packed": path, "mean_bytes": of a photo, "seconds": to make}. photos: use these instead."""
    begin = time.perf_counter()
    size = (64, 48) if quick else PHOTO
    source, mean = photos, None
    if not photos:
        source = str(folder / "tar")
        mean = make_tars(folder / "tar", count, max(1, workers), size) / count
    packed = folder / "packed"
    pack(PackConfig(data=source, out=str(packed), size=32 if quick else 256, workers=workers))
    if not (packed / "images.npy").exists():  # it had train and val
        packed = packed / "train"
    return {
        "tar" if not photos else "photos": source,
        "packed": str(packed),
        "mean_bytes": mean,
        "seconds": time.perf_counter() - begin,
    }


def loader_rate(
    path: str, crops: CropSettings, batch: int, workers: int, count: int
) -> dict[str, Any]:
    """Images/s of the loader alone, after the first batch: what the workers can deliver."""
    source = open_source(path)
    batch = min(batch, len(source))
    stream = pretrain_batches(
        source, crops, noise_length=196, seed=0, batch_size=batch, micro_batch=batch, workers=workers
    )  # fmt: skip
    with closing(stream) as batches:  # type: ignore[type-var]
        for _ in range(1 + workers):  # workers make whole batches, side by side
            next(batches)
        begin = time.perf_counter()
        for _ in range(count):
            next(batches)
        seconds = time.perf_counter() - begin
    return {
        "images_per_second": batch * count / seconds,
        "workers": workers,
        "batch": batch,
        "batches": count,
        "per_worker": batch * count / seconds / max(1, workers),
    }


def fed_step(
    stepper: Stepper, teacher: Any, path: str, step: int, batch: int, workers: int,
    rounds: int, steps: int, synthetic_rate: float,
) -> dict[str, Any]:  # fmt: skip
    """The step on real images, and the share of time that it loses against synthetic ones.

    The host waits for images while the GPU still works, so its own waiting (data_wait_share) is an upper
    bound on a GPU; what is lost is seen by comparing rates.
    """
    run, plan = stepper.config, stepper.plan
    stream = pretrain_batches(
        open_source(path), assemble.crop_settings(run, teacher),
        noise_length=noise_length(run.mask.rule, plan.n_patches), seed=0, batch_size=batch,
        micro_batch=batch, workers=workers, pin_memory=stepper.device.type == "cuda",
    )  # fmt: skip
    with closing(stream) as batches:  # type: ignore[type-var]
        timed = measure.rates(stepper, batches, step, batch, rounds, steps)
    rate = timed["images_per_second"]["median"]
    return {**timed, "synthetic": synthetic_rate, "lost_share": 1 - rate / synthetic_rate}
