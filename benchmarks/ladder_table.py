"""Evaluate the rungs of the ladder and write docs/results/ladder.json and ladder.md."""

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from cmt_mae.backbones import save_backbone
from cmt_mae.core.files import write_atomically, write_json
from cmt_mae.core.runs import environment
from cmt_mae.evaluate.knn import KnnConfig, evaluate_knn
from cmt_mae.evaluate.linear import LinearConfig, evaluate_linear
from cmt_mae.method.vit import StudentConfig, build_student
from cmt_mae.pretraining.assembly import IMAGENET

Rungs = dict[str, tuple[str, list[str], str]]
STUDENT = StudentConfig(preset="micro", img_size=[64], patch_size=8)


def write_table(work: Path, data: str, teacher: str, rungs: Rungs, results: Path) -> None:
    """Measure everything that is finished under ``work`` and write the two files."""
    begin = time.perf_counter()
    rows = [untrained(work, data, seed) for seed in (0, 1)]
    for name, (recipe, further, what) in rungs.items():
        if (work / name / "run.json").exists() and finished(work / name):
            row = {"name": name, "what": what, "recipe": f"{recipe},micro64", "settings": further}
            rows.append(
                {**row, **training_facts(work / name), **measure(str(work / name), data, work)}
            )
    teacher_row = {
        "name": "teacher",
        "what": "the teacher itself, DeiT-Tiny at 128 px (supervised on ImageNet)",
    }
    rows.append({**teacher_row, **measure(teacher, data, work, size=128)})
    content = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python -m benchmarks.ladder --data imagenette_128/ --teacher deit_tiny.safetensors",
        "evaluation_seconds": round(time.perf_counter() - begin, 1),
        **environment(),
        "rows": rows,
    }
    write_json(results / "ladder.json", content)
    write_atomically(results / "ladder.md", lambda aside: aside.write_text(markdown(content)))


def finished(run: Path) -> bool:
    """Whether the run came to its last step."""
    total = json.loads((run / "run.json").read_text())["plan"]["total_steps"]
    return (run / "checkpoints" / f"step_{total:08d}.pt").exists()


def training_facts(run: Path) -> dict[str, Any]:
    """Steps, images seen and time of a run, from its own files."""
    facts = json.loads((run / "run.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    starts = [0, *(row["step"] for row in lines[:-1])]
    steps = [row["step"] - start for row, start in zip(lines, starts, strict=True)]
    batch = 64
    seconds = sum(n * batch / row["images_per_second"] for n, row in zip(steps, lines, strict=True))
    last = {
        k: round(v, 4) for k, v in lines[-1].items() if k.startswith(("loss", "overlap", "entropy"))
    }
    return {
        "steps": facts["plan"]["total_steps"],
        "images_seen": facts["plan"]["total_steps"] * batch,
        "training_minutes_one_thread": round(seconds / 60, 1),
        "last": last,
    }


def untrained(work: Path, data: str, seed: int) -> dict[str, Any]:
    """The encoder before its first step."""
    torch.manual_seed(seed)
    path = work / f"untrained_s{seed}.safetensors"
    architecture, kwargs = STUDENT.architecture()
    save_backbone(
        path, build_student(STUDENT), architecture=architecture, kwargs=kwargs, mean=IMAGENET[0],
        std=IMAGENET[1], img_size=STUDENT.size(), licence=None, source="untrained",
    )  # fmt: skip
    row = {"name": f"untrained_s{seed}", "what": "untrained encoder"}
    return {**row, **measure(str(path), data, work)}


def measure(backbone: str, data: str, work: Path, size: int | None = None) -> dict[str, Any]:
    """k-NN (k 20) and linear probe (MAE's protocol on cached centre crops), class token and mean."""
    common: dict[str, Any] = {
        "backbone": backbone, "data": data, "out": str(work / "measured" / Path(backbone).stem), "size": size,
        "workers": 0, "cache": str(work / "features"), "pools": ("mean", "cls"),
    }  # fmt: skip
    knn, linear = evaluate_knn(KnnConfig(**common)), evaluate_linear(LinearConfig(**common, protocol="mae"))
    print(Path(backbone).stem, knn.metrics, linear.metrics, flush=True)
    return {
        "knn_mean": round(knn.metrics["mean/k20/top1"], 2),
        "knn_cls": round(knn.metrics["cls/k20/top1"], 2),
        "linear_mean": round(linear.metrics["mean/top1"], 2),
        "linear_cls": round(linear.metrics["cls/top1"], 2),
        "linear_protocol": linear.protocol,
        "backbone_digest": linear.backbone["digest"],
        "data_fingerprint": linear.data.get("fingerprint"),
    }


def markdown(content: dict[str, Any]) -> str:
    """The table for people."""
    head = "| rung | what | k-NN mean | k-NN cls | linear mean | linear cls | minutes |\n"
    head += "|---|---|---|---|---|---|---|\n"
    lines = [
        f"| {r['name']} | {r['what']} | {r['knn_mean']:.1f} | {r['knn_cls']:.1f} | {r['linear_mean']:.1f} | "
        f"{r['linear_cls']:.1f} | {r.get('training_minutes_one_thread', '')} |"
        for r in content["rows"]
    ]
    steps = next(r["steps"] for r in content["rows"] if "steps" in r)
    versions, hardware = content["versions"], content["hardware"]
    return (
        "# The ladder on Imagenette\n\n"
        f"Top-1 in percent on the 1966 validation photos. Every rung: {steps} steps of 64 images (9469 photos "
        "packed at 128 px, 64-px crops), a ViT of width 128 and depth 6, recipe `micro64`; teacher DeiT-Tiny at "
        "128 px. k-NN: k 20, T 0.07. Linear: MAE's protocol on cached centre crops. The digit after `_s` is the "
        "seed.\n\n" + head + "\n".join(lines) + "\n\n"
        f"Command: `{content['command']}` (each rung with `--only NAME`, one thread, two at a time). "
        f"Hardware: {hardware['processor']}, {hardware['cores']} cores; the minutes were measured while the "
        f"machine did other work too. torch {versions['torch']}, timm {versions['timm']}. {content['date']}.\n"
    )
