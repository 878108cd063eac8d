"""One result on any number of processes: curves, evaluations, resume, FSDP, and a process that is killed.

Processes are forks that talk over loopback (gloo), as under torchrun; the kills are under torchrun itself.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file

from benchmarks.faults import tiny
from benchmarks.faults.campaign import Options, Verdict
from benchmarks.faults.sameness import differences, steps_done
from cmt_mae.core.checkpoint import list_checkpoints, load_checkpoint
from cmt_mae.engine.trainer import Trainer

PLAIN = ["--student.drop_path=0", "--runtime.log_every=1"]
"""Drop path draws its random numbers by process, not by image: the one thing that may differ."""
METHODS = {
    "cmt": ["--optim.clip=1"],
    "cmt, micro-batches of 1": ["--optim.clip=1", "--runtime.micro_batch=1"],
    "mae": ["--mask.rule=random", "--target.source=pixel", "--target.norm=mae"],
}
COUNTS = (1, 2, 4)
TOLERANCE = 1e-5
"""Of every number of the loss curve, over 50 steps."""
LOSSES = ("loss", "loss_teacher", "loss_momentum", "loss_pixel")
KEY_BIAS_RTOL = (
    "the keys' bias has no effect on attention, so Adam makes a step of its rounding error"
)


def campaign(options: Options) -> Verdict:
    """All of it."""
    verdict = Verdict(
        "1, 2 and 4 processes give one loss curve and the same evaluation; a run goes on with another number; "
        "FSDP is DDP; a process that is killed ends the others in a line, and torchrun's restart ends bit-equal"
    )
    work = tiny.prepare(options.folder / "data_")
    curves(options, work, verdict)
    evaluations(options, work, verdict)
    other_counts(options, work, verdict)
    sharded(options, work, verdict)
    if not options.quick:
        killed(options, work, verdict)
    lone(options, work, verdict)
    return verdict


def run(words: list[str], out: Path, processes: int, **more: Any) -> tuple[list[int], str]:
    """(exit statuses, what was said)."""
    launch = tiny.Launch(words, out.with_suffix(".log"), processes, **more).start()
    return launch.finish(600), launch.said()


def rows_of(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def apart(one: Path, two: Path) -> float:
    """Largest difference of the loss curves; infinite where they have other steps or other losses."""
    first, second = rows_of(one), rows_of(two)
    if [r["step"] for r in first] != [r["step"] for r in second]:
        return float("inf")
    gaps = [0.0]
    for a, b in zip(first, second, strict=True):
        if a.keys() != b.keys():
            return float("inf")
        gaps += [abs(a[name] - b[name]) for name in LOSSES if name in a]
    return max(gaps)


def curves(options: Options, work: tiny.Tiny, verdict: Verdict) -> None:
    """The loss curve of 50 steps."""
    largest: dict[str, float] = {}
    for name, more in METHODS.items():
        if options.quick and name != "cmt":
            continue
        outs = {}
        for count in COUNTS[: 2 if options.quick else 3]:
            out = options.folder / f"curve_{name.replace(' ', '_')}{count}"
            epochs = "--epochs=1" if options.quick else "--epochs=10"
            words = work.pretrain(work.packed, out, *PLAIN, epochs, "--stage1_share=0.5", *more)
            statuses, said = run(words, out, count)
            if any(statuses):
                verdict.failures.append(f"{name}, {count}: {statuses} {said.splitlines()[-1:]}")
                continue
            outs[count] = out
            if count > 1 and 1 in outs:
                gap = apart(outs[1], out)
                largest[f"{name}, {count} processes"] = gap
                if not gap <= TOLERANCE:
                    verdict.failures.append(
                        f"{name}: the curve of {count} processes is {gap:.2g} off"
                    )
            verdict.trials += 1
    verdict.figures["largest difference of a loss from one process's"] = {
        k: f"{v:.2g}" for k, v in largest.items()
    }


def evaluations(options: Options, work: tiny.Tiny, verdict: Verdict) -> None:
    """knn, linear and the k-NN while training: numbers to the last bit, sizes that do not divide."""
    odd = str(odd_images(options.folder / "odd"))
    tasks = ("knn", "linear")
    found: dict[str, dict[int, Any]] = {}
    counts = (1, 2) if options.quick else (1, 2, 3, 4)
    for task in tasks:
        if options.quick and task != "knn":
            continue
        for count in counts:
            out = options.folder / f"eval_{task}{count}"
            words = [
                "evaluate",
                task,
                f"--backbone={work.backbone}",
                f"--data={odd}",
                f"--out={out}",
            ]
            statuses, said = run([*words, "--device=cpu", "--workers=0"], out, count)
            results = sorted(out.rglob("*.json")) if out.exists() else []
            if any(statuses) or not results:
                verdict.failures.append(f"{task}, {count}: {statuses} {said.splitlines()[-1:]}")
                continue
            found.setdefault(task, {})[count] = json.loads(results[-1].read_text())["metrics"]
            verdict.trials += 1
    for count in () if options.quick else counts[:2]:
        out = options.folder / f"eval_online{count}"
        probe = [f"--runtime.probe_data={odd}", "--runtime.probe_every=1", "--optim.blr=0"]
        statuses, said = run(work.pretrain(work.packed, out, *PLAIN, *probe), out, count)
        online = [row["knn_top1"] for row in rows_of(out) if "knn_top1" in row]
        found.setdefault("k-NN while training", {})[count] = online
        verdict.trials += 1
    for task, by_count in found.items():
        different = [count for count in by_count if by_count[count] != by_count[1]]
        if different:
            verdict.failures.append(
                f"{task}: other numbers on {different} processes than on 1: {by_count}"
            )
    verdict.figures["evaluations, the same to the last bit"] = {
        task: f"{sorted(by_count)} processes" for task, by_count in found.items()
    }
    verdict.figures["images of them"] = "23 for training, 13 for validation"


def odd_images(folder: Path) -> Path:
    """23 and 13 labelled images: neither divides by 2, 3 or 4."""
    program = "import sys; from cmt_mae.data.sample import *; write_imagefolder(sys.argv[1], 23, 13, 40)"
    subprocess.run([sys.executable, "-c", program, str(folder)], check=True, capture_output=True)
    return folder


def stop_after(step: int) -> Any:
    """SIGTERM to itself when a step is done, on process 0."""

    def place(rank: int) -> None:
        real = Trainer.step

        def step_then(self: Trainer, batches: Any, number: int) -> Any:
            outcome = real(self, batches, number)
            if rank == 0 and number + 1 == step:
                signal.raise_signal(signal.SIGTERM)
            return outcome

        Trainer.step = step_then  # type: ignore[method-assign]

    return place


def other_counts(options: Options, work: tiny.Tiny, verdict: Verdict) -> None:
    """A run that goes on with another number of processes, in the middle of a window of metrics too."""
    orders = [(1, 2), (2, 1)] if options.quick else [(1, 2, 4, 1), (4, 2, 1), (2, 1, 2, 4)]
    more = ["--student.drop_path=0", "--runtime.log_every=3", "--runtime.checkpoint_every=0.2"]
    whole = options.folder / "counts_whole"
    run(work.pretrain(work.packed, whole, *more), whole, 1)
    gaps = []
    for order in orders[:1] if options.quick else orders:
        out = options.folder / f"counts_{'_'.join(map(str, order))}"
        words = work.pretrain(work.packed, out, *more)
        said = ""
        for turn, count in enumerate(order):
            last = turn == len(order) - 1
            statuses, said = run(
                words, out, count, prepare=None if last else stop_after(4 + 5 * turn)
            )
            if set(statuses) != ({0} if last else {75}):
                verdict.failures.append(
                    f"{order}: turn {turn} ends with {statuses}: {said.splitlines()[-1:]}"
                )
            was = order[turn - 1]
            line = rf"continuing .*; changed since the last start: processes {was} -> {count}.*micro_batch"
            if turn and not re.search(line, said):
                verdict.failures.append(f"{order}: turn {turn} does not say what changed")
        gaps.append(apart(whole, out))
        if not gaps[-1] <= TOLERANCE:
            verdict.failures.append(f"{order}: the curve is {gaps[-1]:.2g} off")
        verdict.trials += 1
        changed = [line for line in said.splitlines() if "changed since" in line]
        verdict.figures["what it says"] = changed[-1].split("; ")[-1] if changed else ""
    verdict.figures["runs continued with other numbers of processes"] = {
        "orders": [" -> ".join(map(str, order)) for order in orders],
        "largest difference of a loss": f"{max(gaps):.2g}",
    }


def states(out: Path) -> dict[str, torch.Tensor]:
    """Weights, momentum student and optimizer moments of the last checkpoint, by name."""
    state = load_checkpoint(list_checkpoints(out / "checkpoints")[-1])
    found = {f"learner/{k}": v for k, v in state["learner"].items()}
    found |= {f"momentum/{k}": v for k, v in (state["momentum"] or {}).items()}
    for number, entry in state["optimizer"]["state"].items():
        found |= {f"optimizer/{number}/{k}": v for k, v in entry.items()}
    return found


def state_gap(one: Path, two: Path) -> tuple[float, str]:
    """(largest difference, where) of two states, the keys' biases left out (see KEY_BIAS_RTOL)."""
    first, second = states(one), states(two)
    if first.keys() != second.keys():
        return float("inf"), str(sorted(first.keys() ^ second.keys())[:3])
    worst, where = 0.0, ""
    for name, value in first.items():
        mine, theirs = value.double().flatten(), second[name].double().flatten()
        if name.endswith("qkv.bias"):
            third = len(mine) // 3
            mine, theirs = (torch.cat([t[:third], t[2 * third :]]) for t in (mine, theirs))
        gap = (mine - theirs).abs().max().item() if len(mine) else 0.0
        worst, where = max((worst, where), (gap, name))
    return worst, where


def sharded(options: Options, work: tiny.Tiny, verdict: Verdict) -> None:
    """FSDP against DDP, across resumes, and what is exported from it."""
    figures: dict[str, Any] = {}
    more = [*PLAIN, "--optim.clip=0.5", "--runtime.checkpoint_every=0.2", "--runtime.micro_batch=2"]
    more += ["--epochs=1"] if options.quick else []
    half = 3 if options.quick else 11
    fsdp = "--runtime.parallel=fsdp"
    outs: dict[str, Path] = {}

    def train(name: str, turns: list[tuple[int, list[str]]]) -> Path:
        out = outs[name] = options.folder / f"sharded_{name}" / "run"
        for turn, (count, extra) in enumerate(turns):
            last = turn == len(turns) - 1
            words = work.pretrain(work.packed, out, *more, *extra)
            statuses, said = run(words, out, count, prepare=None if last else stop_after(half))
            if set(statuses) != ({0} if last else {75}):
                verdict.failures.append(f"{name}: turn {turn}: {statuses} {said.splitlines()[-1:]}")
        verdict.trials += 1
        return out

    ddp = train("ddp", [(2, [])])
    both = train("fsdp", [(2, [fsdp])])
    pairs = {"fsdp, 2 processes": both}
    if not options.quick:
        pairs["fsdp, 4 processes"] = train("fsdp4", [(4, [fsdp])])
        pairs["ddp, then fsdp"] = train("into", [(2, []), (2, [fsdp])])
        pairs["fsdp, then one process"] = train("out_of", [(2, [fsdp]), (1, [])])
        pairs["fsdp on 2, then on 4"] = train("grown", [(2, [fsdp]), (4, [fsdp])])
    for name, out in pairs.items():
        try:
            gap, where = state_gap(ddp, out)
        except (OSError, IndexError) as error:
            verdict.failures.append(f"{name}: no state ({error})")
            continue
        figures[name] = f"{gap:.2g} ({where})" if gap else "0"
        if not gap <= TOLERANCE:
            verdict.failures.append(f"{name}: state {gap:.2g} off DDP's at {where}")
        if not (curve := apart(ddp, out)) <= TOLERANCE:
            verdict.failures.append(f"{name}: the curve is {curve:.2g} off DDP's")
    verdict.figures["largest difference of a weight or moment from DDP's"] = figures
    verdict.figures["left out of it"] = KEY_BIAS_RTOL
    if not options.quick:
        again = train("twice", [(2, [fsdp]), (2, [fsdp])])
        found = [d for d in differences(both, again) if "config.yaml" not in d]
        verdict.failures += [f"fsdp, stopped and continued: {what}" for what in found[:3]]
        verdict.figures["fsdp, stopped and continued"] = "bit-equal" if not found else found[0]
        exported(options, both, verdict)


def exported(options: Options, out: Path, verdict: Verdict) -> None:
    """timm loads what is exported from a sharded run: the weights of its checkpoint."""
    target = options.folder / "exported.safetensors"
    words = ["export", f"--backbone={out}", "--format=timm", f"--out={target}"]
    statuses, said = run(words, target, 1)
    if any(statuses) or not target.exists():
        verdict.failures.append(f"export: {statuses} {said.splitlines()[-1:]}")
        return
    model = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2
    )  # fmt: skip
    given = load_file(target)
    model.load_state_dict({k: v for k, v in given.items() if not k.startswith("head.")})
    wanted = load_checkpoint(list_checkpoints(out / "checkpoints")[-1])["learner"]
    different = [
        k for k, v in model.state_dict().items() if not torch.equal(v, wanted[f"student.{k}"])
    ]
    if different:
        verdict.failures.append(f"export: other weights than the checkpoint's: {different[:3]}")
    verdict.trials += 1
    verdict.figures["exported from the sharded run, loaded in timm"] = (
        f"{len(given)} tensors, bit-equal"
    )


def killed(options: Options, work: tiny.Tiny, verdict: Verdict) -> None:
    """SIGKILL of one process under torchrun with restarts: the line, the time, the end bit for bit."""
    more = ["--student.drop_path=0.2", "--epochs=60", "--runtime.checkpoint_every=2"]
    whole: dict[int, Path] = {}
    seconds: list[float] = []
    landed: list[str] = []
    for trial, (count, victim) in enumerate(((2, 0), (2, 1), (2, 0), (2, 1), (4, 2), (4, 0))):
        if count not in whole:
            whole[count] = options.folder / f"killed_whole{count}" / "run"
            run(work.pretrain(work.packed, whole[count], *more), whole[count], count)
        out = options.folder / f"killed{trial}" / "run"
        log = out.parent.with_suffix(".log")
        process = torchrun(work.pretrain(work.packed, out, *more), log, count, restarts=1)
        at = 25 + 45 * trial
        step = wait_for(out, at, process, 120)
        ranks = ranks_below(process.pid)
        if step < 0 or victim not in ranks:
            verdict.failures.append(
                f"trial {trial}: never came to step {at}: {log.read_text()[-300:]}"
            )
            process.kill()
            continue
        others = [pid for rank, pid in ranks.items() if rank != victim]
        os.kill(ranks[victim], signal.SIGKILL)
        begin = time.monotonic()
        while any(running(pid) for pid in others) and time.monotonic() - begin < 90:
            time.sleep(0.02)
        seconds.append(round(time.monotonic() - begin, 2))
        status = process.wait(600)
        said = [
            line
            for line in log.read_text().splitlines()
            if "another process of this run is gone" in line
        ]
        case = f"process {victim} of {count} killed at step {step}"
        landed.append(f"{victim} of {count} at {step}")
        if seconds[-1] > 60:
            verdict.failures.append(f"{case}: the others ran on for {seconds[-1]} s")
        if not 1 <= len(said) <= count - 1:
            verdict.failures.append(f"{case}: {len(said)} lines say so")
        if status:
            verdict.failures.append(f"{case}: torchrun ends with {status}")
        # a fork draws smaller pictures than a process that torchrun starts (tiny.py)
        apart = ("config.yaml", "pictures/")
        found = [d for d in differences(whole[count], out) if not any(name in d for name in apart)]
        verdict.failures += [f"{case}: {what}" for what in found[:3]]
        verdict.trials += 1
        verdict.figures["the line"] = said[0] if said else ""
    verdict.figures["processes killed under torchrun"] = landed
    verdict.figures["seconds until the others had stopped"] = seconds


def lone(options: Options, work: tiny.Tiny, verdict: Verdict) -> None:
    """Without torchrun nobody ends the other process: it stops by itself."""
    out = options.folder / "lone" / "run"
    words = work.pretrain(work.packed, out, "--epochs=2000", "--runtime.log_every=1")
    launch = tiny.Launch(words, options.folder / "lone.log", 2).start()
    begin = time.monotonic()
    while not steps_done(out) and time.monotonic() - begin < 60:
        time.sleep(0.02)
    launch.kill(1)
    begin = time.monotonic()
    while not (ended := os.waitid(os.P_PID, launch.pids[0], os.WEXITED | os.WNOHANG | os.WNOWAIT)):
        if time.monotonic() - begin > 60:
            break
        time.sleep(0.02)
    took = round(time.monotonic() - begin, 2)
    statuses, said = launch.finish(), launch.said()
    if ended is None or statuses[0] != 75 or said.count("another process of this run is gone") != 1:
        verdict.failures.append(f"alone: {statuses} after {took} s: {said.splitlines()[-1:]}")
    verdict.trials += 1
    verdict.figures["seconds until a process without torchrun stopped"] = took


def torchrun(words: list[str], log: Path, count: int, restarts: int) -> "subprocess.Popen[bytes]":
    """The command under torchrun."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}",
             f"--max-restarts={restarts}", "-m", "cmt_mae", *words],
            stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def wait_for(out: Path, step: int, process: "subprocess.Popen[bytes]", limit_s: float) -> int:
    """The run's last step once it is ``step`` or later; -1 where it ended or took too long."""
    end = time.monotonic() + limit_s
    while process.poll() is None and time.monotonic() < end:
        done = steps_done(out)
        if done and done[-1] >= step:
            return done[-1]
        time.sleep(0.01)
    return -1


def ranks_below(pid: int) -> dict[int, int]:
    """Rank -> process of torchrun's workers."""
    found: dict[int, int] = {}
    for child in tiny.descendants(pid):
        try:
            words = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        rank = next((int(w[5:]) for w in words if w.startswith(b"RANK=")), None)
        if rank is not None:
            found.setdefault(rank, child)
    return found


def running(pid: int) -> bool:
    """Whether a process is there and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
