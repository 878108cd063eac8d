"""The ablations of docs/results/ablations.md, on a part of Imagenette, with `cmt-mae ablate`.

    python -m benchmarks.ablations --data imagenette/ --teacher deit_tiny.safetensors --work runs/ablations

makes the images (packed at 96 px, 3000 of the training photos), works off the experiments one after the other (the
same command again continues) and writes docs/results/ablations.json and the tables of ablations.md; the words in
that file, above its first table, are by hand and stay. ``--only masks`` takes single experiments;
``--tables`` runs nothing.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "docs" / "results"
EXPERIMENTS = ("masks", "components", "targets", "alpha", "split", "momentum", "transfer")
"""In the order of their value for setting defaults; the last is that of transfer.yaml beside this file."""
DENSE = {"davis": "davis", "ade20k": "camvid"}
"""Tasks of the transfer: folders beside the one of Imagenette."""
TRAIN = (
    3000  # photos: with a teacher that sees each once, a run then takes a minute or two of one core
)
MARK = "<!-- tables: written by python -m benchmarks.ablations -->"


def make_images(data: str, work: Path) -> Path:
    """Imagenette packed at 96 px; of its training photos the TRAIN that numpy's generator draws with seed 0."""
    packed, part = work / "imagenette_96", work / "imagenette_96_3k"
    command = [sys.executable, "-m", "cmt_mae", "pack", "--data", data, "--out", str(packed)]
    subprocess.run([*command, "--size", "96", "--workers", "0"], check=True)
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        images = np.load(packed / split / "images.npy", mmap_mode="r")
        count = min(TRAIN, len(images)) if split == "train" else len(images)
        pick = np.sort(generator.permutation(len(images))[:count])
        meta = json.loads((packed / split / "meta.json").read_text())
        meta["names"], meta["count"] = [meta["names"][i] for i in pick], count
        meta["source_fingerprint"] += f"-{split}-{count}-0"
        (part / split).mkdir(parents=True, exist_ok=True)
        np.save(part / split / "images.npy", images[pick])
        np.save(part / split / "labels.npy", np.load(packed / split / "labels.npy")[pick])
        (part / split / "meta.json").write_text(json.dumps(meta))
    return part


def command_of(experiment: str, options: argparse.Namespace, images: Path) -> list[str]:
    """As a user would type it."""
    scale = "nano48"
    more: list[str] = []
    if options.epochs != 6:
        longer = options.work / f"epochs_{options.epochs:g}.yaml"
        warmup = options.epochs / 12
        longer.write_text(f"epochs: {options.epochs}\noptim: {{warmup_epochs: {warmup}}}\n")
        scale = f"nano48,{longer}"
    name = experiment
    if experiment == "transfer":
        name = str(Path(__file__).with_name("transfer.yaml"))
        further = [f"linear={make_digits(options.work)}"]
        further += [
            f"{task}={Path(options.data).parent / folder}" for task, folder in DENSE.items()
        ]
        more = ["--evaluate", f"[{','.join(further)}]"]
    return [
        sys.executable, "-m", "cmt_mae", "ablate", name, "--recipe", scale, "--data", str(images),
        "--teacher", options.teacher, "--out", str(options.work / experiment), "--seeds", str(options.seeds),
        "--jobs", str(options.jobs), "--threads", "1", *more,
    ]  # fmt: skip


def make_digits(work: Path) -> Path:
    """scikit-learn's handwritten digits as a folder: 1797 pictures of 8 x 8 pixels, a fourth for validation."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        folder = work / "digits" / ("val" if number % 4 == 3 else "train") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray((255 - image * (255 / 16)).astype(np.uint8))
        grey.convert("RGB").resize((96, 96), Image.Resampling.BICUBIC).save(
            folder / f"{number:04}.png"
        )
    return work / "digits"


def write_page(work: Path) -> None:
    """ablations.json, and the tables below the words of ablations.md."""
    from cmt_mae.tools.ablate.text import markdown

    contents: list[dict[str, Any]] = []
    for experiment in EXPERIMENTS:
        path = work / experiment / "table.json"
        if path.exists():
            contents.append(json.loads(path.read_text()))
    tables = [markdown(content).replace("# ", "## ", 1) for content in contents]
    (RESULTS / "ablations.json").write_text(json.dumps({"experiments": contents}, indent=1) + "\n")
    page = RESULTS / "ablations.md"
    words = page.read_text().split(MARK)[0] if page.exists() else "# Ablations at small scale\n\n"
    page.write_text(words + MARK + "\n\n" + "\n".join(tables))


def main() -> None:
    """Work off what is asked for, then write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="Imagenette with train and val")
    parser.add_argument("--teacher", help="DeiT-Tiny's weights")
    parser.add_argument("--work", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--only", nargs="*", default=EXPERIMENTS, choices=EXPERIMENTS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=6, help="6 took 558 steps of 32 images")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--tables", action="store_true", help="run nothing, write the page")
    options = parser.parse_args()
    if not options.tables:
        images = make_images(options.data, options.work)
        for experiment in options.only:
            subprocess.run(command_of(experiment, options, images), check=True)
    write_page(options.work)


if __name__ == "__main__":
    main()
