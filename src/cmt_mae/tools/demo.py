"""``cmt-mae demo``: a small two-stage run and MAE, measured, with pictures, on the sample images or your own."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from cmt_mae.data.sources import has_splits, open_split
from cmt_mae.evaluate.knn import KnnConfig, evaluate_knn
from cmt_mae.evaluate.linear import LinearConfig, evaluate_linear
from cmt_mae.pretraining import assembly
from cmt_mae.pretraining.settings import PretrainConfig
from cmt_mae.pretraining.student_files import save_student
from cmt_mae.tools.pretrain import pretrain
from cmt_mae.tools.report.page.command import ReportConfig, make_report

PACKED_SIZE = 96
HELD_OUT = 0.2  # of own images without a val split
SMALLEST_HELD_OUT = 20  # images: fewer say nothing about a probe
TITLES = {
    "untrained": "untrained encoder",
    "mae": "MAE (random mask, pixels)",
    "cmt": "CMT-MAE (recipe demo)",
    "teacher": "teacher",
}


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
    data, held_out, labelled = prepare_images(config, out)
    seconds: dict[str, float] = {}
    rows: dict[str, dict[str, Any]] = {}
    runs = {"mae": "mae,demo,mae", "cmt": "demo"}
    for name, recipe in runs.items():
        begin = time.perf_counter()
        console.print(f"[bold]{TITLES[name]}[/bold]")
        own = settings(config, recipe, data, out / name)
        own.data.val_share = held_out
        if labelled:  # before, half way and after, so that the report can say whether it learns
            own.runtime.probe_data, own.runtime.probe_every = str(data), config.epochs / 2
        pretrain(own)
        seconds[name] = round(time.perf_counter() - begin, 1)
    cmt = settings(config, "demo", data, out / "cmt")
    write_untrained(cmt, out / "untrained")
    if labelled:
        # results of what is no run lie in the run's folder, so that its report shows the same rows
        for name, backbone, place in (
            ("untrained", str(out / "untrained"), "cmt"), ("mae", str(out / "mae"), "mae"),
            ("cmt", str(out / "cmt"), "cmt"), ("teacher", config.teacher, "cmt"),
        ):  # fmt: skip
            size = teacher_size(cmt) if name == "teacher" else None
            rows[name] = measure(backbone, data, held_out, out / place, size)
    content = {
        "data": {"path": config.data or "sample images", "labelled": labelled},
        "settings": vars(config),
        "results": rows,
        "training_seconds": seconds,
        "seconds": round(time.perf_counter() - started, 1),
        **environment(),
    }
    write_json(out / "demo.json", content)
    make_report(ReportConfig(runs=[str(out / name) for name in runs], out=str(out / "report.html")))
    show(console, content, out)
    return content


def prepare_images(config: DemoConfig, out: Path) -> tuple[Path, float, bool]:
    """Packed images; the share to hold out where they have no val; and whether there is something to measure."""
    source = config.data
    if not source:
        source = str(out / "images")
        if not Path(source).exists():
            write_imagefolder(source, config.images, config.images // 2, PACKED_SIZE)
    packed = out / "packed"
    pack(PackConfig(data=source, out=str(packed), size=PACKED_SIZE, workers=config.workers))
    images = open_split(str(packed), "train")
    if has_splits(str(packed)):
        return packed, 0.0, images.classes is not None
    enough = images.classes is not None and HELD_OUT * len(images) >= SMALLEST_HELD_OUT
    return packed, HELD_OUT if enough else 0.0, enough


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


def measure(
    backbone: str, data: Path, held_out: float, out: Path, size: int | None
) -> dict[str, float]:
    """k-NN and linear probe (logistic regression), mean-pooled patch tokens, in percent; how many images."""
    common: dict[str, Any] = {
        "backbone": backbone, "data": str(data), "val_share": held_out, "out": str(out), "workers": 0,
        "size": size, "pools": ("mean",),
    }  # fmt: skip
    knn = evaluate_knn(KnnConfig(**common))
    linear = evaluate_linear(LinearConfig(**common))
    return {"knn": knn.headline, "linear": linear.headline, "images": knn.data["val"]}


def teacher_size(config: PretrainConfig) -> int:
    """Side in pixels of the teacher's input when it guides this student (a square one)."""
    teacher, _ = assembly.build_teacher(config, assembly.IMAGENET)
    assert teacher is not None
    return teacher.input_size[0]


def standard_error(percent: float, images: int) -> float:
    """Of a share of right answers, in percent."""
    return math.sqrt(max(percent * (100 - percent), 0.0) / images)


def in_words(rows: dict[str, dict[str, Any]]) -> str:
    """What the k-NN numbers mean, in a few sentences."""
    own, images = rows["cmt"]["knn"], rows["cmt"]["images"]

    def against(name: str) -> str:
        other = rows[name]["knn"]
        error = math.hypot(standard_error(own, images), standard_error(other, images))
        return f"{own - other:+.1f} ({abs(own - other) / max(error, 1e-9):.1f} standard errors)"

    teacher = rows["teacher"]["knn"]
    stands = (
        "a run this short does not reach it" if teacher > own else "the student is level or past it"
    )
    return (
        f"k-NN names each of {images} held-out images by the training images whose features are nearest. CMT-MAE "
        f"against MAE after the same images: {against('mae')}; against the encoder before training: "
        f"{against('untrained')}. Its teacher stands at {teacher:.1f}, and {stands}."
    )


def show(console: Console, content: dict[str, Any], out: Path) -> None:
    """The table, what it means, and where everything is."""
    rows = content["results"]
    if rows:
        table = Table(title="top-1 in percent on held-out images, with the standard error")
        for heading in ("", "k-NN", "linear probe", "training, s"):
            table.add_column(heading, justify="left" if not heading else "right")
        for name, row in rows.items():
            cells = [
                f"{row[key]:.1f} ± {standard_error(row[key], row['images']):.1f}"
                for key in ("knn", "linear")
            ]
            spent = content["training_seconds"].get(name)
            table.add_row(TITLES[name], *cells, f"{spent:.0f}" if spent else "")
        Console().print(table)
        Console(soft_wrap=True).print(in_words(rows), markup=False, highlight=False)
    else:
        console.print(
            "no labels (or too few images) to measure with: only the runs and their pictures were made"
        )
    pictures = sorted((out / "cmt" / "pictures").glob("*.png"))
    if not pictures:
        raise InputError(f"{out} holds no pictures: delete it and run the demo again")
    console.print(f"pictures of attention and masks: {pictures[-1]}", markup=False)
    console.print(f"report with the same rows: {out / 'report.html'}", markup=False)
    console.print(
        f"backbone: {out / 'cmt' / 'backbone.safetensors'}; everything in {out}, {content['seconds']:.0f} s",
        markup=False,
    )
