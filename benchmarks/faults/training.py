"""Faults inside a training: numbers that are not finite, collapse, numbers of processes, memory that grows."""

import math
import random
import re
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.faults import hooks
from benchmarks.faults.lab import STOPPED, Broken, Lab, Row, rows_of
from benchmarks.faults.launch import Launch
from cmt_mae.core.checkpoint import list_checkpoints, load_checkpoint

PLAIN = "--student.drop_path=0"
"""Drop path draws its random numbers by process, not by image: the one thing that may differ."""
AT, STEPS = 13, 20
"""Step (from 1) at which a fault is put: in stage two, where every part there is takes part."""

# --- numbers ------------------------------------------------------------------------------------------------


def spoilt_once(place: str, lab: Lab, rng: random.Random) -> None:
    """One number of one step is nan or infinite, on one of one or two processes."""
    processes = rng.choice((1, 2))
    hurt, bad = rng.randrange(processes), rng.choice((math.nan, math.inf, -math.inf))
    out = lab.fresh() / "run"

    def inject(rank: int) -> None:
        hooks.spoil(place, hooks.moment(AT, AT, rank, hurt), bad)
        hooks.leave_weights(out, rank)

    launch = Launch(lab.pretrain(out, PLAIN), out.parent / "log", processes, prepare=inject).start()
    where = f"{bad} on process {hurt} of {processes}"
    if any(launch.finish()):
        raise Broken(f"{where}: {launch.statuses} {launch.last()}")
    part = re.escape(hooks.PLACES[place])
    if not re.search(rf"1 step\(s\) .* skipped, not finite: first {part} at step {AT} ", launch.said()):
        raise Broken(f"{where}: not named: {[x for x in launch.said().splitlines() if 'finite' in x]}")
    rows = rows_of(out)
    skipped = {row["step"]: row["skipped_steps"] for row in rows if row["skipped_steps"]}
    if skipped != {AT: 1} or len(rows) != STEPS:
        raise Broken(f"{where}: {len(rows)} rows, skipped {skipped}")
    finite_checkpoint(out, STEPS - 1)
    if len({out.with_name(f"run.weights{rank}").read_text() for rank in range(processes)}) != 1:
        raise Broken(f"{where}: the processes' weights differ")


def finite_checkpoint(out: Path, taken: int) -> None:
    """The last checkpoint is finite and its optimizer counts so many steps."""
    state = load_checkpoint(list_checkpoints(out / "checkpoints")[-1])
    counted = max(int(entry["step"]) for entry in state["optimizer"]["state"].values())
    if counted > taken:
        raise Broken(f"the optimizer counts {counted} steps of {taken}")
    for part in ("learner", "momentum"):
        if not all(torch.isfinite(t).all() for t in (state[part] or {}).values()):
            raise Broken(f"{part} of the checkpoint is not finite")


def spoilt_weight(lab: Lab, rng: random.Random) -> None:
    """A weight turns to nan in memory: named, never saved; the same command goes on to the undisturbed end."""
    name = rng.choice(("student.blocks.0.attn.qkv.weight", "decoder.mask_token", "heads.teacher.bias"))
    more = (PLAIN, "--runtime.max_nonfinite=30")
    whole = lab.finished("max_nonfinite 30", lambda out: lab.pretrain(out, *more))
    out = lab.fresh() / "run"
    inject = lambda rank: hooks.spoil(name, hooks.moment(AT, AT, rank, None), math.nan)  # noqa: E731
    launch = Launch(lab.pretrain(out, *more), out.parent / "log", prepare=inject).start()
    if launch.finish() != [2] or f"weight learner.{name}" not in launch.said():
        raise Broken(f"{name}: {launch.statuses} {launch.last()}")
    finite_checkpoint(out, AT - 1)
    lab.ends_as(whole, lab.pretrain(out, *more))


METHODS: dict[str, list[str]] = {
    "cmt": [],
    "mae": ["--mask.rule=random", "--target.source=pixel", "--target.norm=mae"],
    "hog": ["--mask.rule=random", "--target.source=hog", "--target.norm=none"],
    "teacher": ["--mask.source=teacher", "--target.source=teacher"],
    "momentum": ["--mask.source=momentum", "--target.source=momentum", "--stage1_epochs=0"],
}


def dull_images(lab: Lab, rng: random.Random) -> None:
    """Black images, images of one colour each and batches of one: finite, nothing skipped, in fp32 and bf16."""
    folder = lab.fresh()
    colours = np.random.default_rng(0).integers(0, 256, (40, 3))
    for kind in ("black", "one colour each"):
        (folder / kind).mkdir()
        for number in range(40):
            colour = tuple(map(int, colours[number])) if kind != "black" else (0, 0, 0)
            Image.new("RGB", (40, 40), colour).save(folder / kind / f"{number}.png")
    for method, more in METHODS.items():
        kind = rng.choice(("black", "one colour each", "batches of one"))
        data = lab.packed if kind == "batches of one" else str(folder / kind)
        few = ["--batch_size=1", "--epochs=0.5"] if kind == "batches of one" else []
        out = folder / method
        words = lab.pretrain(out, PLAIN, f"--precision={rng.choice(('fp32', 'bf16'))}", *few, *more, data=data)
        launch = Launch(words, folder / f"{method}.log").start()
        if any(launch.finish()) or "not finite" in launch.said():
            raise Broken(f"{kind}, {method}: {launch.statuses} {launch.last()}")
        if re.search("NaN|Infinity", (out / "metrics.jsonl").read_text()):
            raise Broken(f"{kind}, {method}: metrics that are not finite")


SELF = [
    *METHODS["momentum"], "--target.norm=none", "--momentum.start=0", "--momentum.end=0",
    "--momentum.schedule=constant", "--optim.weight_decay=3", "--optim.blr=1", "--epochs=60",
]  # fmt: skip
"""A student that predicts itself of the step before, unnormalised: to tell places and no images is easiest."""
COLLAPSES = {
    "constant": ([], "spread_target_teacher"), "one line": ([], "rank_target_teacher"),
    "one patch": ([], "entropy_teacher"), "no patch": ([], "entropy_teacher"),
    "itself": (SELF, "image_share_momentum"),
}  # fmt: skip


def collapse(how: str, lab: Lab, _: random.Random) -> None:
    """A teacher (or target) that says nothing: the alarm sounds, names its number, and is recorded."""
    more, number = COLLAPSES[how]
    out = lab.fresh() / "run"
    place = None if how == "itself" else hooks.dull_teacher(how)
    launch = Launch(lab.pretrain(out, PLAIN, *more), out.parent / "log", prepare=place).start()
    statuses = launch.finish()
    told = [x for x in launch.said().splitlines() if "signs of collapse" in x and number in x]
    if any(statuses) or not told or not any(row["collapse_signs"] > 0 for row in rows_of(out)):
        raise Broken(f"{statuses}, told {told[:1]}: {launch.last()}")


# --- numbers of processes -----------------------------------------------------------------------------------


def curve_gap(one: Path, two: Path) -> float:
    """Largest difference of two loss curves; infinite where they have other steps."""
    first, second = rows_of(one), rows_of(two)
    if [r["step"] for r in first] != [r["step"] for r in second]:
        return math.inf
    return max(abs(a[k] - b[k]) for a, b in zip(first, second, strict=True) for k in a if k.startswith("loss"))


def other_processes(lab: Lab, rng: random.Random) -> None:
    """2 or 4 processes, FSDP or DDP, stopped and continued with another number: one process's loss curve."""
    whole = lab.finished("plain, clip", lambda out: lab.pretrain(out, PLAIN, "--optim.clip=1"))
    out = lab.fresh() / "run"
    turns = rng.choice(
        ([(2, "ddp")], [(2, "fsdp")], [(1, "ddp"), (2, "ddp")], [(2, "fsdp"), (1, "ddp")], [(4, "ddp")])
    )
    for number, (count, parallel) in enumerate(turns):
        last = number == len(turns) - 1
        words = lab.pretrain(out, PLAIN, "--optim.clip=1", f"--runtime.parallel={parallel}")
        launch = Launch(words, out.parent / "log", count, prepare=None if last else hooks.stop_after(11)).start()
        if set(launch.finish()) != {0 if last else STOPPED}:
            raise Broken(f"{turns}, turn {number}: {launch.statuses} {launch.last()}")
    if not (gap := curve_gap(whole, out)) <= 1e-5:
        raise Broken(f"{turns}: the curve is {gap:.2g} off")


def long_run(lab: Lab, _: random.Random) -> None:
    """Thousands of steps with many checkpoints: memory, descriptors, threads and files do not grow."""
    out = lab.fresh() / "run"
    epochs = lab.count(800, 80)
    words = lab.pretrain(out, f"--epochs={epochs}", "--runtime.checkpoint_every=20", "--runtime.log_every=20")
    launch = Launch(words, out.parent / "log").start()
    samples = []
    while launch.running():
        time.sleep(0.2)
        status = Path(f"/proc/{launch.pids[0]}/status")
        try:
            memory = int(re.findall(r"VmRSS:\s+(\d+)", status.read_text())[0])
            samples.append((memory, len(list(Path(f"/proc/{launch.pids[0]}/fd").iterdir()))))
        except (OSError, IndexError):
            break
    if any(launch.finish(600)):
        raise Broken(f"{launch.statuses} {launch.last()}")
    half = samples[len(samples) // 2 : -1]
    if half and (half[-1][0] - half[0][0] > 15_000 or half[-1][1] > half[0][1] + 3):
        raise Broken(f"KB and descriptors: {half[0]} at half, {half[-1]} at the end")
    files = [p for p in out.rglob("*") if p.is_file() and "tensorboard" not in str(p)]
    if len(files) > 25:
        raise Broken(f"{len(files)} files")


SKIPPED = "costs its step and no more, on every process alike; its first part is named"
ROWS = [
    *[Row(f"not finite once: {place}", SKIPPED, partial(spoilt_once, place), 4) for place in hooks.PLACES],
    Row("a weight turns to nan", "named, never saved; the run goes on from before it", spoilt_weight, 3),
    Row("images that say nothing", "finite, nothing skipped", dull_images, 2),
    *[Row(f"collapse: {how}", "the alarm sounds, names its number", partial(collapse, how)) for how in COLLAPSES],
    Row("other numbers of processes, FSDP", "one process's loss curve", other_processes, 5),
    Row("a long run", "memory, descriptors and files do not grow", long_run),
]  # fmt: skip
