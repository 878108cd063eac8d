"""Fuzzed words, settings, recipes and results, and tiny inputs: exit 2 with one line, never a traceback."""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from benchmarks.faults.lab import Broken, Lab, Row
from benchmarks.faults.launch import HUNG, Ended, judged
from cmt_mae.core.cli import COMMANDS, EVALUATIONS, load, main
from cmt_mae.core.settings import walk

PLACES = {
    "out", "data", "data.path", "data_root", "backbone", "cache", "runs", "init_from", "run", "images", "results",
    "backbones", "teachers", "teacher.cache_folder", "experiment", "host", "open", "objects",
}  # fmt: skip
"""Settings that say where to read, write and listen: they are not drawn, so that a case stays in its folder."""
NOWHERE: dict[str, list[str]] = {  # of each command: words that end it before any work
    "pretrain": ["--out", "o", "--data", "nowhere"],
    "pack": ["--out", "o", "--data", "nowhere"],
    "embed": ["--out", "o.npz", "--backbone", "nowhere.pth", "--images", "nowhere"],
    "export": ["--out", "o", "--backbone", "nowhere.pth"],
    "demo": ["--out", "o", "--data", "nowhere"],
    "compare": ["nowhere"],
    "bench": ["--data", "nowhere", "--teacher", "nowhere.pth"],
    "ablate": ["--out", "o", "--experiment", "masks", "--data", "nowhere"],
    "explain": ["--run", "nowhere", "--images", "nowhere"],
    "all": ["--backbone", "nowhere.pth", "--data_root", "nowhere", "--out", "o"],
    **{name: ["nowhere"] for name in ("app", "doctor", "report", "watch")},
}
KNN = ["--backbone", "nowhere.pth", "--data", "nowhere"]
ODD = (
    "", " ", "nan", ".nan", "inf", "-.inf", "1e999", "-1", "0", "0.0", "1e-320", "9" * 30, "-" + "9" * 5000,
    "true", "null", "~", "none", "[]", "{}", "[[[[", "{a: {b: {c: [1]}}}", "&a [*a]", "*a", "!!python/none",
    "!!binary aGk=", "2020-99-99", "0x1F", "0o17", "1_000", "12:30:45", "ÿ", "\u202e", "\ud800", "\x1b[31m",
    "a\nb", "<script>", "|", "'", '"', "%s", "{0}", "$HOME", "~root", "../..", "-", "--", "=", "a=b", "[1,2",
    "1,2", "[1, two]", "[nan]", '{"class_path": "os.system", "init_args": {"command": "exit"}}', "1.5", "7",
    "[16, 16]", "[0.5, 0.1]", "cpu", "auto", "mean", "cls", "random", "momentum", "embedded", "teacher", "quick",
)  # fmt: skip


def value(rng: random.Random) -> str:
    """Anything that someone might type, and what nobody would."""
    return rng.choice((
        lambda: rng.choice(ODD),
        lambda: str(rng.randint(-3, 300)),
        lambda: str(rng.uniform(-0.5, 1.5)),
        lambda: str(rng.uniform(-1e300, 1e300)),
        lambda: json.dumps(grown(rng, 3)),
        lambda: "".join(chr(rng.randrange(1, 0x2FFF)) for _ in range(rng.randrange(12))),
    ))()  # fmt: skip


def grown(rng: random.Random, depth: int) -> Any:
    """A value of JSON of any shape."""
    kind = rng.randrange(7 if depth else 5)
    if kind == 5:
        return [grown(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind == 6:
        return {rng.choice(ODD): grown(rng, depth - 1) for _ in range(rng.randrange(4))}
    return (None, True, rng.randint(-9, 9), rng.uniform(-2, 2), rng.choice(ODD))[kind]


def exchanged(content: Any, rng: random.Random, share: float = 0.15) -> Any:
    """A copy of a JSON value in which some parts are others, or gone."""
    if rng.random() < share:
        return grown(rng, 2)
    if isinstance(content, dict):
        return {k: exchanged(v, rng, share) for k, v in content.items() if rng.random() > share / 3}
    if isinstance(content, list):
        return [exchanged(v, rng, share) for v in content]
    return content


def called(words: list[str], limit_s: int = 20) -> Ended:
    """In this process: for commands that end before any work."""
    out, err = io.StringIO(), io.StringIO()

    class Hang(BaseException):
        pass

    def ring(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(limit_s)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(words)
    except Hang:
        status = HUNG
    except BaseException:
        traceback.print_exc(file=err)
        status = 70
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return Ended(status, out.getvalue(), err.getvalue())


def settings_of(command: str) -> list[str]:
    """All settings of a command, sections included, but for places."""
    settings, _ = load({**COMMANDS, **EVALUATIONS}[command])
    return sorted(name for name, *_ in walk(settings) if name not in PLACES)


def start_of(command: str) -> list[str]:
    """The words of a command that has nothing to work on."""
    if command in COMMANDS:
        return [command, *NOWHERE.get(command, ["nowhere"])]
    return ["evaluate", command, *NOWHERE.get(command, KNN)]


def fuzzed(kind: str, lab: Lab, rng: random.Random) -> None:
    """settings: any value for any setting; words: any words in any order; recipes: YAML of any shape."""
    folder = lab.fresh()
    before = os.getcwd()
    os.chdir(folder)
    try:
        known = {name: settings_of(name) for name in (*COMMANDS, *EVALUATIONS)}
        for _ in range(lab.count(600, 25)):
            words = fuzzed_words(kind, known, folder, rng)
            if fault := called(words).fault():
                raise Broken(f"{ascii(words)[-500:]}: {fault}")
    finally:
        os.chdir(before)


def fuzzed_words(kind: str, known: dict[str, list[str]], folder: Path, rng: random.Random) -> list[str]:
    """One case."""
    command = rng.choice(sorted(name for name, settings in known.items() if settings))
    if kind == "settings":
        words = start_of(command)
        for _ in range(rng.randint(1, 3)):
            name = rng.choice(known[command])
            name = rng.choice((name + "x", name[:-1], name.upper(), "." + name)) if rng.random() < 0.1 else name
            given = value(rng)
            words += [f"--{name}={given}"] if rng.random() < 0.5 else [f"--{name}", given]
        return words
    if kind == "words":
        words = start_of(command) if rng.random() < 0.7 else [rng.choice(("", "recipes", "evaluate", "nope"))]
        own = [f"--{name}" for name in known[command]]
        flags = ("--json", "--recipe", "--help", "-h", "-x", "--", "---", "--=", *own)
        at = rng.randrange(len(words) + 1)
        more = [rng.choice((rng.choice(flags), value(rng))) for _ in range(rng.randint(1, 5))]
        made = [*words[:at], *more, *words[at:]]
        return [w for w in made if w] if words[0] in ("app", "watch", "demo") else made
    tree = {rng.choice(known["pretrain"]): grown(rng, 3) for _ in range(rng.randrange(4))}
    nested = {name.split(".")[0]: {name.split(".")[-1]: part} for name, part in tree.items()}
    text = yaml.safe_dump(nested, allow_unicode=True) if rng.random() < 0.6 else f"{value(rng)}: {value(rng)}"
    (folder / "r.yaml").write_bytes(text.encode("utf-8", "replace"))
    return [*start_of("pretrain"), "--recipe", rng.choice(("r.yaml", "mae,r.yaml", "r.yaml,micro64"))]


def fuzzed_work(lab: Lab, rng: random.Random) -> None:
    """Settings near the right ones on real data: trained, or refused in one line, in bounded time and memory."""
    whole = ("batch_size", "student.depth", "student.width", "student.heads", "student.patch_size",
             "decoder.depth", "decoder.heads", "runtime.micro_batch", "runtime.log_every", "seed")  # fmt: skip
    share = ("mask.ratio", "alpha", "stage1_share", "momentum.start", "optim.warmup_epochs", "optim.clip",
             "student.drop_path", "data.max_bad", "optim.weight_decay", "optim.blr")  # fmt: skip
    for _ in range(lab.count(40, 4)):
        out = lab.fresh() / "run"
        more = []
        for _ in range(rng.randint(1, 3)):
            if rng.random() < 0.5:
                more.append(f"--{rng.choice(whole)}={rng.choice((rng.randint(-1, 40), 3 * 10**9))}")
            else:
                more.append(f"--{rng.choice(share)}={rng.uniform(-0.5, 1.5):.3g}")
        ended = judged([*lab.pretrain(out, "--epochs=0.4"), *more], lab.folder, 60)
        if fault := ended.fault():
            raise Broken(f"{more}: {fault}")


def tiny_data(lab: Lab, _: random.Random) -> None:
    """No image, one image, images of one pixel, fewer than a batch, a class without images: trained or refused."""
    folder = lab.fresh()
    for name in ("none", "one", "pixel", "few"):
        (folder / name).mkdir()
    Image.new("RGB", (40, 40)).save(folder / "one" / "a.png")
    for number in range(16):
        Image.new("RGB", (1, 1), (number, 0, 0)).save(folder / "pixel" / f"{number}.png")
    for number in range(5):
        Image.new("RGB", (40, 30), (9 * number, 0, 0)).save(folder / "few" / f"{number}.png")
    for name in ("none", "one", "pixel", "few", "missing"):
        words = lab.pretrain(folder / f"out_{name}", "--epochs=1", data=str(folder / name))
        ended = lab.refused(words, statuses=(0, 2))
        if ended.status != (0 if name == "pixel" else 2):
            raise Broken(f"{name}: status {ended.status}: {ended.line()}")
    for number in (1, 5):  # batches of one, and of all
        data = str(folder / "few")
        words = lab.pretrain(folder / f"b{number}", f"--batch_size={number}", data=data)
        lab.refused(words, statuses=(0,))
    for part in ("train/a", "train/b", "val/a"):
        (folder / "labelled" / part).mkdir(parents=True)
        if part != "train/b":
            shutil.copy(folder / "one" / "a.png", folder / "labelled" / part)
    for task in ("knn", "linear", "finetune"):
        words = ["evaluate", task, f"--backbone={lab.backbone}", f"--data={folder / 'labelled'}", "--device=cpu"]
        lab.refused([*words, f"--out={folder / task}"], statuses=(0, 2))


ONE_LINE = "every failure is exit 2 with one line, never a traceback or a hang"
ROWS = [
    *[Row(f"fuzzed {kind}", ONE_LINE, partial(fuzzed, kind)) for kind in ("settings", "words", "recipes")],
    Row("fuzzed work", ONE_LINE, fuzzed_work, 3),
    Row("tiny data", "trained, or refused in one line", tiny_data),
]
