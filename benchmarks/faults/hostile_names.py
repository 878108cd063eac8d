"""Names that lead elsewhere, links, and names that are markup or a terminal's commands (part of `hostile`)."""

from __future__ import annotations

import hashlib
import html.parser
import json
import os
import re
import shutil
import tarfile
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from PIL import Image

from benchmarks.faults.calling import CONTROL, call_forked, fault_in

if TYPE_CHECKING:
    from benchmarks.faults.hostile import Stage

NASTY = (
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "a|b||c", "new\nline | row", "[red]x[/red]",
    "[/nothing]", "[link=https://x]y[/link]", "\x1b[2J\x1b]0;owned\x07", "\x9b31m", "`code` *b* __c__ ~~d~~",
    "](javascript:alert(1))", "&lt;b&gt; &amp; &#60;", "$\\frac{", "$x_{1", "\\", "{0} %s",
    "\u202eevil\u202c", "\r",
    "# head", "- list", "> quote", "1. one", "---", "||", "<!-- x", "</table>", "<b", "x" * 300, "'\"`",
)  # fmt: skip
"""Names of backbones, classes, tasks, protocols and files."""
TAGS = frozenset(["table", "thead", "tbody", "tr", "th", "td", "ul", "li", "p", "sup", "br"])
"""What the page of a comparison is made of."""


def run(stage: Stage) -> None:
    """All of it."""
    shards(stage)
    listed_names(stage)
    results(stage)
    links(stage)
    pages(stage)
    file_names(stage)


def inside_only(stage: Stage, kind: str, trial: str, words: list[str], statuses: tuple[int, ...]) -> None:
    """A command that may write below cell/out alone."""
    before = outside(stage)
    outcome = call_forked(words, stage.folder)
    faults = [f for f in [fault_in(outcome)] if f]
    if outcome.status not in statuses:
        faults.append(f"status {outcome.status}: {outcome.line()[:200]}")
    if outside(stage) != before:
        faults.append("something was written outside its folder")
    if "root:" in outcome.out + outcome.err:
        faults.append("the content of another file was shown")
    stage.count(kind, trial, faults)


def outside(stage: Stage) -> dict[str, str]:
    """What stands beside cell/out and beside the cell: name -> digest."""
    near = {p.name: digest_of(p) for p in stage.cell.iterdir() if not p.name.startswith("out")}
    return near | {p.name: "" for p in stage.folder.iterdir() if p.name not in (".stdout", ".stderr")}


def digest_of(folder: Path) -> str:
    """Of all names, links and contents from here downwards; pipes and devices by name."""
    found = hashlib.sha256()
    for path in [folder, *sorted(folder.rglob("*"))]:
        about = os.readlink(path) if path.is_symlink() else ""
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        found.update(f"{path}\0{about}\0".encode("utf-8", "surrogateescape") + content)
    return found.hexdigest()


def jpeg() -> bytes:
    """A grey picture."""
    raw = BytesIO()
    Image.new("RGB", (40, 40), (90, 120, 60)).save(raw, "JPEG")
    return raw.getvalue()


def shards(stage: Stage) -> None:
    """Tar members whose names climb, and members that are links, devices and pipes."""
    names = ["../../climbs", "/abs/olute", "a/../../b", "..", "./.", "C:\\w", "new\nline", "\x1b[2J", "<b>", "~/x"]
    picture = jpeg()
    for command in stage.some(("pretrain", "pack"), 1):
        for name in stage.some(names, 1):
            cell = stage.fresh()
            (cell / "other").mkdir()
            with tarfile.open(cell / "x.tar", "w") as tar:
                for number in range(16):
                    info = tarfile.TarInfo(f"{name}{number}.jpg")
                    info.size = len(picture)
                    tar.addfile(info, BytesIO(picture))
                for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
                    info = tarfile.TarInfo(f"{name}.link{kind.decode()}.jpg")
                    info.type, info.linkname = kind, "/etc/passwd"
                    tar.addfile(info)
            inside_only(stage, "tar names", f"{command}, {name!a}", of(stage, command, cell / "x.tar"), (0, 2))


def of(stage: Stage, command: str, data: Path) -> list[str]:
    """A short pre-training, or a packing, into cell/out."""
    if command == "pack":
        return ["pack", f"--data={data}", f"--out={stage.cell / 'out'}", "--size=16", "--workers=0"]
    return stage.tiny.pretrain(str(data), stage.cell / "out", "--epochs=0.5", "--optim.warmup_epochs=0.1")


def listed_names(stage: Stage) -> None:
    """Names inside annotations: DAVIS's list of sequences, COCO's file names."""
    where = ["--device=cpu", f"--backbone={stage.tiny.backbone}", f"--out={stage.folder / 'cell' / 'out'}"]
    for name in stage.some(("../../../outside", "/etc", "..", ".hidden", "a/../../b", "[/x]", "\x1b[2J"), 1):
        davis, coco = stage.fresh() / "davis", stage.cell / "coco"
        shutil.copytree(stage.folder / "davis", davis)
        (davis / "ImageSets/2017/val.txt").write_text(name + "\n")
        words = ["evaluate", "davis", *where, f"--data={davis}"]
        inside_only(stage, "names in lists", f"DAVIS, {name!a}", words, (2,))
        if name[0] in "/.a" and not stage.quick:
            shutil.copytree(stage.folder / "coco", coco)
            for path in coco.glob("annotations/*.json"):
                content = json.loads(path.read_text())
                content["images"][0]["file_name"] = f"{name}/passwd" if name != ".hidden" else "../x.jpg"
                path.write_text(json.dumps(content))
            words = ["evaluate", "coco", *where, f"--data={coco}", "--preset=quick"]
            inside_only(stage, "names in lists", f"COCO, {name!a}", words, (2,))


def results(stage: Stage) -> None:
    """Tasks and protocols as parts of a result's file name; a ledger that points elsewhere."""
    from cmt_mae.evaluate.everything import LEDGER, known_result
    from cmt_mae.evaluate.result import Result

    for name in (*NASTY, "../../climbs", "/abs", "..", "a/b"):
        out = stage.fresh() / "out"
        result = Result(
            task=name, metrics={"top1": 1.0}, protocol={"name": name, "headline": "top1"},
            backbone={"name": name}, data={}, seed=0,
        )  # fmt: skip
        path = result.save(out)
        faults = [] if path.parent == out / "results" and path.is_file() else [f"written to {path}"]
        if not re.fullmatch(r"[a-z0-9-]+\.json", path.name):
            faults.append(f"file name {path.name!a}")
        outside = stage.cell / "secret.json"
        shutil.copy(path, outside)
        ledger = {"k": {"task": "knn", "result": "../secret.json", "identity": result.identity()}}
        (out / LEDGER).write_text(json.dumps(ledger))
        if known_result(out, "k") is not None:
            faults.append("a ledger read a file outside its folder")
        stage.count("result names", ascii(name), faults)


def links(stage: Stage) -> None:
    """Loops, links to devices and private files among the images; a run directory whose files are links."""
    cell = stage.fresh()
    photos = cell / "photos"
    photos.mkdir()
    for number in range(16):
        (photos / f"{number}.jpg").write_bytes(jpeg())
    (photos / "loop").symlink_to(photos)
    (photos / "loop.jpg").symlink_to(photos / "loop.jpg")
    (photos / "passwd.jpg").symlink_to("/etc/passwd")
    (photos / "zero.jpg").symlink_to("/dev/zero")
    os.mkfifo(photos / "pipe.jpg")
    for command in stage.some(("pretrain", "pack"), 1):
        inside_only(stage, "links", f"images, {command}", of(stage, command, photos), (0, 2))
    for name in stage.some(("x.pth", "x.json", "x.safetensors", "x.yaml"), 2):
        for target in stage.some(("pipe", "/dev/zero", "/dev/stdin", "/etc/passwd"), 1):
            path = stage.fresh() / name
            if target == "pipe":
                os.mkfifo(path)
            else:
                path.symlink_to(target)
            words = ["export", f"--backbone={path}", f"--out={stage.cell / 'out.safetensors'}"]
            words = ["compare", str(path)] if name.endswith("json") else words
            words = ["pretrain", f"--recipe={path}", "--out=o"] if name.endswith("yaml") else words
            inside_only(stage, "links", f"{name} -> {target}", words, (2,))
    from benchmarks.faults.hostile import short_pretrain

    files = ("run.lock", "metrics.jsonl", "run.json", "config.yaml", "backbone.safetensors", "bad_images.txt")
    for name in stage.some(files, 1):
        for dangling in stage.some((False, True), 1 if name != "run.lock" else 2):
            out = stage.fresh() / "out"
            shutil.copytree(stage.folder / "run", out)
            (stage.cell / "private").mkdir()
            target = stage.cell / "private" / "thesis.txt"
            content = b"years of work" if name not in ("run.json", "config.yaml") else (out / name).read_bytes()
            for path in out.glob("checkpoints/step_*4.*"):
                path.unlink()  # so that there are steps to do, and lines to write
            if not dangling:
                target.write_bytes(content)
            (out / name).unlink(missing_ok=True)
            (out / name).symlink_to(target)
            shown = f"run directory, {name}{', dangling' if dangling else ''}"
            inside_only(stage, "links", shown, short_pretrain(stage, out), (0, 2))


# --- markup and terminals ------------------------------------------------------------------------


class Reader(html.parser.HTMLParser):
    """Tags and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_comment(self, data: str) -> None:
        self.tags.add(f"<!-- {data}")

    def handle_data(self, data: str) -> None:
        self.text += data


def pages(stage: Stage) -> None:
    """Every name in every place of a result: the Markdown page, rendered by markdown-it, has our tags alone."""
    from markdown_it import MarkdownIt

    from cmt_mae.core.text import printable
    from cmt_mae.evaluate.result import Result

    render = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render
    for name in stage.some(NASTY, 2):
        folder = stage.fresh() / "results"
        for seed in range(2):
            result = Result(
                task=name, metrics={name: 1.0, "b": 2.0}, seed=seed, versions={name: name},
                protocol={"name": name, "headline": name, name + "k": name, "list": [name, name]},
                backbone={"name": name, "architecture": name, "digest": name, "licence": name},
                data={"path": name, "fingerprint": name, name: seed},
            )  # fmt: skip
            result.save(stage.cell)
        files = sorted(str(path) for path in folder.glob("*.json"))
        for form in stage.some(("markdown", "table", "json"), 2):
            outcome = call_forked(["compare", *files, "--format", form], stage.folder)
            faults = [f for f in [fault_in(outcome)] if f]
            if outcome.status != 0:
                faults.append(f"status {outcome.status}: {outcome.line()[:200]}")
            if form == "markdown":
                page = Reader(render(outcome.out))
                if not page.tags <= TAGS or not page.attributes <= {"style"}:
                    faults.append(f"tags {sorted(page.tags - TAGS)}, attributes {page.attributes}")
                shown = "".join(printable(name).split())
                if shown not in "".join(page.text.split()):
                    faults.append("the name is not shown as it is")
            stage.count("pages", f"{form}, {name!a}", faults)


def file_names(stage: Stage) -> None:
    """Names of files, folders and classes in what commands say and draw."""
    for name in stage.some(NASTY, 1):
        name = name.replace("/", "_")[:120]
        data = stage.fresh() / f"data {name}"
        source = Path(stage.tiny.photos)
        for split in ("train", "val"):
            for number, folder in enumerate(sorted((source / split).iterdir())):
                goal = data / split / (f"{name}{number}" if number else name)
                shutil.copytree(folder, goal)
            (goal / f"broken {name}.jpg").write_bytes(b"no picture")
        weights = stage.cell / f"w {name}.safetensors"
        shutil.copy(stage.tiny.backbone, weights)
        out = stage.cell / f"out {name}"
        on = [f"--data={data}", f"--out={out}", f"--backbone={weights}", "--device=cpu", "--workers=0"]
        good = ["evaluate", "knn", f"--data={stage.tiny.packed}", *on[1:], "--k=[3]"]
        commands = {
            "knn on bad images": (["evaluate", "knn", *on], (2,)),
            "knn": (good, (0,)),
            "finetune": (["evaluate", "finetune", *on, "--epochs=1", "--batch_size=8", "--progress=false",
                          "--warmup_epochs=0.1", "--preset=quick"], (0, 2)),
            "pretrain": (stage.tiny.pretrain(str(data), stage.cell / f"run {name}", "--epochs=1"), (0,)),
            "compare": (["compare", str(out)], (0, 2)),
            "export": (["export", f"--backbone={weights}", f"--out={out}.pth", "--format=torch"], (0,)),
            "unknown": (["evaluate", "knn", "--backbone", name, f"--data={data}"], (2,)),
        }  # fmt: skip
        for command, (words, statuses) in stage.some(commands.items(), 3):
            outcome = call_forked(words, stage.folder)
            faults = [f for f in [fault_in(outcome)] if f]
            if outcome.status not in statuses:
                faults.append(f"status {outcome.status}: {outcome.line()[:200]}")
            stage.count("file names", f"{command}, {name!a}", faults)
        for path in [*stage.cell.rglob("bad_images.txt"), *stage.cell.rglob("metrics.jsonl")]:
            if CONTROL.search(path.read_text(errors="replace")):
                stage.count("file names", f"{path.name}, {name!a}", ["control characters in a text file"])
        for path in stage.cell.rglob("config.yaml"):
            yaml.safe_load(path.read_text())
