"""``cmt-mae demo``: a small two-stage run beside MAE, measured and pictured, on the sample images or own ones."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from cmt_mae.core.errors import InputError
from cmt_mae.core.files import write_json
from cmt_mae.core.parsing import parse
from cmt_mae.core.recipes import load_recipes, merge
from cmt_mae.core.runs import environment
from cmt_mae.core.settings import Count, CountOrNone, Positive, check_fields
from cmt_mae.data.pack import PackConfig, pack
from cmt_mae.data.sample import write_imagefolder
from cmt_mae.data.sources import open_source, open_split
from cmt_mae.evaluate.knn import KnnConfig, evaluate_knn
from cmt_mae.evaluate.linear import LinearConfig, evaluate_linear
from cmt_mae.pretraining import assembly
from cmt_mae.pretraining.settings import PretrainConfig
from cmt_mae.pretraining.student_files import save_student
from cmt_mae.tools.pretrain import pretrain
from cmt_mae.tools.report.page.command import ReportConfig, make_report

PACKED_SIZE = 96
SMALLEST_HELD_OUT = 20  # images: fewer say nothing about a probe


@dataclass
class DemoConfig:
    """A small two-stage CMT-MAE run and MAE at the same budget, with k-NN and linear probe of both."""

    out: str = "runs/demo"
    """Folder for everything the demo writes. The same command again continues, or shows the table."""
    data: str = ""
    """Own images (folder, tar shards, parquet); empty: the sample images. Class folders are used as labels."""
    images: Count = 2000
    """How many of the 2000 sample images to train on; half as many others are held out."""
    epochs: Positive = 10
    """Passes over the images, for each of the two runs."""
    teacher: str = "embedded"
    """Any teacher that `pretrain` takes."""
    batch_size: Count = 64
    """Images a step."""
    seed: CountOrNone = 0
    """Of weights, crops and masks."""
    workers: CountOrNone = 2
    """Processes that pack images."""
    progress: bool = True
    """Show progress bars."""


def demo(config: DemoConfig) -> dict[str, Any]:
    """Run the demo and print one table; returns its content, which is also in ``out/demo.json``.

    Raises InputError for data that cannot be used.
    """
    check_fields(config)
    started = time.perf_counter()
    console, out = Console(stderr=True), Path(config.out)
    settings(config, "demo", out, out).check()  # before the work of making images
    if not config.data and config.images < max(config.batch_size, 2 * SMALLEST_HELD_OUT):
        raise InputError(
            f"--images {config.images} is too few: give {2 * SMALLEST_HELD_OUT} or more, and a "
            "--batch-size that is not larger"
        )
    data, labelled = prepare_images(config, out)
    seconds: dict[str, float] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, recipe in (("mae", "mae,demo,mae"), ("cmt", "demo")):
        begin = time.perf_counter()
        console.print(f"[bold]{name}[/bold]")
        pretrain(settings(config, recipe, data, out / name))
        seconds[name] = round(time.perf_counter() - begin, 1)
    cmt = settings(config, "demo", data, out / "cmt")
    write_untrained(cmt, out / "untrained")
    backbones = {"untrained": out / "untrained", "mae": out / "mae", "cmt": out / "cmt"}
    if labelled:
        rows = {name: measure(str(path), data, out / name) for name, path in backbones.items()}
        rows["teacher"] = measure(config.teacher, data, out / "teacher", teacher_size(cmt))
    content = {
        "data": {"path": config.data or "sample images", "labelled": labelled},
        "settings": vars(config),
        "results": rows,
        "training_seconds": seconds,
        "seconds": round(time.perf_counter() - started, 1),
        **environment(),
    }
    write_json(out / "demo.json", content)
    runs = [str(out / "mae"), str(out / "cmt")]
    make_report(ReportConfig(runs=runs, out=str(out / "report.html")))
    show(console, content, out)
    return content


def prepare_images(config: DemoConfig, out: Path) -> tuple[Path, bool]:
    """Packed images with train and (for labelled ones) val; the folder, and whether there are labels."""
    source = config.data
    if not source:
        source = str(out / "images")
        if not Path(source).exists():
            write_imagefolder(source, config.images, config.images // 2, PACKED_SIZE)
    packed = out / "packed"
    pack(PackConfig(data=source, out=str(packed), size=PACKED_SIZE, workers=config.workers))
    if (packed / "train").is_dir():
        return packed, open_split(str(packed), "train").classes is not None and (
            packed / "val"
        ).is_dir()
    if open_source(str(packed)).classes is None:
        return packed, False
    return hold_out(packed, out / "split", config.seed)


def hold_out(packed: Path, split: Path, seed: int) -> tuple[Path, bool]:
    """Divide one packed, labelled set: a fifth becomes val. False where that leaves too few to measure."""
    images = np.load(packed / "images.npy", mmap_mode="r")
    held_out = len(images) // 5
    if held_out < SMALLEST_HELD_OUT:
        return packed, False
    labels, meta = np.load(packed / "labels.npy"), json.loads((packed / "meta.json").read_text())
    order = np.random.default_rng(seed).permutation(len(images))
    for name, part in (("val", np.sort(order[:held_out])), ("train", np.sort(order[held_out:]))):
        folder = split / name
        if (folder / "meta.json").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "images.npy", images[part])
        np.save(folder / "labels.npy", labels[part])
        names = [meta["names"][i] for i in part]
        fingerprint = f"{meta['source_fingerprint']}-{name}-{seed}"
        write_json(
            folder / "meta.json",
            {**meta, "names": names, "count": len(part), "source_fingerprint": fingerprint},
        )
    return split, True


def settings(config: DemoConfig, recipes: str, data: Path, out: Path) -> PretrainConfig:
    """Settings of one of the two runs: a recipe and the demo's choices."""
    content = load_recipes(recipes)
    merge(
        content,
        {
            "out": str(out),
            "data": {"path": str(data)},
            "teacher": {"name": config.teacher},
            "runtime": {"progress": config.progress},
            "epochs": config.epochs,
            "optim": {"warmup_epochs": config.epochs / 10},
            "batch_size": config.batch_size,
            "seed": config.seed,
        },
    )
    made: PretrainConfig = parse("cmt-mae demo", PretrainConfig, [], content)
    return made


def write_untrained(config: PretrainConfig, folder: Path) -> None:
    """The student as it was before the first step (the same seed gives the same weights)."""
    learner = assembly.build_learner(config, None)
    folder.mkdir(parents=True, exist_ok=True)
    save_student(folder, config, learner.student, assembly.IMAGENET, {}, "")


def measure(backbone: str, data: Path, out: Path, size: int | None = None) -> dict[str, float]:
    """k-NN and linear probe (logistic regression), mean-pooled patch tokens, in percent."""
    common: dict[str, Any] = {
        "backbone": backbone,
        "data": str(data),
        "out": str(out),
        "workers": 0,
        "size": size,
    }
    knn = evaluate_knn(KnnConfig(**common, pools=("mean",)))
    linear = evaluate_linear(LinearConfig(**common, pools=("mean",)))
    return {"knn": knn.headline, "linear": linear.headline}


def teacher_size(config: PretrainConfig) -> int:
    """Side in pixels of the teacher's input when it guides this student (a square one)."""
    teacher, _ = assembly.build_teacher(config, assembly.IMAGENET)
    assert teacher is not None
    return teacher.input_size[0]


def show(console: Console, content: dict[str, Any], out: Path) -> None:
    """The table, and where everything is."""
    titles = {
        "untrained": "untrained encoder", "mae": "MAE (random mask, pixels)",
        "cmt": "CMT-MAE (two stages)", "teacher": f"teacher ({content['settings']['teacher']})",
    }  # fmt: skip
    if content["results"]:
        table = Table(title="top-1 in percent on held-out images, mean-pooled features")
        for heading in ("", "k-NN", "linear probe", "training, s"):
            table.add_column(heading, justify="left" if not heading else "right")
        for name, row in content["results"].items():
            spent = content["training_seconds"].get(name)
            table.add_row(
                titles[name],
                f"{row['knn']:.1f}",
                f"{row['linear']:.1f}",
                f"{spent:.0f}" if spent else "",
            )
        Console().print(table)
    else:
        console.print(
            "no labels (or too few images) to measure with: only the runs and their pictures were made"
        )
    pictures = sorted((out / "cmt" / "pictures").glob("*.png"))
    if not pictures:
        raise InputError(f"{out} holds no pictures: delete it and run the demo again")
    console.print(f"pictures of attention and masks: {pictures[-1]}", markup=False)
    console.print(
        f"backbone: {out / 'cmt' / 'backbone.safetensors'}; everything in {out}, {content['seconds']:.0f} s",
        markup=False,
    )
