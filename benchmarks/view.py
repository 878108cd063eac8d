"""The teacher once a photo against once a crop: images/s of whole trainings, in turn, and docs/results/view.json.

    python -m benchmarks.view --data imagenette/ --teacher deit_tiny_patch16_224.safetensors

Both ways train the student of ``micro64`` (recipe best) on the same 640 photos for three epochs of ten steps; the
first epoch, in which the way of photos fills its store, is left out, and so is the start of the process.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from cmt_mae.core.files import write_json
from cmt_mae.core.runs import environment

RESULT = Path(__file__).parents[1] / "docs" / "results" / "view.json"
PHOTOS, STEPS = 640, 10
VIEWS = ("crop", "photo")


def pack_photos(data: Path, work: Path) -> Path:
    """PHOTOS of the training photos, evenly chosen, packed at 224 px."""
    files = sorted(path for path in (data / "train").rglob("*") if path.is_file())
    for number in range(PHOTOS):
        file = files[number * len(files) // PHOTOS]
        target = work / "photos" / f"{number:04}{file.suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    cmt_mae("pack", "--data", str(work / "photos"), "--out", str(work / "packed"), "--size", "224")
    return work / "packed"


def cmt_mae(*words: str) -> None:
    """One command, in a process of its own."""
    subprocess.run([sys.executable, "-m", "cmt_mae", *words], check=True)


def images_per_second(view: str, packed: Path, teacher: str, out: Path) -> float:
    """Of the second and third epoch of a training with this view."""
    cmt_mae(
        "pretrain", "--recipe", "best,micro64", "--data", str(packed), "--teacher", teacher, "--out", str(out),
        "--teacher.view", view, "--epochs", "3", "--optim.warmup_epochs", "1", "--workers", "0",
        "--runtime.log_every", str(STEPS), "--runtime.checkpoint_every", "0", "--runtime.progress", "false",
    )  # fmt: skip
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return statistics.harmonic_mean(
        [row["images_per_second"] for row in rows if row["step"] > STEPS]
    )


def main() -> None:
    """Both ways in turn; their medians and the ratios of pairs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="class folders with train/")
    parser.add_argument("--teacher", required=True, help="DeiT-Tiny's weights")
    parser.add_argument("--work", type=Path, default=Path("runs/view"))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    shutil.rmtree(options.work, ignore_errors=True)
    packed = pack_photos(options.data, options.work)
    found: dict[str, list[float]] = {view: [] for view in VIEWS}
    for number in range(options.rounds):
        for view in VIEWS if number % 2 == 0 else VIEWS[::-1]:
            out = options.work / f"{view}_{number}"
            found[view].append(images_per_second(view, packed, options.teacher, out))
    ratios = [photo / crop for crop, photo in zip(*(found[view] for view in VIEWS), strict=True)]
    content = {
        "what": "images/s of micro64 (recipe best) with DeiT-Tiny: at 128 px on each crop, at 224 px once a photo",
        "images_per_second": found,
        "medians": {view: statistics.median(values) for view, values in found.items()},
        "ratio_photo_over_crop": {
            "least": min(ratios),
            "median": statistics.median(ratios),
            "most": max(ratios),
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **environment(),
    }
    write_json(RESULT, content)
    print(json.dumps(content["medians"]), json.dumps(content["ratio_photo_over_crop"]))


if __name__ == "__main__":
    main()
