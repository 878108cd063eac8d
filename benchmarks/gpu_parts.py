"""The measurements of benchmarks/gpu.py, one entry of the JSON file each."""

import argparse
import gc
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_data, gpu_equal
from benchmarks.gpu import TARGETS, read, scratch, workers_of
from benchmarks.gpu_variants import VARIANTS, Variant, settings, stepper_of
from cmt_mae.backbones import Backbone
from cmt_mae.core.files import write_json
from cmt_mae.core.runs import environment
from cmt_mae.pretraining import assemble
from cmt_mae.pretraining.stepping import Stepper
from cmt_mae.tools.bench import measure
from cmt_mae.tools.bench.build import synthetic_batches
from cmt_mae.tools.bench.flops import OURS, PLAIN, step_macs, step_of

SECONDS = {"equal": 60, "variants": 60, "sweep": 15, "loader": 60, "shares": 20, "profile": 30}


class Book:
    """The JSON file: what is measured, what failed, and the time that is left."""

    def __init__(self, path: Path, budget_s: float, dry: bool) -> None:
        self.path, self.end = path, time.perf_counter() + budget_s
        self.content: dict[str, Any] = {"entries": {}, **read(path)}
        self.content.update(
            dry_run=dry, **environment(), date=datetime.now(UTC).isoformat(timespec="seconds")
        )
        self.entries: dict[str, Any] = self.content["entries"]
        self.left: list[str] = []

    def measure(
        self, key: str, needed_s: float, work: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """The entry of this name: from the file, or measured now; {} where no time is left for it."""
        found: dict[str, Any] = self.entries.get(key, {})
        if found and "error" not in found:
            return found
        if time.perf_counter() + needed_s > self.end:
            self.left.append(key)
            return {}
        begin = time.perf_counter()
        try:
            entry = work()
        except torch.OutOfMemoryError:
            peak = torch.cuda.max_memory_allocated() / 1e9
            entry = {"out_of_memory": True, "peak_memory_gb": peak}
        except Exception as error:  # one way that fails must not cost the others
            text = " ".join(str(error).split())[:600]
            entry = {"error": f"{type(error).__name__}: {text}"}
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        entry["seconds"] = round(time.perf_counter() - begin, 1)
        self.entries[key] = entry
        self.write()
        print(f"{key:55} {told(entry)}", file=sys.stderr, flush=True)
        return entry

    def write(self) -> None:
        """After every measurement: a cut loses nothing."""
        self.content["left"] = self.left
        write_json(self.path, self.content)


def told(entry: dict[str, Any]) -> str:
    """One line for people."""
    if "error" in entry or "out_of_memory" in entry:
        return str(entry.get("error", f"out of memory at {entry.get('peak_memory_gb', 0):.1f} GB"))
    if "differs" in entry:
        return "equal" if not entry["differs"] else f"DIFFERS: {'; '.join(entry['differs'])}"
    if "images_per_second" in entry:
        rate = entry["images_per_second"]
        median = rate["median"] if isinstance(rate, dict) else rate
        text = f"{median:9.1f} images/s"
        if "mfu" in entry:
            text += f", MFU {entry['mfu']:.1%} (plain count {entry['mfu_plain']:.1%})"
            text += f", {entry['peak_memory_gb']:.1f} GB"
        if "lost_share" in entry:
            text += f", lost to data {entry['lost_share']:.1%}"
        return text
    return f"{entry['seconds']} s"


def run_parts(given: argparse.Namespace) -> int:
    """All parts asked for, the most telling first. Exit status as ``gpu.main``."""
    book = Book(given.out, given.budget_s, given.dry_run)
    device = torch.device("cuda" if torch.cuda.is_available() and not given.dry_run else "cpu")
    backbones: dict[str, Backbone] = {}
    precision = "bf16" if device.type == "cuda" else "fp32"
    peak = book.measure("peak", 5, lambda: measure.peak_flops(device, precision, "measured"))
    work = Work(given, book, device, backbones, peak.get("flops", float("nan")))
    for part in given.parts.split(","):
        getattr(work, part)()
    book.content["verdicts"] = verdicts(book.entries)
    book.write()
    for line in book.content["verdicts"]:
        print(line, file=sys.stderr)
    if book.left:
        print(f"no time left for {len(book.left)}: the same command goes on", file=sys.stderr)
    bad = [k for k, e in book.entries.items() if "error" in e or e.get("differs")]
    if bad:
        print(f"failed or different: {', '.join(bad)}", file=sys.stderr)
    return 1 if bad else 3 if book.left else 0


class Work:
    """What the measurements share."""

    def __init__(
        self, given: argparse.Namespace, book: Book, device: torch.device,
        backbones: dict[str, Backbone], peak: float,
    ) -> None:  # fmt: skip
        self.given, self.book, self.device = given, book, device
        self.backbones, self.peak = backbones, peak
        self.sizes, self.methods = given.sizes.split(","), given.methods.split(",")
        self.ways = given.variants.split(",")
        self.references: dict[tuple[str, str], tuple[Any, Any]] = {}
        # a dry run does not wait for bf16
        self.precision = "fp32" if device.type == "cpu" else "bf16"
        self.kind = "cpu" if device.type == "cpu" else "cuda"
        self.steps = 10 if device.type == "cuda" else 1

    def settings(self, size: str, method: str, variant: Variant, batch: int, precision: str) -> Any:
        """Of a run on this device."""
        run = settings(size, method, variant, batch, precision=precision)
        run.runtime.device = self.kind
        return run

    def open(
        self, stack: ExitStack, size: str, method: str, variant: Variant, batch: int, precision: str = ""
    ) -> tuple[Stepper, Any, int]:  # fmt: skip
        """A stepper, its teacher and a step of its stage."""
        torch._dynamo.reset()  # code of other shapes would count against the limit of recompiling
        run = self.settings(size, method, variant, batch, precision or self.precision)
        made: tuple[Stepper, Any, int] = stack.enter_context(
            stepper_of(run, method, variant, self.backbones)
        )
        return made

    def batches(self, stepper: Stepper, teacher: Any, count: int, seed: int = 0) -> Any:
        """Synthetic ones."""
        run = stepper.config
        return synthetic_batches(
            assemble.crop_settings(run, teacher), run.mask.rule, stepper.plan.n_patches, count, seed,
            pin=self.device.type == "cuda",
        )  # fmt: skip

    def usable(self, name: str, method: str) -> bool:
        """Not everything fits pixel MAE, which has no frozen network."""
        variant = VARIANTS[name]
        only_frozen = (
            variant.fp8 or variant.second_stream or variant.graph == "guides" or name == "frozen"
        )
        return not (method == "mae" and only_frozen) and not (
            variant.second_stream and method != "two"
        )

    # --- equal ---

    def equal(self) -> None:
        """Every way against the eager fp32 step, in fp32 and in bf16, at few images."""
        for size in self.sizes:
            for method in self.methods:
                for name in self.ways:
                    if name != "eager" and self.usable(name, method):
                        self.equal_one(size, method, name)

    def equal_one(self, size: str, method: str, name: str) -> dict[str, Any]:
        """The check of one way (made once; the other parts ask for it)."""
        key = f"equal/{size}/{method}/{name}"
        return self.book.measure(key, SECONDS["equal"], lambda: self.compare(size, method, name))

    def compare(self, size: str, method: str, name: str) -> dict[str, Any]:
        variant = VARIANTS[name]
        wanted, eager = self.reference(size, method)
        entry: dict[str, Any] = {"errors": {}, "differs": []}
        if not variant.fp8:
            plain = replace(variant, frozen_bf16=False)
            found = gpu_equal.errors(self.look(size, method, plain, "fp32", wanted["mask"]), wanted)
            entry["errors"]["fp32"] = found
            entry["differs"] += [f"fp32 {x}" for x in gpu_equal.judge(found, "fp32", "same", None)]
        yardstick = gpu_equal.errors(eager, wanted)
        found = gpu_equal.errors(self.look(size, method, variant, "bf16", wanted["mask"]), wanted)
        kind = "fp8" if variant.fp8 else "frozen" if variant.frozen_bf16 else "same"
        entry["errors"] |= {"bf16": found, "bf16_eager": yardstick}
        entry["differs"] += [f"bf16 {x}" for x in gpu_equal.judge(found, "bf16", kind, yardstick)]
        return entry

    def reference(self, size: str, method: str) -> tuple[Any, Any]:
        """The eager step in fp32, and in bf16 with the same mask."""
        if (size, method) not in self.references:
            wanted = self.look(size, method, VARIANTS["eager"], "fp32", None)
            eager = self.look(size, method, VARIANTS["eager"], "bf16", wanted["mask"])
            self.references[size, method] = wanted, eager
        return self.references[size, method]

    def look(self, size: str, method: str, variant: Variant, precision: str, mask: Any) -> Any:
        """One forward and backward, on the second of two batches."""
        count = 4 if self.device.type == "cpu" else 16
        with ExitStack() as stack:
            stepper, teacher, step = self.open(stack, size, method, variant, count, precision)
            batches = [next(self.batches(stepper, teacher, count, seed)) for seed in (1, 2)]
            return gpu_equal.look(stepper, batches, step, mask)

    # --- variants and sweep ---

    def rate(self, stepper: Stepper, teacher: Any, step: int, count: int) -> dict[str, Any]:
        """Images/s, MFU against the product measured in this run, peak of memory."""
        batches = self.batches(stepper, teacher, count)
        measure.forget_peak(self.device)
        timed = measure.rates(stepper, batches, step, count, self.given.rounds, self.steps)
        sizes = step_of(
            stepper.learner, stepper.guides, stepper.weights_at(step), stepper.plan.n_mask
        )
        counts = {"mfu": step_macs(sizes, OURS), "mfu_plain": step_macs(sizes, PLAIN)}
        flop = {name: 2 * sum(count.values()) for name, count in counts.items()}
        rate = timed["images_per_second"]["median"]
        return {
            **timed,
            "batch": count,
            "gflop_per_image": flop["mfu"] / 1e9,
            "gflop_per_image_plain": flop["mfu_plain"] / 1e9,
            **{name: rate * value / self.peak for name, value in flop.items()},
            "peak_memory_gb": measure.peak_gb(self.device),
        }

    def timed(self, size: str, method: str, name: str, count: int) -> dict[str, Any]:
        with ExitStack() as stack:
            stepper, teacher, step = self.open(stack, size, method, VARIANTS[name], count)
            return self.rate(stepper, teacher, step, count)

    def variants_of(self, size: str, method: str) -> None:
        for name in self.ways:
            if not self.usable(name, method):
                continue
            if name != "eager":
                check = self.equal_one(size, method, name)
                if not check or "error" in check or check.get("differs"):
                    continue  # told already; a step that is not the step needs no time
            key = f"variants/{size}/{method}/{name}/b{self.given.batch}"
            self.book.measure(
                key, SECONDS["variants"],
                partial(self.timed, size, method, name, self.given.batch),
            )  # fmt: skip

    def variants(self) -> None:
        """Every way at one batch size."""
        for method in self.methods:
            for size in self.sizes:
                self.variants_of(size, method)

    def sweep(self) -> None:
        """Batch sizes, up to the first that does not fit: eager, and the way called best."""
        for name in dict.fromkeys(("eager", self.given.best)):
            for method in self.methods:
                for size in self.sizes:
                    for count in map(int, self.given.batches.split(",")):
                        slow = SECONDS["sweep" if name == "eager" else "variants"]
                        entry = self.book.measure(
                            f"sweep/{size}/{method}/{name}/b{count}", slow,
                            partial(self.timed, size, method, name, count),
                        )  # fmt: skip
                        if entry.get("out_of_memory"):
                            break

    # --- real images, shares, kernels ---

    def loader(self) -> None:
        """Tar shards and packed arrays: the loader alone, then the step that it feeds."""
        given, workers = self.given, workers_of(self.given)
        count = 8 if given.dry_run else 4096
        with scratch() as folder:
            data = self.book.measure(
                f"loader/data {given.photos}".strip(), SECONDS["loader"],
                lambda: gpu_data.make_data(Path(folder), count, workers, given.photos, given.dry_run),
            )  # fmt: skip
            if not data or "error" in data:
                return
            if not Path(data["packed"]).exists():  # from an earlier call, on a machine that is gone
                data = gpu_data.make_data(Path(folder), count, workers, given.photos, given.dry_run)
            for kind in ("packed", "tar", "photos"):
                if kind in data:
                    self.load(kind, data[kind], workers)

    def load(self, kind: str, path: str, workers: int) -> None:
        given, size = self.given, self.sizes[0]
        alone = "eager" if given.dry_run else given.best

        def rate() -> dict[str, Any]:
            crops = assemble.crop_settings(
                self.settings(size, "mae", VARIANTS["eager"], given.batch, "fp32"), None
            )
            batches = 2 if given.dry_run else 30
            return gpu_data.loader_rate(path, crops, given.batch, workers, batches)

        def fed() -> dict[str, Any]:
            with ExitStack() as stack:
                stepper, teacher, step = self.open(stack, size, "two", VARIANTS[alone], given.batch)
                bare = self.rate(stepper, teacher, step, given.batch)["images_per_second"]
                return gpu_data.fed_step(
                    stepper, teacher, path, step, given.batch, workers, given.rounds,
                    self.steps, bare["median"],
                )  # fmt: skip

        self.book.measure(f"loader/{kind}/alone", SECONDS["loader"], rate)
        self.book.measure(f"loader/{kind}/fed {size} two {alone}", SECONDS["loader"], fed)

    def shares(self) -> None:
        """Share of each part of the step (waiting at each border, so slower than the step itself)."""
        for name in ("eager", "compiled_frozen"):
            for method in self.methods:
                for size in self.sizes:
                    self.book.measure(
                        f"shares/{size}/{method}/{name}", SECONDS["shares"],
                        partial(self.share, size, method, name),
                    )  # fmt: skip

    def share(self, size: str, method: str, name: str) -> dict[str, Any]:
        count = self.given.batch
        with ExitStack() as stack:
            stepper, teacher, step = self.open(stack, size, method, VARIANTS[name], count)
            batches = self.batches(stepper, teacher, count)
            for _ in range(2):
                stepper.step(batches, step)
            return measure.shares(stepper, batches, step, self.steps)

    def profile(self) -> None:
        """Kernels by time. The whole table goes beside the JSON file; no trace is kept (hundreds of MB)."""
        for name in dict.fromkeys(("eager", self.given.best)):
            for size in self.sizes:
                self.book.measure(
                    f"profile/{size}/two/{name}", SECONDS["profile"],
                    partial(self.kernels, size, name),
                )  # fmt: skip

    def kernels(self, size: str, name: str) -> dict[str, Any]:
        from torch.profiler import ProfilerActivity, profile

        count, cuda = self.given.batch, self.device.type == "cuda"
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
        with ExitStack() as stack:
            stepper, teacher, step = self.open(stack, size, "two", VARIANTS[name], count)
            batches = self.batches(stepper, teacher, count)
            for _ in range(3):
                stepper.step(batches, step)
            measure.synchronise(self.device)
            with profile(activities=activities) as seen:
                for _ in range(3):
                    stepper.step(batches, step)
                measure.synchronise(self.device)
        order = "self_device_time_total" if cuda else "self_cpu_time_total"
        rows = seen.key_averages()
        text = rows.table(sort_by=order, row_limit=40, max_name_column_width=90)
        table = self.given.out.with_name(f"{self.given.out.stem}_profile_{size}_{name}.txt")
        table.write_text(text, encoding="utf-8")
        total = sum(getattr(row, order) for row in rows)
        top = sorted(rows, key=lambda row: -getattr(row, order))[:20]
        return {
            "table": table.name,
            "ms_per_step": total / 3e3,
            "top": [
                {"name": row.key[:120], "share": getattr(row, order) / total, "calls": row.count}
                for row in top
            ],
        }  # fmt: skip


def verdicts(entries: dict[str, Any]) -> list[str]:
    """The targets of issue 4, section 4, against the best that is equal and fits."""
    lines = []
    for place, wanted in TARGETS.items():
        rates = {
            key: entry["images_per_second"]["median"]
            for key, entry in entries.items()
            if key.startswith((f"variants/{place}/", f"sweep/{place}/"))
            and "images_per_second" in entry
        }
        if rates:
            best = max(rates, key=lambda key: rates[key])
            met = "met" if rates[best] >= wanted else "missed"
            lines.append(
                f"{place}: {rates[best]:.0f} images/s of {wanted:.0f} wanted, {met} ({best})"
            )
    for key, entry in entries.items():
        if "lost_share" in entry:
            met = "met" if entry["lost_share"] < 0.05 else "missed"
            lines.append(f"{key}: {entry['lost_share']:.1%} lost to data of 5 % allowed, {met}")
    return lines
