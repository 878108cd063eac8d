"""The machine: torch, device, compiler, JPEG decoder, disk, cores and memory, measured where it takes a second."""

import io
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from cmt_mae.core.runs import environment
from cmt_mae.data import jpeg
from cmt_mae.data.decode import MAX_PIXELS
from cmt_mae.engine.compiling import why_not
from cmt_mae.engine.processes import make_accelerator
from cmt_mae.tools.bench.measure import peak_flops
from cmt_mae.tools.diagnose.finding import Finding, problem, warning

CGROUP = Path("/sys/fs/cgroup")
SHM = Path("/dev/shm")
LEAST_SHM = 2**28  # bytes for the batches that loader processes hand over
DISK_BYTES = 2**26  # written and read again
PICTURE = (375, 500)  # height and width of the JPEG that is decoded, the usual ones of ImageNet
BUSY = 0.5  # others' load, as a share of the cores, that makes measured times worth little


def check_machine(
    device: str, precision: str, folder: str, compiles: bool
) -> tuple[dict[str, Any], list[Finding]]:
    """Facts about this machine, and what is wrong with it. A few seconds; with ``compiles`` up to a minute.

    folder: where the run will be written; its nearest existing parent is where the disk is measured.
    Raises InputError for a device that is not there.
    """
    accelerator = make_accelerator(device, precision)
    on = accelerator.device
    used = "bf16" if accelerator.mixed_precision == "bf16" else "fp32"
    facts: dict[str, Any] = {
        **environment(),
        "device": str(on),
        "precision": used,
        "cores": usable_cores(),
        "load": round(os.getloadavg()[0], 2),
        "memory": memory(),
        "peak": peak_flops(on, used, "measured"),
        "compiler": compiler(on, compiles),
        "jpeg": decoder(),
        "disk": disk(nearest(folder)),
        "shared_memory_gb": round(shutil.disk_usage(SHM).total / 1e9, 2) if SHM.is_dir() else None,
    }
    if on.type == "cuda":
        one = torch.cuda.get_device_properties(on)
        facts["gpu_memory_gb"] = round(one.total_memory / 1e9, 1)
        facts["gpus"] = torch.cuda.device_count()
    return facts, judge(facts, compiles)


def judge(facts: dict[str, Any], compiles: bool) -> list[Finding]:
    """What is wrong, from the facts alone."""
    found: list[Finding] = []
    cores, threads = facts["cores"], facts["hardware"]["threads"]
    on_cpu = facts["device"] == "cpu"
    if on_cpu and threads > cores:
        found.append(warning(
            "machine", "more threads than cores", f"torch computes with {threads} threads on {cores:g} cores",
            f"set OMP_NUM_THREADS={max(1, int(cores))}",
        ))  # fmt: skip
    if facts["load"] > BUSY * cores and cores:
        found.append(warning(
            "machine", "others are computing", f"load {facts['load']} on {cores:g} cores in the last minute",
            "times measured now are those of a busy machine: look again when it is quiet",
        ))  # fmt: skip
    if on_cpu and facts["hardware"]["gpu"] is not None:
        found.append(warning(
            "machine", "a GPU is not used", f"{facts['hardware']['gpu']} is here, the device is the "
            "CPU", "leave out --device cpu"
        ))  # fmt: skip
    shared = facts["shared_memory_gb"]
    if shared is not None and shared < LEAST_SHM / 1e9:
        found.append(warning(
            "machine", "little shared memory", f"{SHM} has {shared} GB, through which loader processes hand "
            f"over images",
            "start the container with --shm-size=2g, or give --workers 0",
        ))  # fmt: skip
    if facts["jpeg"]["decoder"] != "simplejpeg":
        found.append(warning(
            "machine", "slow JPEG decoder", f"Pillow decodes: {facts['jpeg']['milliseconds']} ms a picture of "
            f"500 x 375",
            "pip install simplejpeg, which gives the same pixels faster",
        ))  # fmt: skip
    if compiles and facts["compiler"]["works"] is False:
        found.append(warning(
            "machine", "no compiler", f"runtime.compile cannot work here: {facts['compiler']['why_not']}",
            "install g++ (CPU) or Triton (GPU), or leave runtime.compile at false",
        ))  # fmt: skip
    disk_facts = facts["disk"]
    if disk_facts["error"]:
        found.append(problem(
            "machine", "the disk cannot be written", f"{disk_facts['folder']}: "
            f"{disk_facts['error']}", "choose another --out"
        ))  # fmt: skip
    return found


def usable_cores() -> float:
    """Cores that this process may use: by affinity, and by the quota of its container where there is one."""
    cores: float = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    quota = read_words(CGROUP / "cpu.max")
    if len(quota) == 2 and quota[0].isdigit() and quota[1].isdigit() and int(quota[1]):
        cores = min(cores, int(quota[0]) / int(quota[1]))
    return cores


def memory() -> dict[str, float]:
    """GB of memory: all there is, and what is still free; by the limit of the container where there is one."""
    seen = psutil.virtual_memory()
    total, free = float(seen.total), float(seen.available)
    limit, used = read_words(CGROUP / "memory.max"), read_words(CGROUP / "memory.current")
    if limit and limit[0].isdigit() and used and used[0].isdigit():
        total = min(total, float(limit[0]))
        free = max(0.0, min(free, float(limit[0]) - float(used[0])))
    return {"total_gb": round(total / 1e9, 2), "free_gb": round(free / 1e9, 2)}


def read_words(path: Path) -> list[str]:
    """Words of a small file of the system; none where it is not there."""
    try:
        return path.read_text().split()
    except OSError:
        return []


def compiler(device: torch.device, tries: bool) -> dict[str, Any]:
    """Which C++ compiler there is, and (``tries``) whether torch.compile works with it."""
    name = next((n for n in (os.environ.get("CXX"), "g++", "clang++") if n and shutil.which(n)), "")
    reason = why_not(device) if tries else None
    return {"name": name, "works": None if reason is None else not reason, "why_not": reason}


def decoder(seconds: float = 0.3) -> dict[str, Any]:
    """Which library decodes JPEG, and milliseconds for a picture of 500 x 375 (a smooth one with noise)."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[: PICTURE[0], : PICTURE[1]]
    waves = 128 + 80 * np.sin(rows / 40)[..., None] * np.cos(columns[..., None] / (30, 50, 70))
    pixels = np.clip(waves + rng.normal(0, 8, (*PICTURE, 3)), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="JPEG", quality=90)
    raw = file.getvalue()
    header = jpeg.read_header(raw, MAX_PIXELS)
    assert header is not None
    count, begin = 0, time.perf_counter()
    while count < 3 or time.perf_counter() - begin < seconds:
        jpeg.decode(raw, header)
        count += 1
    spent = (time.perf_counter() - begin) / count
    name = "Pillow" if jpeg.simplejpeg is None else "simplejpeg"
    return {"decoder": name, "milliseconds": round(1000 * spent, 2)}


def nearest(folder: str) -> Path:
    """The folder, or the nearest of its parents that exists."""
    path = Path(folder or ".").expanduser().absolute()
    return next(one for one in (path, *path.parents) if one.is_dir())


def disk(folder: Path) -> dict[str, Any]:
    """MB/s of writing 64 MiB to this folder (flushed) and of reading them again from the disk; what is free."""
    facts: dict[str, Any] = {
        "folder": str(folder),
        "error": "",
        "write_mb_s": None,
        "read_mb_s": None,
    }
    block = np.random.default_rng(0).integers(0, 256, DISK_BYTES, dtype=np.uint8).tobytes()
    try:
        facts["free_gb"] = round(shutil.disk_usage(folder).free / 1e9, 1)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".cmt-mae-doctor-") as file:
            begin = time.perf_counter()
            file.write(block)
            file.flush()
            os.fsync(file.fileno())
            facts["write_mb_s"] = round(DISK_BYTES / 1e6 / (time.perf_counter() - begin))
            forget_cached(file.fileno())
            begin = time.perf_counter()
            file.seek(0)
            while file.read(2**20):
                pass
            facts["read_mb_s"] = round(DISK_BYTES / 1e6 / (time.perf_counter() - begin))
    except OSError as error:
        facts["error"] = error.strerror or str(error)
    return facts


def forget_cached(number: int) -> None:
    """Ask the system to read this open file from the disk next time, where it can be asked."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
