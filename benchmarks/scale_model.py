"""What a run on N GPUs costs: a few formulas, and the tables that docs/scale.md makes of them.

    python -m benchmarks.scale_model        # writes the tables of docs/scale.md anew, from docs/results/scale.json

Nothing here was measured on several GPUs. Sizes and multiplications are exact, bandwidths and the sustained rate
of a GPU are assumptions (``Machine``), loader and checkpoint numbers are those of docs/results/scale.json.
"""

import json
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from timm.layers import QuickGELU
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from benchmarks.timing import REPOSITORY, RESULTS, markdown
from cmt_mae.core.files import write_atomically
from cmt_mae.method.cmtmae import Alphas, MaskConfig, StudentWithDecoder, TargetConfig
from cmt_mae.method.decoder import DecoderConfig
from cmt_mae.method.frozen import FrozenNetworks
from cmt_mae.method.teacher import Teacher, TeacherConfig
from cmt_mae.method.vit import StudentConfig, build_student
from cmt_mae.tools.bench.flops import flop_per_image

PAGE = REPOSITORY / "docs" / "scale.md"
HIDDEN = 147  # of 196 patches: 224 px, patch 16, 75 %
FP32 = 4
STAGES = {"mae": Alphas(0.0, 0.0), "one": Alphas(0.0, 0.0), "two": Alphas(0.3, 0.3)}


@cache
def paper_networks(size: str, stage: str) -> tuple[StudentWithDecoder, FrozenNetworks]:
    """The paper's networks, weights not set: a student of this preset, CLIP ViT-B/16 as teacher.

    stage: mae (no teacher, pixels), one or two; the momentum student is not made.
    """
    config, half, guided = StudentConfig(preset=size), (0.5, 0.5, 0.5), stage != "mae"
    target = TargetConfig() if guided else TargetConfig("pixel", "mae")
    with torch.device("meta"):
        student, teacher = build_student(config), None
        if guided:
            teacher = Teacher(
                VisionTransformer(num_classes=0, pre_norm=True, act_layer=QuickGELU), TeacherConfig(), mean=half,
                std=half, student_mean=half, student_std=half, grid=config.grid(),
                projection=torch.empty(512, 768),
            )  # fmt: skip
        widths = {"teacher": 512, "momentum": student.embed_dim} if guided else {"pixel": 768}
        learner = StudentWithDecoder(student, DecoderConfig(), target, widths)
        frozen = FrozenNetworks(
            MaskConfig(rule="sampled_high" if guided else "random"), target, teacher=teacher, grid=config.grid(),
            patch_size=config.patch_size, mean=half, std=half,
        )  # fmt: skip
    return learner.to_empty(device="cpu"), frozen.to_empty(device="cpu")


def parameters(network: nn.Module, learnt: bool = False) -> int:
    """Parameters, all of them or those that learn (positions are fixed)."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad or not learnt)


@cache
def flop(size: str, stage: str) -> dict[str, float]:
    """FLOP of one image: all of the step, and its backward pass."""
    counted = flop_per_image(*paper_networks(size, stage), STAGES[stage], HIDDEN)
    return {"step": float(sum(counted.values())), "backward": float(counted["backward"])}


@dataclass(frozen=True)
class Machine:
    """One GPU and its share of what is around it. Assumptions, not measurements of ours."""

    sustained: float = 400e12
    """FLOP/s of a step: half of the 790 TFLOP/s that a large bf16 product reaches on an H200."""
    node: int = 8
    """GPUs of a node."""
    inside: float = 300e9
    """Bytes/s that a GPU sends to the others of its node (NVLink)."""
    between: float = 40e9
    """Bytes/s that a GPU sends to other nodes: an adapter of 400 Gbit/s each, 80 % of it."""
    fixed_s: float = 0.02
    """Seconds of a step that no size changes: launches, optimizer, the waiting of ranks for each other."""
    bucket: float = 25e6
    """Bytes of gradients that travel together; those of the last bucket cannot hide behind the backward pass."""


def all_reduce_bytes(gradient_bytes: float, gpus: int) -> float:
    """Bytes that each GPU sends (and receives) in a ring all-reduce: 2 (N - 1) / N of the gradient."""
    return 2 * (gpus - 1) / gpus * gradient_bytes


def all_reduce_seconds(gradient_bytes: float, gpus: int, machine: Machine) -> float:
    """Inside each node, then over nodes, where each adapter carries its GPU's share of the gradient."""
    inside = min(gpus, machine.node)
    nodes = -(-gpus // machine.node)
    return (
        all_reduce_bytes(gradient_bytes, inside) / machine.inside
        + all_reduce_bytes(gradient_bytes / inside, nodes) / machine.between
    )


def fsdp_bytes(parameter_bytes: float, momentum_bytes: float, gpus: int) -> float:
    """Bytes that each GPU sends with FSDP2: all-gather before forward and before backward, reduce-scatter of
    the gradients; and one all-gather of the momentum student."""
    return (gpus - 1) / gpus * (3 * parameter_bytes + momentum_bytes)


def step_cost(size: str, stage: str, gpus: int, images: int, machine: Machine) -> dict[str, float]:
    """Seconds of one step with DDP by cause, and images/s of all GPUs. images: a GPU and step."""
    work = flop(size, stage)
    compute, backward = (images * work[part] / machine.sustained for part in ("step", "backward"))
    gradient = FP32 * parameters(paper_networks(size, "two")[0], learnt=True)
    exchange = all_reduce_seconds(gradient, gpus, machine)
    last = exchange * min(1.0, machine.bucket / gradient)
    exposed = last + max(0.0, exchange - last - backward)
    total = compute + exposed + machine.fixed_s
    return {
        "compute_s": compute, "exchange_s": exchange, "exposed_s": exposed, "step_s": total,
        "images_per_second": gpus * images / total,
        "efficiency": (images / total) / (images / (compute + machine.fixed_s)),
        "bytes_sent": all_reduce_bytes(gradient, gpus),
    }  # fmt: skip


def memory_bytes(size: str, gpus: int, parallel: str) -> float:
    """Bytes a GPU of weights, gradients, Adam's two moments, momentum student (fp32) and teacher (fp32)."""
    learner, frozen = paper_networks(size, "two")
    assert frozen.teacher is not None
    assert frozen.teacher.projection is not None
    own = FP32 * (3 * parameters(learner, learnt=True) + parameters(learner) + parameters(learner.student))
    teacher = FP32 * (parameters(frozen.teacher.model) + frozen.teacher.projection.numel())
    return (own if parallel == "ddp" else own / gpus) + teacher


def checkpoint_bytes(size: str) -> int:
    """A checkpoint of stage two: weights and two moments of what learns, fixed positions, momentum student."""
    learner, _ = paper_networks(size, "two")
    return FP32 * (2 * parameters(learner, learnt=True) + parameters(learner) + parameters(learner.student))


def loader_needs(rate: float, per_core: float, image_bytes: float) -> dict[str, float]:
    """Cores and bytes/s of storage that ``rate`` images/s of a GPU ask for."""
    return {"cores": rate / per_core, "bytes_per_second": rate * image_bytes}


def run_hours(
    size: str, images: float, epochs: float, gpus: int, batch: int, machine: Machine
) -> float:
    """Hours of a run with half of its epochs in each stage."""
    rates = [
        step_cost(size, stage, gpus, batch // gpus, machine)["images_per_second"]
        for stage in ("one", "two")
    ]
    return sum(images * epochs / 2 / rate for rate in rates) / 3600


# --- tables ------------------------------------------------------------------------------------

SIZES = {"base": "ViT-B/16", "large": "ViT-L/16"}
IMAGENET, BATCH, BILLION = 1_281_167, 4096, 1_000_000_000


def tables(measured: dict[str, Any], machine: Machine | None = None) -> dict[str, str]:
    """Every table of the page by name."""
    machine = machine or Machine()
    return {
        "sizes": sizes_table(),
        "measured": measured_table(measured),
        "imagenet": runs_table(IMAGENET, 800, {8: BATCH, 64: BATCH, 512: 16384}, machine),
        "data": data_table(measured, machine),
        "billion": runs_table(BILLION, 1, {8: BATCH, 64: BATCH, 512: 16384}, machine),
        "index": index_table(measured),
        "checkpoint": checkpoint_table(measured, machine),
        "growth": growth_table(measured),
    }


def sizes_table() -> str:
    """Exact numbers of a step."""
    rows = []
    for size, name in SIZES.items():
        learner, _ = paper_networks(size, "two")
        learnt, student = parameters(learner, learnt=True), FP32 * parameters(learner.student)
        rows.append(
            [name, f"{learnt / 1e6:.1f} M", *(f"{flop(size, s)['step'] / 1e9:.1f}" for s in ("mae", "one", "two")),
             f"{all_reduce_bytes(FP32 * learnt, 64) / 1e9:.2f} GB",
             f"{fsdp_bytes(FP32 * learnt, student, 64) / 1e9:.2f} GB",
             f"{memory_bytes(size, 64, 'ddp') / 1e9:.1f} GB", f"{memory_bytes(size, 64, 'fsdp') / 1e9:.2f} GB"]
        )  # fmt: skip
    head = [
        "student", "learnt parameters", "GFLOP an image: mae", "stage one", "stage two",
        "sent a GPU and step, DDP", "FSDP2", "held a GPU, DDP", "FSDP2",
    ]  # fmt: skip
    return markdown(head, rows)


def measured_table(measured: dict[str, Any]) -> str:
    """Formula against measurement, on two CPU cores."""
    runs, saved = measured["processes"], measured["checkpoint"]
    rates = {name: spread["median"] for name, spread in runs["images_per_second"].items()}
    one, apart = rates["1 process"], rates["2 processes, no exchange"]
    both = rates["2 processes"]
    median = {name: sorted(times)[len(times) // 2] for name, times in runs["seconds"].items()}
    exchange = median["2 processes"] - median["2 processes, no exchange"]
    # loopback counts what both processes send
    wanted, sent = 2 * all_reduce_bytes(runs["gradient_bytes"], 2), runs["loopback_bytes_per_step"]
    size = checkpoint_bytes(saved["size"]) if saved["size"] in SIZES else None
    rows = [
        ["images/s of 1 process, 1 thread", "", f"{one:.1f}"],
        ["images/s of 2 processes without exchange", f"{2 * one:.1f}", f"{apart:.1f}"],
        ["images/s of 2 processes, DDP over gloo", f"{2 * one:.1f}", f"{both:.1f}"],
        ["seconds of a step of 2 processes, and the part that the exchange adds", "",
         f"{median['2 processes']:.3f}, {exchange:.3f}"],
        ["bytes sent in a step by both processes", f"{wanted / 1e6:.2f} MB", f"{sent / 1e6:.2f} MB"],
        [f"checkpoint, {SIZES.get(saved['size'], saved['size'])} stage two",
         "" if size is None else f"{size / 1e9:.3f} GB", f"{saved['bytes'] / 1e9:.3f} GB"],
        ["seconds to write and to read it", "",
         f"{saved['write_s']['median']:.1f} and {saved['read_s']['median']:.1f}"],
    ]  # fmt: skip
    return markdown(["what", "model", "measured"], rows)


def runs_table(images: int, epochs: float, batches: dict[int, int], machine: Machine) -> str:
    """Steps, rates and hours on 8, 64 and 512 GPUs."""
    rows = []
    for size, name in SIZES.items():
        for gpus, batch in batches.items():
            cost = step_cost(size, "two", gpus, batch // gpus, machine)
            hours = run_hours(size, images, epochs, gpus, batch, machine)
            rows.append(
                [f"{name}, {gpus} GPUs", f"{batch}", f"{batch // gpus}", f"{cost['compute_s'] * 1e3:.0f}",
                 f"{cost['exchange_s'] * 1e3:.1f}", f"{cost['exposed_s'] * 1e3:.1f}",
                 f"{cost['step_s'] * 1e3:.0f}", f"{cost['images_per_second']:,.0f}",
                 f"{gpus * hours:,.0f}", f"{hours:,.1f}"]
            )  # fmt: skip
    head = [
        "stage two", "batch", "images a GPU", "compute, ms", "all-reduce, ms", "of it exposed, ms",
        "step, ms",
        "images/s", "GPU hours, both stages", "hours",
    ]  # fmt: skip
    return markdown(head, rows)


def data_table(measured: dict[str, Any], machine: Machine) -> str:
    """What one GPU asks of loader and storage."""
    found = measured["loader"]
    kinds = {
        "JPEG in tar shards": (found["tar"]["images_per_second"], found["mean_bytes"]),
        "packed at 256 px": (found["packed"]["images_per_second"], found["packed_bytes"]),
    }
    rows = []
    for size, name in SIZES.items():
        for stage in ("one", "two"):
            rate = machine.sustained / flop(size, stage)["step"]
            for kind, (per_core, image) in kinds.items():
                needs = loader_needs(rate, per_core, image)
                rows.append(
                    [f"{name}, stage {stage}, {kind}", f"{rate:,.0f}", f"{per_core:,.0f}", f"{needs['cores']:.1f}",
                     f"{needs['bytes_per_second'] / 1e6:,.0f} MB/s",
                     f"{512 * needs['bytes_per_second'] / 1e9:,.1f} GB/s"]
                )  # fmt: skip
    head = [
        "a GPU", "images/s", "images/s a core", "cores", "storage", "storage, 512 GPUs"
    ]  # fmt: skip
    return markdown(head, rows)


def index_table(measured: dict[str, Any]) -> str:
    """What starting on tar shards takes, a process."""
    found, rows = measured["index"], []
    for name, images in (("ImageNet-1K", IMAGENET), ("100 million", 10**8), ("1 billion", BILLION)):
        rows.append(
            [name, f"{images * found['seconds_per_sample'] / 60:,.1f} min",
             f"{images * found['bytes_per_sample'] / 1e9:,.2f} GB",
             f"{images * found['order_seconds_per_image']:,.1f} s",
             f"{images * found['order_bytes_per_image'] / 1e9:,.2f} GB"]
        )  # fmt: skip
    head = [
        "images", "index, one process", "index held", "order of an epoch", "order held"
    ]  # fmt: skip
    return markdown(head, rows)


def checkpoint_table(measured: dict[str, Any], machine: Machine) -> str:
    """Size, time at the speed measured here, share of an hour's checkpointing."""
    saved, rows = measured["checkpoint"], []
    rate = saved["bytes"] / saved["write_s"]["median"]
    for size, name in SIZES.items():
        seconds = checkpoint_bytes(size) / rate
        epoch = IMAGENET / step_cost(size, "two", 64, BATCH // 64, machine)["images_per_second"]
        rows.append(
            [name, f"{checkpoint_bytes(size) / 1e9:.2f} GB", f"{seconds:.1f} s",
             f"{epoch:.0f} s", f"{seconds / (epoch + seconds):.1%}", f"{seconds / (3600 + seconds):.2%}"]
        )  # fmt: skip
    head = [
        "stage two", "checkpoint", f"written at {rate / 1e6:.0f} MB/s", "epoch of ImageNet-1K on 64 GPUs",
        "lost with one every epoch", "with one an hour",
    ]  # fmt: skip
    return markdown(head, rows)


def growth_table(measured: dict[str, Any]) -> str:
    """Powers by which time and memory of a step grow; a line that says so where they were not measured yet."""
    if "growth" not in measured:
        return "Not measured yet: `python -m benchmarks.scale --parts growth` on an idle machine."
    rows = []
    for axis, found in measured["growth"]["axes"].items():
        sizes = list(found["seconds"])
        time, memory = found["of_time"], found["of_memory"]
        first, last = (found["seconds"][size]["median"] for size in (sizes[0], sizes[-1]))
        rows.append(
            [f"{axis}, {sizes[0]} to {sizes[-1]}", f"{first:.3g} to {last:.3g}", f"{time['power']:.2f}",
             f"{time['r2']:.3f}", f"{found['memory_gb'][sizes[0]]:.2f} to {found['memory_gb'][sizes[-1]]:.2f}",
             f"{memory['power']:.2f}", f"{memory['r2']:.3f}"]
        )  # fmt: skip
    head = ["axis", "seconds", "power of time", "R2", "memory, GB", "power of memory", "R2"]
    return markdown(head, rows)


def filled(page: str, made: dict[str, str]) -> str:
    """The page with each table between ``<!-- table NAME -->`` and ``<!-- end -->`` made anew.

    Raises KeyError for a table of the page that is not made, ValueError for one that the page leaves out.
    """
    used: set[str] = set()

    def put(match: re.Match[str]) -> str:
        used.add(match[1])
        return f"<!-- table {match[1]} -->\n{made[match[1]]}\n<!-- end -->"

    page = re.sub(r"<!-- table (\w+) -->.*?<!-- end -->", put, page, flags=re.DOTALL)
    if used != set(made):
        raise ValueError(f"the page leaves out {', '.join(sorted(set(made) - used))}")
    return page


def write_page() -> None:
    """docs/scale.md from docs/results/scale.json."""
    measured = json.loads((RESULTS / "scale.json").read_text())
    text = filled(PAGE.read_text(encoding="utf-8"), tables(measured))
    write_atomically(PAGE, lambda aside: aside.write_text(text, encoding="utf-8") and None)


if __name__ == "__main__":
    write_page()
