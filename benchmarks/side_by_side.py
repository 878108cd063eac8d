"""Speed side by side with public code: contestants in turns, medians of at least 7 rounds.

    python -m benchmarks.side_by_side                       # all parts, about 10 minutes on 2 free cores
    python -m benchmarks.side_by_side --parts mae,cmt       # some parts; the others keep their earlier numbers
    python -m benchmarks.side_by_side --sizes small,vits16,vitb16
    python -m benchmarks.side_by_side --quick               # does everything work? (no measurement)
    python -m benchmarks.side_by_side --page                # the page anew from the numbers there are

writes docs/results/speed.json after every comparison, and docs/results/speed.md from it. A quick run writes to
runs/speed_quick instead. Set OMP_NUM_THREADS for another number of threads.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import loaders, steps
from benchmarks.speed_page import page
from benchmarks.steps import describe, settings
from benchmarks.timing import (
    OURS,
    REPOSITORY,
    RESULTS,
    SHARED,
    Comparison,
    Contestant,
    Step,
    alternate,
    alternate_processes,
    stamp,
)
from cmt_mae.core.files import write_atomically, write_json
from cmt_mae.core.runs import environment
from cmt_mae.engine import compiling
from cmt_mae.pretraining.settings import PretrainConfig
from cmt_mae.tools.bench.flops import flop_per_image

COMPILED = "ours, compiled"
RIVALS = ("transformers", "lightly", "naive, maps in last", "naive, maps in all")
APART = (
    "Each runs in a process of its own, as its users start it: ours keeps freed memory for the next step "
    "(engine/processes.py); 'memory kept' is the rival in such a process, 'ours, compiled' has "
    "--runtime.compile true."
)
SIZES = ("small", "vits16", "vitb16")


@dataclass
class Options:
    """How much is measured."""

    rounds: int = 7
    """Timings of each contestant; the median counts."""
    sizes: tuple[str, ...] = SIZES[:2]
    """Which networks, see ``steps.SIZES``."""
    quick: bool = False
    """A smoke run: everything small, 2 rounds, no measurement."""
    shared: Path = SHARED
    """Folder with data/photos and data/imagenette."""

    def settings(self, method: str, size: str, **changes: Any) -> PretrainConfig:
        """Those of ``steps.settings``; quick: with 2 images a step."""
        return settings(method, size, **({"batch_size": 2} if self.quick else {}), **changes)


def compiled(config: PretrainConfig) -> PretrainConfig:
    """The same with compiled blocks."""
    return replace(config, runtime=replace(config.runtime, compile=True))


# --- steps ---------------------------------------------------------------------------------------------


def compare_mae(options: Options) -> Iterator[dict[str, Any]]:
    """Our `mae` against transformers' ViTMAEForPreTraining and lightly's MAE."""
    for size in options.sizes:
        config = options.settings("mae", size)
        theirs = partial(steps.transformers, config)
        makers: dict[str, Callable[[], Step]] = {
            OURS: partial(steps.ours, config, "one"),
            "transformers": theirs,
            "transformers, memory kept": partial(steps.keeping, theirs),
            "lightly": partial(steps.lightly, config),
        }
        comparison = Comparison(
            "mae", f"mae/{size}",
            f"One optimizer step of MAE on {config.batch_size} images, {describe(config)}: ours from uint8, "
            "transformers' ViTMAEForPreTraining (SDPA, its default; gradients clipped, as its Trainer does by "
            "default) and lightly's MAE (timm's blocks, raw pixels as target) with fused AdamW from normalised "
            f"images. {APART}",
            config.batch_size, facts={"dtype": "fp32"},
        )  # fmt: skip
        yield compared_steps(comparison, makers, config, "one", 1.25, options.rounds)


def compare_cmt(options: Options) -> Iterator[dict[str, Any]]:
    """Our `cmt` against the paper written plainly on timm, stage by stage."""
    for size in options.sizes:
        config = options.settings("two", size)
        for stage in ("one", "two"):
            makers: dict[str, Callable[[], Step]] = {OURS: partial(steps.ours, config, stage)}
            for how in ("last", "all"):
                makers[f"naive, maps in {how}"] = partial(steps.naive, config, stage, how)
            makers["naive, memory kept"] = partial(
                steps.keeping, partial(steps.naive, config, stage)
            )
            teacher = steps.frozen_backbone(config).source
            comparison = Comparison(
                "cmt", f"cmt/{size}/{stage}",
                f"One optimizer step of CMT-MAE, stage {stage}, on {config.batch_size} images, "
                f"{describe(config)}, teacher {teacher}. Naive is benchmarks/naive_cmt.py; attention maps "
                "exist as matrices in the last block only, or in all blocks of teacher and momentum student, as "
                f"Hugging Face's output_attentions does. {APART}",
                config.batch_size, facts={"dtype": "fp32"},
            )  # fmt: skip
            wanted = 1.6 if stage == "two" else None
            yield compared_steps(comparison, makers, config, stage, wanted, options.rounds)


def compared_steps(
    comparison: Comparison, makers: dict[str, Callable[[], Step]], config: PretrainConfig, stage: str,
    wanted: float | None, rounds: int,
) -> dict[str, Any]:  # fmt: skip
    """Each in a process of its own, our compiled step too; what cannot run here is named."""
    for name, why in (
        ("lightly", steps.why_not_lightly() if "lightly" in makers else ""),
        (COMPILED, compiling.why_not(torch.device("cpu"))),
    ):
        if why:
            comparison.absent[name] = why
            makers.pop(name, None)
        elif name == COMPILED:
            makers[name] = partial(steps.ours, compiled(config), stage)
    if wanted is not None:
        comparison.target = {name: wanted for name in makers if name in RIVALS}
    contestants = {name: Contestant(maker) for name, maker in makers.items()}
    return comparison.measured(alternate_processes(contestants, rounds).seconds)


def compare_memory(options: Options) -> Iterator[dict[str, Any]]:
    """Peaks at the largest size asked for; wanted: stage two within 1.25 x mae plus the frozen weights."""
    size, images = options.sizes[-1], 2 if options.quick else 8
    mae, cmt = (settings(method, size, batch_size=images) for method in ("mae", "two"))
    contestants = {
        "mae": Contestant(partial(steps.ours, mae, "one")),
        "transformers": Contestant(partial(steps.transformers, mae), imports="transformers"),
        **{s: Contestant(partial(steps.ours, cmt, s)) for s in ("one", "two")},
        **{f"naive {s}": Contestant(partial(steps.naive, cmt, s)) for s in ("one", "two")},
    }
    peaks = {}
    for name, contestant in contestants.items():  # one at a time: all at once may not fit
        facts = alternate_processes({name: contestant}, rounds=1, warm=1, turn_s=0).facts[name]
        peaks[name] = {"frozen_gb": 0.0, **facts}
    own, two = peaks["mae"]["above_start_gb"], peaks["two"]["above_start_gb"]
    yield {
        "part": "memory",
        "name": f"memory/{size}",
        "what": f"Peak of resident memory of 2 optimizer steps of {images} images, {describe(cmt)}, above what "
        "the process held after its imports. Each contestant runs in a process of its own.",
        **stamp(),
        "peaks": peaks,
        "facts": {
            "dtype": "fp32", "allowed_gb": 1.25 * own + peaks["two"]["frozen_gb"], "stage_two_gb": two,
            "rule": "1.25 x mae + weights of teacher and momentum student",
        },
    }  # fmt: skip


# --- where the time goes ------------------------------------------------------------------------------

KINDS: dict[str, tuple[str, ...]] = {
    # kind: beginnings of the names of torch's operations
    "matrix products": (
        "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mkldnn_convolution",
        "aten::convolution_backward", "aten::_convolution",
    ),
    "attention": ("aten::_scaled_dot_product",),
    "optimizer and average": ("aten::_fused_adamw", "aten::lerp", "aten::_foreach", "Optimizer."),
}  # fmt: skip
PROFILED = 3  # steps


def compare_profile(options: Options) -> Iterator[dict[str, Any]]:
    """MAE and stage two of CMT-MAE, ours and the rival: what no step in fp32 can go below. One thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for size in options.sizes:
            mae, cmt = options.settings("mae", size), options.settings("two", size)
            pairs = (
                ("mae", mae, steps.ours(mae, "one"), "transformers", steps.transformers(mae), 1.25),
                ("cmt", cmt, steps.ours(cmt, "two"), "naive", steps.naive(cmt, "two"), 1.6),
            )
            for method, config, own, rival, theirs, wanted in pairs:
                kinds = {OURS: by_kind(own.run), rival: by_kind(theirs.run)}
                limit = sum(kinds[rival].values()) / kinds[OURS]["matrix products"]
                yield {
                    "part": "profile",
                    "name": f"profile/{method}/{size}",
                    "what": f"CPU time of one step ({'MAE' if method == 'mae' else 'stage two'}, "
                    f"{config.batch_size} images, {describe(config)}) on one thread, by torch's profiler, mean of "
                    f"{PROFILED} steps. The limit: the rival's whole step over our matrix products alone, as if "
                    "everything else of ours took no time.",
                    **stamp(),
                    "milliseconds": kinds,
                    "facts": {"dtype": "fp32", "limit": limit, "wanted_ratio": wanted, "rival": rival},
                }  # fmt: skip
    finally:
        torch.set_num_threads(threads)


def by_kind(step: Callable[[], object]) -> dict[str, float]:
    """Self time of a step in milliseconds by ``KINDS`` and the rest."""
    step()
    step()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(PROFILED):
            step()
    times = dict.fromkeys([*KINDS, "everything else"], 0.0)
    for event in found.key_averages():
        kinds = (k for k, names in KINDS.items() if event.key.startswith(names))
        times[next(kinds, "everything else")] += event.self_cpu_time_total / 1000 / PROFILED
    return times


COSTS: dict[str, dict[str, dict[str, Any]]] = {
    # axis: point -> settings beside the small preset; "stage" is measured at every size
    "image size": {f"{px} px": {"student.img_size": [px]} for px in (64, 96, 128)},
    "width": {
        f"width {w}": {"student.width": w, "student.heads": w // 32} for w in (128, 192, 256, 384)
    },
    "alpha": {f"alpha {a}": {"alpha": a} for a in (0.0, 0.3, 1.0)},
}
STAGES = {"mae": "mae", "stage one": "one", "stage two": "two"}


def compare_cost(options: Options) -> Iterator[dict[str, Any]]:
    """Time of our step against its multiplications, over stage, image size, width and alpha."""
    for size in options.sizes:
        points = {name: (options.settings(m, size), m) for name, m in STAGES.items()}
        yield measure_costs("stage", size, points, options)
    for axis, values in COSTS.items():
        made = {name: options.settings("two", "small", **more) for name, more in values.items()}
        # alpha 0 is stage one for ever: it has no switch, and a step of it is a step of stage one
        points = {name: (c, "two" if c.needs_momentum() else "one") for name, c in made.items()}
        yield measure_costs(axis, "small", points, options)


def measure_costs(
    axis: str, size: str, points: dict[str, tuple[PretrainConfig, str]], options: Options
) -> dict[str, Any]:
    """One axis: time, multiplications and their ratio at every point."""
    contestants, gflop = {}, {}
    for name, (config, stage) in points.items():
        trainer, task, batches, at = steps.our_trainer(config, stage)
        contestants[name] = partial(trainer.step, batches, at)
        counted = flop_per_image(
            task.learner, task.frozen_networks, task.alphas_at(at), task.plan.n_mask
        )
        gflop[name] = 1e-9 * sum(counted.values())
    batch = next(iter(points.values()))[0].batch_size
    comparison = Comparison(
        "cost", f"cost/{size}/{axis}",
        f"Our step on {batch} images at several settings ({axis}), size {size}, and the GFLOP an image that it "
        "computes (forward and backward, matrix products only).",
        batch, facts={"dtype": "fp32", "gflop_per_image": gflop},
    )  # fmt: skip
    entry = comparison.measured(alternate(contestants, options.rounds))
    for name, row in entry["contestants"].items():
        row["gflop_per_second"] = row["rate"] * gflop[name]
    if axis == "stage":
        entry["facts"]["stage_two_over_mae"] = over_mae(entry, gflop)
    return entry


def over_mae(entry: dict[str, Any], gflop: dict[str, float]) -> dict[str, float]:
    """Cost of stage two over our own MAE: by time (median of the rounds' ratios), by FLOP, and one over the
    other (wanted: 1.05 at most)."""
    rows = entry["contestants"]
    rounds = zip(rows["stage two"]["seconds"], rows["mae"]["seconds"], strict=True)
    ratios = sorted(two / mae for two, mae in rounds)
    time, flop = ratios[len(ratios) // 2], gflop["stage two"] / gflop["mae"]
    return {"time": time, "flop": flop, "excess": time / flop, "wanted_excess_at_most": 1.05}


# --- the command -----------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Any], Iterator[dict[str, Any]]]] = {
    "mae": compare_mae,
    "cmt": compare_cmt,
    "profile": compare_profile,
    "cost": compare_cost,
    "memory": compare_memory,
    "loader": loaders.compare_loader,
}


def main(words: list[str] | None = None) -> dict[str, Any]:
    """Run the parts asked for; returns the content of the JSON file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated")
    parser.add_argument("--sizes", default=",".join(SIZES[:2]), help=f"of {', '.join(SIZES)}")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="smoke run: small, 2 rounds")
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page")
    parser.add_argument("--shared", type=Path, default=SHARED)
    parser.add_argument("--out", type=Path, default=None, help="folder for speed.json and speed.md")
    given = parser.parse_args(words)
    parts, sizes = given.parts.split(","), tuple(given.sizes.split(","))
    for chosen, known in ((parts, list(PARTS)), (sizes, list(SIZES))):
        for name in chosen:
            if name not in known:
                parser.error(f"'{name}' is unknown: use {', '.join(known)}")
    if given.rounds < 7:
        parser.error(
            "a median of fewer than 7 rounds is no measurement: give --rounds 7 or more, or --quick"
        )
    options = Options(given.rounds, sizes, given.quick, given.shared)
    if given.quick:
        options.rounds, options.sizes = 2, ("small",)
    out = given.out or (REPOSITORY / "runs" / "speed_quick" if given.quick else RESULTS)
    return run([] if given.page else parts, options, out)


def run(parts: list[str], options: Options, out: Path) -> dict[str, Any]:
    """Measure part by part, writing as it goes."""
    path, begin = out / "speed.json", time.perf_counter()
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"comparisons": {}}
    for number, part in enumerate(parts, start=1):
        print(f"[{number}/{len(parts)}] {part}", file=sys.stderr, flush=True)
        for entry in PARTS[part](options):
            say(entry)
            content["comparisons"][entry["name"]] = entry | {"quick": options.quick}
            content |= {
                "command": "python -m benchmarks.side_by_side",
                "threads": torch.get_num_threads(),
                "seconds_of_last_run": round(time.perf_counter() - begin, 1),
                **environment(),
            }
            write_json(path, content)
    text = page(content)
    write_atomically(out / "speed.md", lambda aside: aside.write_text(text, encoding="utf-8"))
    return content


def say(entry: dict[str, Any]) -> None:
    """One line for each contestant, as it is measured."""
    for name, row in entry.get("contestants", entry.get("peaks", {})).items():
        ratio = row.get("times_ours")
        text = f"  {ratio['median']:.2f} x ours" if ratio else ""
        found = f"{row['rate']:.4g} {entry['unit']}/s" if "rate" in row else f"{row['peak_gb']:.2f} GB"
        print(f"{entry['name']:28} {name:28} {found}{text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
