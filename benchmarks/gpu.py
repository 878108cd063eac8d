"""One NVIDIA GPU in under 9 minutes: does everything run, how fast is a step, what does the time left learn.

    PYTHONPATH=src python3 -m benchmarks.gpu --out runs/gpu.json                   # the same command goes on
    PYTHONPATH=src python3 -m benchmarks.gpu --out runs/gpu.json --data imagenette_128/
    python -m benchmarks.gpu --dry-run --out runs/gpu_dry.json                     # on a CPU: does it work?

In this order, each entry in the file as soon as it is made, and none measured twice: smoke (seconds each, failures
listed, never fatal), rates (images/s, MFU, memory, host waits a step; eager, compiled, plain, transformers) and
quality (cmt against mae for as long as time is left, by benchmarks/quality.py). docs/gpu.md says what to look at.
"""

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

NEEDED = ("torch", "torchvision", "timm", "accelerate", "safetensors", "yaml", "rich", "PIL", "numpy", "cmt_mae")
PARTS = ("smoke", "rates", "quality")
TARGETS = {"vitb16/two": 0.45}
"""MFU wanted on an H100 or H200."""
READS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero", "equal"}
"""Operations of torch that hand a tensor's value to the host."""


def options(words: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu.json"))
    parser.add_argument("--budget-s", type=float, default=520.0, help="stop before so many seconds")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--sizes", default="vitb16,vitl16")
    parser.add_argument("--batches", default="128,256,512")
    parser.add_argument("--data", default="", help="packed at 128 px, with labels: for quality")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU: no measurement")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    """0: all was measured and is right; 1: something failed; 2: it cannot run here; 3: the time was up first."""
    given = options(words)
    gone = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if gone:
        print(f"missing modules: {', '.join(gone)} (cmt_mae: set PYTHONPATH=src)", file=sys.stderr)
        return 2
    parts = given.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        print(f"--parts: '{unknown[0]}' is unknown: use {', '.join(PARTS)}", file=sys.stderr)
        return 2
    import torch

    if not given.dry_run and not torch.cuda.is_available():
        print("no NVIDIA GPU here: give --dry-run to see that the script works", file=sys.stderr)
        return 2
    from benchmarks.timing import Book

    bench = Bench(given, Book(given.out, given.budget_s, dry_run=given.dry_run))
    for part in parts:
        getattr(bench, part)()
    return bench.end()


class Bench:
    """What the three parts share."""

    def __init__(self, given: argparse.Namespace, book: Any) -> None:
        import torch

        self.given, self.book, self.dry = given, book, given.dry_run
        self.device = torch.device("cpu" if self.dry else "cuda")
        self.sizes = ["micro"] if self.dry else given.sizes.split(",")
        self.batches = [4] if self.dry else [int(n) for n in given.batches.split(",")]
        self.precision = "fp32" if self.dry else "bf16"

    def settings(self, method: str, size: str, batch: int, **changes: Any) -> Any:
        """Of a run on this device."""
        from benchmarks.steps import settings

        common = {"batch_size": batch, "runtime.device": self.device.type, "precision": self.precision}
        return settings(method, size, **{**common, **changes})

    # --- smoke ---

    def smoke(self) -> None:
        """Every path that only a GPU takes, in seconds each."""
        checks: dict[str, Callable[[], dict[str, Any]]] = {
            "fp32": lambda: self.one_step("fp32"),
            "bf16": lambda: self.one_step("bf16"),
            "compile": lambda: self.one_step("bf16", **{"runtime.compile": True}),
            "frozen bf16": lambda: self.one_step("bf16", frozen_precision="bf16"),
            "resume bit by bit, deterministic": self.resume,
            "fsdp, one process": self.fsdp,
            "pinned loader": self.pinned,
        }
        for name, check in checks.items():
            self.book.measure(f"smoke/{name}", 40, check)

    def one_step(self, precision: str, **changes: Any) -> dict[str, Any]:
        """Loss and gradients of a step of stage two against the eager fp32 step with the same mask."""
        size = self.sizes[0]
        wanted, mask = self.gradients(self.settings("two", size, 4, precision="fp32"), None)
        found, _ = self.gradients(self.settings("two", size, 4, precision=precision, **changes), mask)
        error = float((found - wanted).norm() / wanted.norm())
        allowed = 1e-3 if precision == "fp32" else 0.1
        if not error <= allowed:  # nan is out of bounds too
            raise RuntimeError(f"gradients differ from eager fp32 by {error:.2e}, allowed {allowed:g}")
        return {"relative_error_of_gradients": error}

    def gradients(self, run: Any, mask: Any) -> tuple[Any, Any]:
        """(all gradients as one fp32 vector on the CPU, the mask) of a step whose weights stay."""
        import torch

        from benchmarks.steps import our_trainer
        from cmt_mae.method import frozen

        used: list[Any] = []
        real = frozen.sample_mask

        def sample(*words: Any, **names: Any) -> Any:
            used.append(real(*words, **names) if mask is None else mask)
            return used[-1]

        torch._dynamo.reset()
        torch.manual_seed(0)
        trainer, task, batches, step = our_trainer(run, "two")
        if run.runtime.compile and trainer.no_compiler:
            raise RuntimeError(f"nothing can be compiled here: {trainer.no_compiler}")
        with mock.patch.object(frozen, "sample_mask", sample):
            with trainer.accelerator.autocast():
                loss, _ = task.loss(trainer.model, next(batches), step)
            trainer.accelerator.backward(loss)
        parts = [p.grad.detach().float().flatten() for p in task.learner.parameters() if p.grad is not None]
        return torch.cat(parts).cpu(), used[0]

    def resume(self) -> dict[str, Any]:
        """A run of 6 steps, and one stopped in the 4th (the first of stage two) and continued: the same bits."""
        import torch

        ends = []
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            data = colours(folder / "data", 16)
            for starts in ((None,), (4, None)):
                out = folder / f"starts_{len(starts)}"
                for stop_at in starts:
                    self.train(data, out, stop_at)
                last = sorted((out / "checkpoints").glob("*.pt"))[-1]
                ends.append(torch.load(last, map_location="cpu", weights_only=True))
        differing = [k for k, v in flat(ends[0]).items() if not torch.equal(v, flat(ends[1])[k])]
        if differing:
            raise RuntimeError(f"{len(differing)} tensors differ after resuming, first {differing[0]}")
        return {"tensors_equal": len(flat(ends[0]))}

    def train(self, data: Path, out: Path, stop_at: int | None) -> None:
        """A real run of 6 steps, stage two from the 4th; SIGTERM to this very process in step ``stop_at``."""
        from cmt_mae.core.errors import Stopped
        from cmt_mae.engine.trainer import Trainer
        from cmt_mae.tools.pretrain import pretrain

        run = self.settings("two", "micro", 16, epochs=6.0)
        run.data.path, run.out, run.data.workers = str(data), str(out), 0
        run.runtime.deterministic, run.runtime.progress = True, False
        run.optim.warmup_epochs = 1

        real = Trainer.step

        def step(trainer: Any, batches: Any, number: int) -> Any:
            if number + 1 == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(trainer, batches, number)

        with mock.patch.object(Trainer, "step", step), contextlib.suppress(Stopped):
            pretrain(run)

    def fsdp(self) -> dict[str, Any]:
        """Networks cut into pieces (one here) run a step: sharded settings on one process group of one."""
        code = (
            "import torch, torch.distributed as dist\n"
            "from torch.distributed.fsdp import fully_shard\n"
            "from torch.distributed.device_mesh import init_device_mesh\n"
            "from cmt_mae.method.vit import StudentConfig, build_student\n"
            f"kind = '{self.device.type}'\n"
            "dist.init_process_group('gloo' if kind == 'cpu' else 'nccl')\n"
            "mesh = init_device_mesh(kind, (1,))\n"
            "net = build_student(StudentConfig(preset='micro', img_size=[32], patch_size=8, depth=2)).to(kind)\n"
            "[fully_shard(b, mesh=mesh) for b in net.blocks]; fully_shard(net, mesh=mesh)\n"
            "net(torch.randn(2, 3, 32, 32, device=kind)).sum().backward()\n"
            "print(sum(p.grad is not None for p in net.parameters()))\n"
            "dist.destroy_process_group()\n"
        )
        from benchmarks.timing import free_port

        places = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        env = {**os.environ, **places, "MASTER_PORT": str(free_port())}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60, check=False
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(done.stderr[-300:])
        return {"parameters_with_gradient": int(done.stdout)}

    def pinned(self) -> dict[str, Any]:
        """Batches of the loader lie in pinned memory and their copy does not wait."""
        from cmt_mae.data.loader import CropSettings, pretrain_batches
        from cmt_mae.data.sources import open_source

        with tempfile.TemporaryDirectory() as name:
            source = open_source(str(colours(Path(name) / "data", 16)))
            stream = pretrain_batches(
                source, CropSettings((32, 32)), noise_length=16, seed=0, batch_size=8, micro_batch=8, workers=1,
                pin_memory=not self.dry,
            )  # fmt: skip
            with contextlib.closing(stream) as batches:  # type: ignore[type-var]
                images = next(batches)["images"]
        if not self.dry and not images.is_pinned():
            raise RuntimeError("the loader's images are not pinned")
        return {"pinned": bool(images.is_pinned()) if not self.dry else None}

    # --- rates ---

    def rates(self) -> None:
        """Stages and MAE, eager and compiled, over batch sizes; the plain version and transformers beside them."""
        from cmt_mae.tools.bench.peak import peak_flops

        peak = self.book.measure(
            "peak", 5, lambda: peak_flops(self.device, self.precision, "measured")
        )
        for size in self.sizes:
            for method in ("two", "mae", "one"):
                for way in ("compiled", "eager") if not self.dry else ("eager",):
                    for batch in self.batches:
                        key = f"rates/{size}/{method}/{way}/b{batch}"
                        work = partial(self.rate, size, method, way, batch, peak.get("flops", float("nan")))
                        if self.book.measure(key, 20 if way == "eager" else 40, work).get("out_of_memory"):
                            break
            for method, rival in (("two", "naive"), ("one", "naive"), ("mae", "transformers")):
                batch = self.batches[0]
                key = f"rates/{size}/{method}/{rival}/b{batch}"
                self.book.measure(key, 15, partial(self.rival, size, method, rival, batch))

    def rate(self, size: str, method: str, way: str, batch: int, peak: float) -> dict[str, Any]:
        """Images/s, MFU against the product measured in this run, peak of memory, host waits a step."""
        import torch

        from benchmarks.steps import METHODS, our_trainer
        from cmt_mae.tools.bench import measure
        from cmt_mae.tools.bench.flops import flop_per_image

        torch._dynamo.reset()
        run = self.settings(method, size, batch, **{"runtime.compile": way == "compiled"})
        if way == "compiled":
            run.frozen_precision = "bf16"
        trainer, task, batches, step = our_trainer(run, METHODS[method][1], pin=not self.dry)
        measure.forget_peak(self.device)
        rounds, count = (5, 5) if not self.dry else (1, 1)
        timed = measure.rates(trainer, batches, step, batch, rounds, count)
        networks = (task.learner, task.frozen_networks, task.alphas_at(step), task.plan.n_mask)
        flop = sum(flop_per_image(*networks).values())
        return {
            **timed, "mfu": timed["images_per_second"]["median"] * flop / peak,
            "peak_memory_gb": measure.peak_gb(self.device),
            "host_waits": host_waits(lambda: trainer.step(batches, step), self.device),
        }  # fmt: skip

    def rival(self, size: str, method: str, name: str, batch: int) -> dict[str, Any]:
        """The plain version or transformers' MAE under autocast, images ready on the device."""
        import torch

        from benchmarks import steps
        from benchmarks.naive_cmt import make_optimizer
        from cmt_mae.tools.bench.measure import spread, synchronise

        run = self.settings(method, size, batch)
        images = steps.images_of(run).to(self.device)
        if name == "transformers":
            if importlib.util.find_spec("transformers") is None:
                return {"absent": "transformers is not installed here"}
            model = steps.transformers_model(run)
        else:
            model = steps.naive_model(run, steps.frozen_backbone(run), "last")
            if method == "two":
                model.start_stage_two()
        model = model.to(self.device)
        for key in ("mean", "std", "teacher_mean", "teacher_std", "projection"):  # plain tensors of naive_cmt
            if isinstance(getattr(model, key, None), torch.Tensor):
                setattr(model, key, getattr(model, key).to(self.device))
        optimizer = (
            make_optimizer(model) if name == "naive"
            else torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
        )  # fmt: skip

        def step() -> None:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=not self.dry):
                loss = model(images) if name == "naive" else model(pixel_values=images).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if getattr(model, "momentum", None) is not None:
                model.update_momentum(0.996)

        seconds, count = [], 1 if self.dry else 5
        for number in range(2 if self.dry else 6):
            synchronise(self.device)
            begin = time.perf_counter()
            for _ in range(count):
                step()
            synchronise(self.device)
            if number:
                seconds.append((time.perf_counter() - begin) / count)
        return {"images_per_second": spread([batch / s for s in seconds]), "step_seconds": spread(seconds)}

    # --- quality ---

    def quality(self) -> None:
        """The time that is left, halved between cmt and mae (ViT-S/16 at 128 px), each measured at its end."""
        if not self.given.data and not self.dry:
            self.book.left.append("quality: give --data")
            return
        self.book.measure("quality", 60, self.learn)

    def learn(self) -> dict[str, Any]:
        """What ``benchmarks.quality`` finds in a share of the time that leaves some for starts and measuring."""
        from benchmarks import quality

        minutes = max(0.0, self.book.seconds_left() - 100) / 2 / 60
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            given = {
                "data": colours(folder / "data", 24, classes=2) if self.dry else self.given.data,
                "scale": "nano48" if self.dry else "imagenette_vits16,benchmarks/vits16_128.yaml",
                "batch": 16 if self.dry else 256, "minutes": minutes, "seeds": 1, "points": 1,
                "contestants": "cmt,mae", "device": self.device.type, "work": folder, "out": self.given.out.parent,
                "workers": 0 if self.dry else min(14, (os.cpu_count() or 2) - 1),
            }  # fmt: skip
            words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
            found = quality.main([*words, *(["--quick"] if self.dry else [])])
        return {key: entry for key, entry in found["entries"].items() if not key.startswith("tune")}

    def end(self) -> int:
        """Verdicts, the last words, the exit status."""
        entries = self.book.entries
        lines = [f"{key}: {entry['error']}" for key, entry in entries.items() if "error" in entry]
        for place, wanted in TARGETS.items():
            found = {k: e["mfu"] for k, e in entries.items() if k.startswith(f"rates/{place}/") and "mfu" in e}
            if found:
                best = max(found, key=lambda k: found[k])
                word = "met" if found[best] >= wanted else "missed"
                lines.append(f"{place}: MFU {found[best]:.1%} of {wanted:.0%} wanted, {word} ({best})")
        waits = {k: e["host_waits"] for k, e in entries.items() if e.get("host_waits")}
        lines += [f"{key}: {count} host waits in a step, 0 wanted" for key, count in waits.items()]
        self.book.content["verdicts"] = lines
        self.book.write()
        print("\n".join(lines), file=sys.stderr)
        if self.book.left:
            print(f"no time left for {len(self.book.left)}: the same command goes on", file=sys.stderr)
        bad = any("error" in entry for entry in entries.values())
        return 1 if bad else 3 if self.book.left else 0


def host_waits(step: Callable[[], object], device: Any) -> int:
    """How often the host waits for the device inside one step; on a CPU: how often it reads a tensor's value."""
    import torch

    if device.type != "cuda":
        with reading() as seen:
            step()
        return len(seen)
    torch.cuda.synchronize(device)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in heard)


@contextlib.contextmanager
def reading() -> Iterator[list[str]]:
    """Names of the operations inside that hand a tensor's value to the host."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = op.overloadpacket.__name__
            if name in READS and any(isinstance(a, torch.Tensor) and a.numel() > 0 for a in args):
                seen.append(name)
            return op(*args, **(kwargs or {}))

    with Watch():
        yield seen


def colours(folder: Path, count: int, classes: int = 1) -> Path:
    """Noisy pictures of 40 px in class folders, train and val."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for number in range(count):
            place = folder / split / f"class{number % classes}"
            place.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"{number}.png")
    return folder


def flat(state: Any, name: str = "") -> dict[str, Any]:
    """Every tensor of a checkpoint by its path."""
    import torch

    if isinstance(state, torch.Tensor):
        return {name: state}
    pairs = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return {k: v for key, value in pairs for k, v in flat(value, f"{name}/{key}").items()}


if __name__ == "__main__":
    sys.exit(main())
