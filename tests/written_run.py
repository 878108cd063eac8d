"""Run directories written by hand: what a run of so many steps would have left, without training one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

Write = Callable[..., Path]

SETTINGS: dict[str, Any] = {
    "out": "runs/a",
    "data": {"path": "photos/", "max_bad": 0.01},
    "student": {"preset": "micro", "img_size": [64], "patch_size": 8},
    "mask": {"rule": "sampled_high", "source": "collab", "ratio": 0.75},
    "target": {"source": "collab", "tokens": "masked"},
    "runtime": {"log_every": 10, "probe_data": "labelled/"},
    "epochs": 10.0,
    "batch_size": 64,
    "alpha": 0.3,
    "alpha_mask": None,
    "alpha_loss": None,
    "alpha_ramp_epochs": 0.0,
    "precision": "auto",
    "seed": 0,
}

COMMAND = ["/x/bin/cmt-mae", "pretrain", "--data", "my photos/"]


def facts(total: int, switch: int) -> dict[str, Any]:
    """run.json of a run of ``total`` steps, ten an epoch."""
    return {
        "data": {"path": "photos/", "images": 640, "fingerprint": "f" * 64},
        "teacher": {"name": "embedded", "source": "a teacher", "licence": "apache-2.0", "digest": "d" * 64},
        "plan": {
            "steps_per_epoch": 10, "total_steps": total, "switch_step": switch, "n_patches": 64, "n_mask": 48,
            "lr": 0.002,
        },
        "placement": {"processes": 1, "device": "cpu"},
        "versions": {"python": "3.11", "torch": "2.14"},
        "hardware": {"machine": "x86_64", "cores": 2, "threads": 1, "processor": "A CPU", "gpu": None},
        "starts": [{"date": "2026-01-02T03:04:05+00:00", "command": COMMAND}],
    }  # fmt: skip


def row(step: int, switch: int, **more: float) -> dict[str, float]:
    """A healthy line of metrics."""
    two = step > switch
    line = {
        "step": step, "epoch": step / 10, "stage": 2 if two else 1, "lr": 0.001, "loss": 1.0 + 10 / step,
        "loss_teacher": 1.0 + 10 / step, "entropy_teacher": 0.9, "spread_student": 0.4, "rank_target_teacher": 9.0,
        "image_share_teacher": 0.9, "gradient_norm": 0.5, "skipped_steps": 0, "collapse_signs": 0,
        "images_per_second": 50.0 if two else 100.0, "data_wait_share": 0.01, "peak_memory_gb": 1.3,
    }  # fmt: skip
    return {**line, **({"overlap": 0.3, "loss_momentum": 0.5} if two else {}), **more}


def write_run(
    root: Path,
    name: str = "a",
    *,
    done: int = 100,
    total: int = 100,
    switch: int = 50,
    knn: dict[int, float] | None = None,
    lines: Callable[[int], dict[str, float]] = lambda _: {},
    settings: dict[str, Any] | None = None,
    more_facts: dict[str, Any] | None = None,
    every: int = 10,
    pictures: int = 1,
) -> Path:
    """A run: steps done of total, k-NN by step, changes of lines by step, and so on."""
    run = root / name
    (run / "pictures").mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump({**SETTINGS, **(settings or {})}))
    (run / "run.json").write_text(json.dumps({**facts(total, switch), **(more_facts or {})}))
    rows = [row(step, switch, **lines(step)) for step in range(every, done + 1, every)]
    rows += [{"step": step, "knn_top1": value} for step, value in (knn or {}).items()]
    rows.sort(key=lambda one: one["step"])
    (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    for number in range(pictures):
        picture = Image.effect_noise((120, 80), 60).convert("RGB")
        picture.save(run / "pictures" / f"attention_step_{50 + number:08d}.png")
    return run


def write_hostile_run(root: Path) -> Path:
    """A run whose every name and text tries to be HTML or script."""
    attack = (
        "\u202e</script><script>window.hurt=1</script><img src=x onerror=window.hurt=1>'\"&{{7*7}}"
    )
    run = write_run(
        root,
        '<img src=x onerror="window.hurt=1">',
        knn={0: 20.0, 100: 60.0},
        settings={"data": {"path": attack}, "mask": {"rule": attack}, attack: attack},
        more_facts={
            "teacher": {"name": attack, "source": attack, "licence": attack, "digest": attack},
            "versions": {attack: attack},
            "hardware": {"processor": attack, "cores": attack},
            "starts": [{"date": attack, "command": [attack, "pretrain", attack]}],
        },
        lines=lambda _: {f"loss_{attack}"[:60]: 1.0, "entropy_</script>": 0.5},
    )
    (run / "bad_images.txt").write_text(f"{attack}.jpg\t{attack}\n")
    (run / "warnings.jsonl").write_text(json.dumps({"step": 3, "text": attack}) + "\n")
    picture = run / "pictures" / f"{attack.replace('/', '-')}.png"
    (run / "pictures" / "attention_step_00000050.png").rename(picture)
    result = {
        "task": attack, "metrics": {attack: 50.0}, "protocol": {"name": attack, "headline": attack},
        "backbone": {"name": attack, "architecture": attack, "digest": "e" * 64}, "data": {"path": attack},
        "seed": 0,
    }  # fmt: skip
    (run / "results").mkdir()
    (run / "results" / "x.json").write_text(json.dumps(result))
    return run
