"""Does adapting a published network to one's own images help? Linear probe of it as it is, adapted, and of others.

    python -m benchmarks.adapt --data dtd10/ rsscn7/ --teacher deit_tiny_patch16_224.safetensors --seeds 3
    python -m benchmarks.adapt --quick --data DIR --work DIR --out DIR                # does it work?

The same command goes on. Rows: ``teacher`` (as it is), ``adapted`` (recipe adapt: begins as the teacher),
``collab`` (the same start, CMT-MAE with the loss at all tokens), ``mae`` (the same start, MAE's loss), ``scratch``
(recipe adapt, but from random weights). Training sees the train images without their labels; logistic regression
on train, C chosen there by cross-validation, then gives val accuracies for class token, mean of the patches and
both. All rows are measured at the same size. Writes adapt.json and adapt.md into docs/results.
"""

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.timing import RESULTS, Book, markdown, stamp
from cmt_mae.core.files import write_text
from cmt_mae.evaluate.linear import LinearConfig, evaluate_linear
from cmt_mae.pretraining.settings import PretrainConfig
from cmt_mae.tools.pretrain import pretrain

PHOTO = {"view": "photo", "attention_block": -2}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "adapted": ("adapt", {}),
    "collab": ("adapt,cmt_all", {"teacher": PHOTO, "mask": {"ratio": 0.5}, "momentum": {"half_lives": 5}}),
    "mae": ("adapt,mae", {"teacher": {"view": "crop"}}),
    "scratch": ("adapt", {"init_from": "", "student": {"preset": "tiny", "patch_size": 16}}),
}
READINGS = ("cls", "mean", "cls+mean")


def settings(given: argparse.Namespace, row: str, data: Path, seed: int) -> PretrainConfig:
    """Of one training."""
    recipe, changes = ROWS[row]
    run = PretrainConfig.from_recipe(recipe, **changes)
    run.data.path, run.teacher.name, run.seed = str(data), given.teacher, seed
    run.out = str(given.work / data.name / f"{row}_{seed}")
    run.student.img_size, run.epochs, run.optim.warmup_epochs = [given.train_size], given.epochs, given.epochs / 10
    run.batch_size, run.optim.blr = given.batch, given.blr
    run.teacher.cache_folder = str(given.work / "teacher")
    run.runtime.device, run.runtime.progress, run.data.workers = "cpu", False, 0
    run.runtime.picture_every = given.epochs + 1
    return run


def one_run(given: argparse.Namespace, row: str, data: Path, seed: int) -> dict[str, Any]:
    """Train unless it is the teacher, and measure; an entry of the JSON file."""
    backbone = given.teacher
    if row != "teacher":
        run = settings(given, row, data, seed)
        pretrain(run)
        backbone = run.out
    result = evaluate_linear(LinearConfig(
        backbone=backbone, data=str(data), size=given.size, out=str(given.work / data.name / f"{row}_{seed}"),
        workers=0, device="cpu", progress=False,
    ))  # fmt: skip
    top1 = {name: value for name, value in result.metrics.items() if name.endswith("top1")}
    return {"metrics": top1, "val": result.data["val"]}


def page(content: dict[str, Any]) -> str:
    """The table: mean and standard deviation over seeds, and the difference to the teacher."""
    entries, rows = content["entries"], []
    keys = [f"{name}/top1" for name in READINGS] + ["top1"]
    for data in content["data"]:
        for row in ("teacher", *content["rows"]):
            found = [e for k, e in entries.items() if k.startswith(f"{data}/{row}/") and "metrics" in e]
            if found:
                values = [[e["metrics"].get(k, float("nan")) for e in found] for k in keys]
                rows.append([data, row, str(len(found)), *(spread(v) for v in values)])
    val = {k.split("/")[0]: e["val"] for k, e in entries.items() if "val" in e}
    counts = ", ".join(f"{name}: {n} images" for name, n in val.items())
    quick = ["**A quick run: it shows that it works. The numbers mean nothing.**", ""] if content["quick"] else []
    hardware = content["hardware"]
    return "\n".join([
        "# Adapting a published network", "", *quick,
        f"Top-1 in percent on val ({counts}; the standard error of one number is 100 x sqrt(p (1 - p) / n)), mean "
        f"± standard deviation over n seeds. {content['epochs']:g} epochs at {content['train_size']} px, blr "
        f"{content['blr']:g}, measured at {content['size']} px. The last column reads class token, mean or both, "
        f"whichever cross-validation on train chose. {hardware['processor']}, {hardware['cores']} cores, "
        f"{content['hardware']['date']}. Command: `{content['command']}`.", "",
        markdown(["images", "row", "n", "class token", "mean", "both", "chosen on train"], rows), "",
    ])  # fmt: skip


def spread(values: list[float]) -> str:
    """Mean and, of several, standard deviation."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def main(words: list[str] | None = None) -> dict[str, Any]:
    """Train and measure what is missing, write both files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="labelled folders with train and val")
    parser.add_argument("--teacher", default="embedded")
    parser.add_argument("--rows", default="adapted,mae,scratch")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=10.0)
    parser.add_argument("--blr", type=float, default=4e-4)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--train_size", type=int, default=112)
    parser.add_argument("--size", type=int, default=224, help="at which all rows are measured")
    parser.add_argument("--work", type=Path, default=Path("runs/adapt"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="one epoch of one seed: no measurement")
    given = parser.parse_args(words)
    if given.quick:
        given.epochs, given.seeds, given.train_size, given.size = 1.0, 1, 64, 64
    rows = given.rows.split(",")
    book = Book(
        given.out / "adapt.json",
        command="python -m benchmarks.adapt " + " ".join(sys.argv[1:] if words is None else words),
        quick=given.quick, data=[d.name for d in given.data], rows=rows, epochs=given.epochs, blr=given.blr,
        train_size=given.train_size, size=given.size, batch=given.batch,
    )  # fmt: skip
    book.content["hardware"]["date"] = stamp()["date"][:10]
    for seed in range(given.seeds):
        for data in given.data:
            for row in ("teacher", *rows):
                if row != "teacher" or seed == 0:
                    key = f"{data.name}/{row}/{seed}"
                    book.measure(key, 0, partial(one_run, given, row, data, seed))
    book.write()
    write_text(given.out / "adapt.md", page(book.content))
    print(page(book.content), file=sys.stderr)
    return book.content


if __name__ == "__main__":
    main()
