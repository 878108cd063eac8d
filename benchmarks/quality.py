"""Time to quality: k-NN and linear probe over the seconds of training, for us and for the others' own loops.

    python -m benchmarks.quality --data imagenette/ --teacher FILE --minutes 6 --photos 200 --also dtd10/ rsscn7/
    python -m benchmarks.quality --quick --data DIR --work DIR --out DIR              # does it work?

The same command goes on. Every contestant trains the same student on the same images for the same minutes, one
after another on a machine (or a core of it: taskset) that should do nothing else; the encoder is kept at --points
moments and measured afterwards. The seconds hold everything that a training needs after its start: reading of
images, the teacher's looks at whole photos (recipe best), steps. Contestants: any of our recipes by name,
``transformers`` (ViTMAE), ``lightly`` (its MAE; for this command alone: pip install --no-deps lightly
lightly_utils), ``distil`` (a student that predicts the teacher's features of the whole crop, no masks).
Writes quality.json, quality.md and quality.png into docs/results.
"""

import argparse
import copy
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, v2

from benchmarks.steps import LightlyMAE, transformers_model, why_not_lightly
from benchmarks.timing import RESULTS, Book, alternate_processes, markdown
from benchmarks.timing import Contestant as OwnProcess
from benchmarks.timing import Step as Turn
from cmt_mae.backbones.save import save_backbone
from cmt_mae.core.checkpoint import list_checkpoints, load_checkpoint
from cmt_mae.core.errors import InputError
from cmt_mae.core.files import write_json, write_text
from cmt_mae.data.sources import open_split
from cmt_mae.engine.optim import learning_rate
from cmt_mae.evaluate.knn import KnnConfig, evaluate_knn
from cmt_mae.evaluate.linear import LinearConfig, evaluate_linear
from cmt_mae.method.vit import build_student
from cmt_mae.pretraining.assembly import IMAGENET
from cmt_mae.pretraining.settings import PretrainConfig
from cmt_mae.tools.bench.build import frozen_backbone
from cmt_mae.tools.pretrain import pretrain

OTHERS = ("transformers", "lightly", "distil")
HALF = "_half"
"""A contestant's name that ends so has half the learning rate."""
RATES = (0.5, 1.0, 2.0)
"""Multiples of the base learning rate that ``--tune`` tries."""


def settings(given: argparse.Namespace, name: str, seed: int, scale: float = 1.0) -> PretrainConfig:
    """Of a run of ours; the others take student, decoder, mask ratio, batch and rate from those of ``mae``."""
    plain = name.removesuffix(HALF)
    scale *= 1.0 if plain == name else 0.5
    recipe = "mae" if plain in OTHERS else plain
    run = PretrainConfig.from_recipe(
        f"{recipe},{given.scale}",
        data=given.data,
        teacher=given.teacher,
        seed=seed,
        batch_size=given.batch,
    )
    run.out, run.optim.blr = str(given.work / name / f"seed{seed}" / "run"), run.optim.blr * scale
    run.runtime.device, run.runtime.progress, run.data.workers = given.device, False, given.workers
    run.check()
    return run


# --- training ------------------------------------------------------------------------------------------------


def train_ours(run: PretrainConfig, minutes: float, points_wanted: int) -> list[dict[str, Any]]:
    """Our own command's function. Its epochs are set by the seconds of its first steps; it resumes by itself."""
    per_epoch = len(open_split(run.data.path, "train")) / run.batch_size
    known = Path(run.out).parent / "epochs.json"
    if not known.exists():
        # twice over the same images: the second time they are in the store of a teacher that looks at whole photos
        cold, warm = (first_steps(run, per_epoch, number) for number in range(2))
        looks = max(0.0, cold - warm) * per_epoch if run.teacher.view == "photo" else 0.0
        steps = max(float(points_wanted), (minutes * 60 - looks) / warm)
        write_json(known, {"epochs": steps / per_epoch, "step_seconds": warm, "seconds_of_looks": looks})
    run.epochs = json.loads(known.read_text())["epochs"]
    run.optim.warmup_epochs, run.runtime.log_every = run.epochs / 10, 1
    run.runtime.keep_every = run.runtime.checkpoint_every = run.epochs / points_wanted
    pretrain(run)
    spent, total = 0.0, {}
    for step, seconds in step_seconds(Path(run.out), run.batch_size):
        spent += seconds
        total[step] = spent
    points = []
    for path in list_checkpoints(Path(run.out) / "checkpoints"):
        student, step = build_student(run.student), int(path.stem[5:])
        weights = load_checkpoint(path)["learner"]
        own = {k.removeprefix("student."): v for k, v in weights.items() if k.startswith("student.")}
        student.load_state_dict(own)
        file = save_encoder(student, run, Path(run.out).parent / f"step{step}")
        points.append({"seconds": total[step], "steps": step, "backbone": str(file)})
    return points


def first_steps(run: PretrainConfig, per_epoch: float, number: int) -> float:
    """Mean seconds of a step in a run of eight of them, the first two left out; half of them in stage two."""
    probe = copy.deepcopy(run)
    probe.out, probe.teacher.cache_folder = f"{run.out}_rate{number}", f"{run.out}_rate_store"
    probe.epochs, probe.runtime.log_every = 8 / per_epoch, 1
    probe.optim.warmup_epochs = probe.epochs / 10
    pretrain(probe)
    return statistics.mean(row[1] for row in step_seconds(Path(probe.out), run.batch_size)[2:])


def step_seconds(run: Path, batch: int) -> list[tuple[int, float]]:
    """(step, seconds of it) from a run's own log; evaluations and checkpoints are not in it."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], batch / row["images_per_second"]) for row in rows if "images_per_second" in row]


class Distilled(nn.Module):
    """The obvious rival, plainly on timm: all patches seen, all of the teacher's tokens predicted, smooth L1."""

    def __init__(self, run: PretrainConfig) -> None:
        super().__init__()
        name, kwargs = run.student.architecture()
        self.vit: Any = timm.create_model(name, num_classes=0, **kwargs)
        backbone = frozen_backbone(run)
        self.teacher: Any = backbone.model.requires_grad_(False).eval()
        self.size, self.prefix = tuple(backbone.img_size), backbone.prefix_tokens
        self.head = nn.Linear(self.vit.embed_dim, self.teacher.embed_dim)
        pairs = zip(
            (*IMAGENET, backbone.mean, backbone.std),
            ("mean", "std", "t_mean", "t_std"),
            strict=True,
        )
        for values, label in pairs:
            self.register_buffer(label, torch.tensor(values).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """The loss. images (B, 3, H, W) normalised with ImageNet's mean and std."""
        with torch.no_grad():
            pixels = images * self.std + self.mean
            pixels = F.interpolate(pixels, self.size, mode="bicubic", antialias=True)
            tokens = self.teacher.forward_features((pixels - self.t_mean) / self.t_std)
            target = F.layer_norm(tokens[:, self.prefix :], tokens.shape[-1:])
        predicted = self.head(self.vit.forward_features(images)[:, self.vit.num_prefix_tokens :])
        return F.smooth_l1_loss(predicted, target)


def make_other(name: str, run: PretrainConfig) -> tuple[Any, Any]:
    """(network that is trained, function images -> loss)."""
    if name == "transformers":
        model = transformers_model(run)
        return model, lambda images: model(pixel_values=images).loss
    made: Any = LightlyMAE(run) if name == "lightly" else Distilled(run)
    return made, made


def image_batches(run: PretrainConfig) -> Iterator[Tensor]:
    """The usual loader: ImageFolder, random crops and flips on PIL images, normalised floats."""
    crop = v2.RandomResizedCrop(run.student.size(), scale=(0.2, 1.0), interpolation=InterpolationMode.BICUBIC)
    tensor = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*IMAGENET)]
    transform = v2.Compose([crop, v2.RandomHorizontalFlip(), *tensor])
    train = Path(run.data.path) / "train"
    data = ImageFolder(str(train if train.is_dir() else run.data.path), transform)
    if len(data) < run.batch_size:
        raise InputError(f"{len(data)} photos do not fill a batch of {run.batch_size}: give more, or --batch")
    while True:
        for images, _ in DataLoader(data, run.batch_size, shuffle=True, drop_last=True):
            yield images


def train_other(name: str, run: PretrainConfig, minutes: float, points_wanted: int) -> list[dict[str, Any]]:
    """A plain loop: AdamW as MAE sets it, warm-up and cosine over the steps that fit; resumes at a point."""
    torch.manual_seed(run.seed)
    folder = Path(run.out)
    folder.mkdir(parents=True, exist_ok=True)
    model, loss_of = make_other(name, run)
    model.train()
    if name == "distil":
        model.teacher.eval()
    learned = [p for p in model.parameters() if p.requires_grad]
    decayed, plain = [p for p in learned if p.ndim > 1], [p for p in learned if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)
    state: dict[str, Any] = {"step": 0, "seconds": 0.0, "total": 0, "points": []}
    last = folder / "last.pt"
    if last.exists():
        state = torch.load(last, weights_only=True)
        model.load_state_dict(state.pop("model"))
        optimizer.load_state_dict(state.pop("optimizer"))
        torch.set_rng_state(state.pop("rng"))
    batches, early = image_batches(run), []
    while not state["total"] or state["step"] < state["total"]:
        begin = time.perf_counter()
        total = state["total"] or 1000  # until its own rate is known, the first steps of the warm-up
        rate = learning_rate(state["step"], run.optim.blr * run.batch_size / 256, total / 10, total, 0.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(next(batches))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        early.append(time.perf_counter() - begin)
        state["seconds"] += early[-1]
        state["step"] += 1
        if not state["total"] and state["step"] == 4:
            fitting = round(minutes * 60 / statistics.median(early[1:]))
            state["total"] = max(state["step"] + points_wanted, fitting)
        if state["total"] and state["step"] * points_wanted // state["total"] > len(state["points"]):
            place = keep_encoder(name, model, run, folder / f"point{len(state['points'])}")
            state["points"].append({"seconds": state["seconds"], "steps": state["step"], "backbone": str(place)})
            networks = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, **networks, "rng": torch.get_rng_state()}, folder / "aside.pt")
            (folder / "aside.pt").rename(last)
    points: list[dict[str, Any]] = state["points"]
    return points


def keep_encoder(name: str, model: Any, run: PretrainConfig, place: Path) -> Path:
    """What ``evaluate`` reads: a file with timm's names, or transformers' folder."""
    mean, std = IMAGENET
    if name == "transformers":
        model.save_pretrained(place)  # its folder says how images are normalised
        write_json(place / "preprocessor_config.json", {"image_mean": list(mean), "image_std": list(std)})
        return place
    return save_encoder(model.vit, run, place)


def save_encoder(student: Any, run: PretrainConfig, place: Path) -> Path:
    """timm's names in a file."""
    architecture, kwargs = run.student.architecture()
    file = place.with_suffix(".safetensors")
    save_backbone(
        file, student, architecture=architecture, kwargs=kwargs, mean=IMAGENET[0], std=IMAGENET[1],
        img_size=run.student.size(), licence=None, source="benchmarks.quality",
    )  # fmt: skip
    return file


def train(name: str, run: PretrainConfig, minutes: float, points: int) -> Turn:
    """One contestant, trained when its process is made; its points are the facts that come back."""
    kept = train_other(name, run, minutes, points) if name in OTHERS else train_ours(run, minutes, points)
    return Turn(lambda: None, {"points": kept})


def trained(name: str, run: PretrainConfig, minutes: float, points: int) -> list[dict[str, Any]]:
    """The points of a contestant that trains in a process of its own, alone."""
    own = {name: OwnProcess(partial(train, name, run, minutes, points))}
    found: list[dict[str, Any]] = alternate_processes(own, rounds=0, warm=0).facts[name]["points"]
    return found


# --- measuring -----------------------------------------------------------------------------------------------


def measured(backbone: str, sets: list[str], folder: Path, linear: bool) -> dict[str, float]:
    """k-NN and, where wanted, the linear probe of every data set, in percent."""
    found = {}
    for data in sets:
        common: dict[str, Any] = {
            "backbone": backbone, "data": data, "out": str(folder), "workers": 0, "device": "cpu",
            "cache": str(folder / "features"),
        }  # fmt: skip
        knn = evaluate_knn(KnnConfig(**common))
        found[f"knn {Path(data).name}"] = knn.metrics[knn.protocol["headline"]]
        if linear:
            probe = evaluate_linear(LinearConfig(**common))
            found[f"linear {Path(data).name}"] = probe.metrics[probe.protocol["headline"]]
    return found


def one_run(given: argparse.Namespace, name: str, seed: int, scale: float = 1.0) -> dict[str, Any]:
    """Train and measure; an entry of the JSON file."""
    points = trained(name.removesuffix(HALF), settings(given, name, seed, scale), given.minutes, given.points)
    folder = given.work / name / f"seed{seed}"
    for point in points[:-1]:
        point |= measured(point["backbone"], [given.data], folder, False)
    points[-1] |= measured(points[-1]["backbone"], [given.data, *given.also], folder, True)
    return {
        "points": [p | {"backbone": Path(p["backbone"]).name} for p in points],
        "scale_of_rate": scale,
    }


def untrained(given: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The student before its first step; an entry of the JSON file."""
    run, folder = settings(given, "mae", seed), given.work / "untrained" / f"seed{seed}"
    torch.manual_seed(seed)
    file = save_encoder(build_student(run.student), run, folder / "step0")
    point = {"seconds": 0.0, "steps": 0, "backbone": file.name}
    return {"points": [point | measured(str(file), [given.data, *given.also], folder, True)]}


def fewer_photos(data: Path, each: int, work: Path) -> Path:
    """A folder with links to ``each`` training photos of a class, evenly chosen, and to all of val."""
    folder = work / "data" / data.name
    for split in ("train", "val"):
        for label in sorted(path for path in (data / split).iterdir() if path.is_dir()):
            files = sorted(label.iterdir())
            chosen = files if split == "val" else [files[n * len(files) // each] for n in range(each)]
            place = folder / split / label.name
            place.mkdir(parents=True, exist_ok=True)
            for file in chosen:
                if not (place / file.name).exists():
                    (place / file.name).symlink_to(file.resolve())
    return folder


def tuned(given: argparse.Namespace, book: Book, name: str) -> float:
    """The multiple of the learning rate with the best k-NN on seed 0 after a third of the time."""
    if not given.tune:
        return 1.0
    found = {}
    for scale in RATES:
        short = {"work": given.work / f"rate{scale}", "also": [], "minutes": given.minutes / 3}
        tried = partial(one_run, argparse.Namespace(**{**vars(given), **short}), name, 0, scale)
        entry = book.measure(f"tune/{name}/{scale}", 0, tried)
        if entry.get("points"):
            found[scale] = entry["points"][-1][f"knn {Path(given.data).name}"]
    return max(found, key=lambda s: found[s]) if found else 1.0


# --- what was found --------------------------------------------------------------------------------------------


def curve(entries: dict[str, Any], name: str, key: str) -> list[tuple[float, float, float]]:
    """(seconds, mean, standard deviation over seeds) at every point."""
    runs = [e["points"] for k, e in entries.items() if k.startswith(f"run/{name}/") and "points" in e]
    start = [e["points"][0] for k, e in entries.items() if k.startswith("run/untrained/") and "points" in e]
    shortest = min((len(points) for points in runs), default=0)  # one step's rounding makes one point more
    runs = [[*points[: shortest - 1], points[-1]] for points in runs]
    rows = []
    for points in [start, *zip(*runs, strict=False)] if runs and start else zip(*runs, strict=False):
        values = [p[key] for p in points if key in p]
        if values:
            spread = statistics.stdev(values) if len(values) > 1 else math.nan
            rows.append((statistics.mean(p["seconds"] for p in points), statistics.mean(values), spread))
    return rows


def reached(rows: list[tuple[float, float, float]], level: float) -> float:
    """Seconds at which a curve reaches a level, between its points in a straight line; inf where it never does.

    The first row counts as the start (the untrained student)."""
    for (s0, v0, _), (s1, v1, _) in itertools.pairwise(rows):
        if v1 >= level:
            return s0 + (s1 - s0) * max(0.0, level - v0) / max(v1 - v0, 1e-9)
    return math.inf


def at_the_end(entries: dict[str, Any], name: str, key: str) -> str:
    """Mean and standard deviation of the last point."""
    rows = curve(entries, name, key)
    if not rows or (name != "untrained" and len(rows) < 2):
        return ""
    return f"{rows[-1][1]:.1f}" + ("" if math.isnan(rows[-1][2]) else f" ± {rows[-1][2]:.1f}")


def page(content: dict[str, Any]) -> str:
    """The tables."""
    entries, key, measures = content["entries"], f"knn {content['data']}", content["measures"]
    goal = curve(entries, "mae", key)
    ends, times = [], []
    for name in ["untrained", *content["contestants"]]:
        seeds = sum(k.startswith(f"run/{name}/") and "points" in e for k, e in entries.items())
        ends.append([name, str(seeds), *(at_the_end(entries, name, m) for m in measures)])
        rows = curve(entries, name, key)
        if not seeds:
            ends[-1][1] = str(content["absent"].get(name, "not run"))
        elif goal and name != "untrained":
            when, steps = (
                reached(rows, goal[-1][1]),
                entries[f"run/{name}/0"]["points"][-1]["steps"],
            )
            share = "never" if math.isinf(when) else f"{when:.0f} s ({when / goal[-1][0]:.2f} of MAE's time)"
            times.append([name, f"{rows[-1][0]:.0f}", str(steps), share])
    quick = ["**A quick run: it shows that it works. The numbers mean nothing.**", ""] if content["quick"] else []
    hardware = content["hardware"]
    return "\n".join([
        "# Time to quality", "", *quick,
        f"Every contestant trained {content['minutes']:g} minutes ({content['photos'] or 'all'} photos a class of "
        f"{content['data']}, `{content['scale']}`, batches of {content['batch']}), one after another. Top-1, %, "
        f"after that (mean ± standard deviation over n seeds). {hardware['processor']}, {content['threads']} of "
        f"{hardware['cores']} cores. Command: `{content['command']}`.",
        "",
        "`best`, `cmt`, `mae`: our recipes; the seconds of `best` hold the teacher's looks at whole photos. "
        "`distil`: plain distillation on timm, all patches seen, the teacher at its own size on every crop "
        "(`distil_half`: at half the learning rate). "
        "`transformers`, `lightly`: MAE by their code, in a plain loop. One learning rate for all, the scale's, "
        "unless the file says otherwise (scale_of_rate).",
        "", markdown(["contestant", "n", *measures], ends),
        "", f"When the mean curve of k-NN on {content['data']} reaches what `mae` has at its end:",
        "", markdown(["contestant", "seconds in all", "steps", "reached after"], times),
        "", "![k-NN over seconds of training](quality.png)", "", *content.get("notes", []),
    ])  # fmt: skip


def picture(content: dict[str, Any], path: Path) -> None:
    """k-NN over wall time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2))
    for name in content["contestants"]:
        rows = curve(content["entries"], name, f"knn {content['data']}")
        if rows:
            seconds, mean, spread = zip(*rows, strict=True)
            axes.errorbar(
                seconds,
                mean,
                [0 if math.isnan(s) else s for s in spread],
                label=name,
                marker="o",
                ms=3,
            )
    axes.set_xlabel("seconds of training")
    axes.set_ylabel(f"k-NN top-1 on {content['data']}, %")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(words: list[str] | None = None) -> dict[str, Any]:
    """Train what is missing, measure it, write the three files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="class folders with train and val")
    parser.add_argument("--photos", type=int, default=0, help="training photos a class; 0: all")
    parser.add_argument("--also", nargs="*", default=[], help="further labelled folders, measured only")
    parser.add_argument("--teacher", default="embedded")
    parser.add_argument("--contestants", default="best,mae,distil,cmt,transformers,lightly")
    parser.add_argument("--scale", default="micro64", help="recipe of the student's size")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--points", type=int, default=8, help="moments at which the encoder is kept and measured")
    parser.add_argument("--device", default="cpu", help="of our own contestants")
    parser.add_argument("--workers", type=int, default=0, help="loader processes of our own contestants")
    parser.add_argument("--tune", action="store_true", help="choose each learning rate on seed 0 first")
    parser.add_argument("--work", type=Path, default=Path("runs/quality"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes: no measurement")
    given = parser.parse_args(words)
    if given.quick:
        given.minutes, given.seeds = 0.01, 1
    names = given.contestants.split(",")
    absent = {"lightly": why_not_lightly()} if "lightly" in names and why_not_lightly() else {}
    if given.photos:
        given.data = fewer_photos(given.data, given.photos, given.work)
    given.data = str(given.data)
    kinds = ("knn", "linear")
    book = Book(
        given.out / "quality.json",
        command="python -m benchmarks.quality " + " ".join(sys.argv[1:] if words is None else words),
        quick=given.quick, data=Path(given.data).name, photos=given.photos, contestants=names, absent=absent,
        minutes=given.minutes, seeds=given.seeds, scale=given.scale, batch=given.batch,
        threads=torch.get_num_threads(),
        measures=[f"{kind} {Path(d).name}" for d in (given.data, *given.also) for kind in kinds],
    )  # fmt: skip
    scales = {name: tuned(given, book, name) for name in names if name not in absent}
    for seed in range(given.seeds):
        book.measure(f"run/untrained/{seed}", 0, partial(untrained, given, seed))
        for name, scale in scales.items():
            book.measure(f"run/{name}/{seed}", 0, partial(one_run, given, name, seed, scale))
    book.write()
    write_text(given.out / "quality.md", page(book.content))
    picture(book.content, given.out / "quality.png")
    print(page(book.content), file=sys.stderr)
    return book.content


if __name__ == "__main__":
    main()
