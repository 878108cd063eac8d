"""The teacher once a photo against once a crop: images/s of whole trainings, in turn, and docs/results/view.json.

    python -m benchmarks.view --data imagenette/ --teacher deit_tiny_patch16_224.safetensors
    python -m benchmarks.view --data imagenette/ --case vitb16

Both ways train the same student on the same photos; the first epoch, in which the way of photos fills its store,
is left out, and so is the start of the process. Case micro64: recipe best, the crops' teacher at 128 px. Case
vitb16: recipe cmt_vitb16, both stages, with a teacher of CLIP ViT-B/16's shape and random weights.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import timm

from cmt_mae.backbones.save import save_backbone
from cmt_mae.core.files import write_json
from cmt_mae.core.runs import environment

RESULT = Path(__file__).parents[1] / "docs" / "results" / "view.json"
VIEWS = ("crop", "photo")


@dataclass
class Case:
    """What is trained; the batch divides the photos."""

    recipe: str
    photos: int
    batch: int
    epochs: int


CASES = {
    "micro64": Case("best,micro64", photos=640, batch=64, epochs=3),
    "vitb16": Case("cmt_vitb16", photos=8, batch=4, epochs=4),
}


def pack_photos(data: Path, work: Path, count: int) -> Path:
    """So many of the training photos, evenly chosen, packed at 224 px."""
    files = sorted(path for path in (data / "train").rglob("*") if path.is_file())
    for number in range(count):
        file = files[number * len(files) // count]
        target = work / "photos" / f"{number:04}{file.suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    cmt_mae("pack", "--data", str(work / "photos"), "--out", str(work / "packed"), "--size", "224")
    return work / "packed"


def random_clip(file: Path) -> str:
    """A file with a network of CLIP ViT-B/16's shape: how long it takes does not depend on its weights."""
    name = "vit_base_patch16_clip_quickgelu_224"
    save_backbone(
        file, timm.create_model(name, num_classes=0), architecture=name, kwargs={}, mean=(0.5,) * 3,
        std=(0.25,) * 3, img_size=224, licence=None, source="random weights",
    )  # fmt: skip
    return str(file)


def cmt_mae(*words: str) -> None:
    """One command, in a process of its own."""
    subprocess.run([sys.executable, "-m", "cmt_mae", *words], check=True)


def images_per_second(case: Case, view: str, packed: Path, teacher: str, out: Path) -> dict[str, float]:
    """Stage -> rate, of a training with this view, without its first epoch."""
    cmt_mae(
        "pretrain", "--recipe", case.recipe, "--data", str(packed), "--teacher", teacher, "--out", str(out),
        "--teacher.view", view, "--epochs", str(case.epochs), "--optim.warmup_epochs", "1", "--workers", "0",
        "--batch_size", str(case.batch), "--runtime.log_every", "1", "--runtime.checkpoint_every", "0",
        "--runtime.progress", "false", "--precision", "fp32", "--runtime.yes", "true",
    )  # fmt: skip
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rates: dict[str, list[float]] = {}
    for row in rows:
        if "images_per_second" in row and row["step"] > case.photos // case.batch:
            rates.setdefault(f"stage {row['stage']}", []).append(row["images_per_second"])
    shutil.rmtree(out)
    return {stage: statistics.harmonic_mean(values) for stage, values in rates.items()}


def main() -> None:
    """Both ways in turn; their medians and the ratios of pairs, by stage."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="class folders with train/")
    parser.add_argument("--teacher", default="", help="DeiT-Tiny's weights, for micro64")
    parser.add_argument("--case", choices=CASES, default="micro64")
    parser.add_argument("--work", type=Path, default=Path("runs/view"))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    case, work = CASES[options.case], options.work / options.case
    shutil.rmtree(work, ignore_errors=True)
    packed = pack_photos(options.data, work, case.photos)
    teacher = options.teacher if options.case == "micro64" else random_clip(work / "clip.safetensors")
    found: dict[str, dict[str, list[float]]] = {}
    for number in range(options.rounds):
        for view in VIEWS if number % 2 == 0 else VIEWS[::-1]:
            for stage, rate in images_per_second(case, view, packed, teacher, work / f"{view}_{number}").items():
                found.setdefault(stage, {}).setdefault(view, []).append(rate)
    content = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    content[options.case] = {
        "recipe": case.recipe, "photos": case.photos, "batch": case.batch,
        "stages": {stage: compared(rates) for stage, rates in found.items()},
        "date": datetime.now(UTC).isoformat(timespec="seconds"), **environment(),
    }  # fmt: skip
    write_json(RESULT, content)
    print(json.dumps(content[options.case]["stages"]))


def compared(rates: dict[str, list[float]]) -> dict[str, object]:
    """Rates of both ways, and the ratio within each round."""
    ratios = [photo / crop for crop, photo in zip(*(rates[view] for view in VIEWS), strict=True)]
    spread = {"least": min(ratios), "median": statistics.median(ratios), "most": max(ratios)}
    return {
        "images_per_second": rates,
        "medians": {view: statistics.median(values) for view, values in rates.items()},
        "ratio_photo_over_crop": spread,
    }


if __name__ == "__main__":
    main()
