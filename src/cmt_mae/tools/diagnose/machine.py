"""The machine: device, cores, memory and disk, as the run will find them."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch

from cmt_mae.core.runs import environment
from cmt_mae.data import jpeg
from cmt_mae.engine.processes import make_accelerator
from cmt_mae.tools.diagnose.finding import Finding, problem, warning

CGROUP = Path("/sys/fs/cgroup")
SHM = Path("/dev/shm")
LEAST_SHM = 2**28  # bytes for the batches that loader processes hand over


def check_machine(device: str, precision: str, folder: str) -> tuple[dict[str, Any], list[Finding]]:
    """Facts about this machine, and what is wrong with it.

    folder: where the run will be written; its nearest existing parent is looked at.
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
        "memory": memory(),
        "jpeg": "Pillow" if jpeg.simplejpeg is None else "simplejpeg",
        "disk": disk(nearest(folder)),
        "shared_memory_gb": round(shutil.disk_usage(SHM).total / 1e9, 2) if SHM.is_dir() else None,
    }
    if on.type == "cuda":
        one = torch.cuda.get_device_properties(on)
        facts["gpu_memory_gb"] = round(one.total_memory / 1e9, 1)
        facts["gpus"] = torch.cuda.device_count()
    return facts, judge(facts)


def judge(facts: dict[str, Any]) -> list[Finding]:
    """What is wrong, from the facts alone."""
    found: list[Finding] = []
    cores, threads = facts["cores"], facts["hardware"]["threads"]
    on_cpu = facts["device"] == "cpu"
    if on_cpu and threads > cores:
        found.append(warning(
            "machine", "more threads than cores", f"torch computes with {threads} threads on {cores:g} cores",
            f"set OMP_NUM_THREADS={max(1, int(cores))}",
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
    if facts["jpeg"] != "simplejpeg":
        found.append(warning(
            "machine", "slow JPEG decoder", "Pillow decodes",
            "pip install simplejpeg, which gives the same pixels faster",
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


def nearest(folder: str) -> Path:
    """The folder, or the nearest of its parents that exists."""
    path = Path(folder or ".").expanduser().absolute()
    return next(one for one in (path, *path.parents) if one.is_dir())


def disk(folder: Path) -> dict[str, Any]:
    """What is free there, and why it cannot be written ("" where it can)."""
    facts: dict[str, Any] = {"folder": str(folder), "error": ""}
    try:
        facts["free_gb"] = round(shutil.disk_usage(folder).free / 1e9, 1)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".cmt-mae-doctor-") as file:
            file.write(bytes(4096))
    except OSError as error:
        facts["error"] = error.strerror or str(error)
    return facts
