"""Hostile files: pickles with code, YAML that constructs, archives and names that lead elsewhere, markup in names.

Every payload is real: a control shows that it does create its file (or speaks) where it is unpickled or loaded the
unguarded way. Every command runs in a fork and must end with status 2 and one line (or 0 where the file is merely
a bad image among good ones), with no file of a payload and nothing changed outside its own folder.
"""

import contextlib
import io
import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from benchmarks.faults import hostile_names
from benchmarks.faults.calling import Outcome, call_forked, fault_in, in_fork
from benchmarks.faults.campaign import Options, Verdict
from benchmarks.faults.tiny import Tiny, prepare
from cmt_mae.core.files import sha256

T = TypeVar("T")
PROMISE = "files run no code, lead nowhere else, and write neither markup nor a terminal's commands"


class Payload:
    """Unpickled without care, it calls a function of the system."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def payloads(marker: Path) -> dict[str, Payload]:
    """Ways in which a pickle creates the file ``marker``."""
    return {
        "os.system": Payload(os.system, f"touch {marker}"),
        "exec": Payload(exec, f"open({str(marker)!r}, 'w')"),
        "subprocess": Payload(subprocess.call, ["touch", str(marker)]),
        "os.open": Payload(os.open, str(marker), os.O_CREAT),
    }


def weights(payload: Payload) -> dict[str, Any]:
    """A checkpoint such as MAE's with something beside its weights."""
    model = {"cls_token": torch.zeros(1, 1, 8), "patch_embed.proj.weight": torch.zeros(8, 3, 4, 4)}
    return {"model": model, "args": payload, "step": 4}


def _zip(path: Path, payload: Payload) -> None:
    torch.save(weights(payload), path)


def _legacy(path: Path, payload: Payload) -> None:
    torch.save(weights(payload), path, _use_new_zipfile_serialization=False)


def _plain(path: Path, payload: Payload) -> None:
    path.write_bytes(pickle.dumps(weights(payload), protocol=2))


def _torchscript(path: Path, payload: Payload) -> None:
    """What torch.jit.load would take for an archive, its data.pkl with the payload."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (("data.pkl", pickle.dumps(payload, protocol=2)), ("constants.pkl", b"]q\0."),
                              ("version", b"3\n"), ("code/__torch__.py", b"import os\n")):  # fmt: skip
            archive.writestr(f"archive/{name}", content)


CONTAINERS: dict[str, tuple[str, Callable[[Path, Payload], None]]] = {
    "torch.save": (".pth", _zip),
    "torch.save, before 1.6": (".pt", _legacy),
    "pickle": (".ckpt", _plain),
    "pickle as .bin": (".bin", _plain),
    "pickle as .safetensors": (".safetensors", _plain),
    "TorchScript": (".pt", _torchscript),
}
"""Name -> ending, writer."""


@dataclass
class Stage:
    """Files, counts and findings of one campaign."""

    folder: Path
    tiny: Tiny
    quick: bool
    kinds: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.marker = self.folder / "payload_was_here"
        self.cell = self.folder / "cell"

    def some(self, items: Iterable[T], few: int) -> list[T]:
        """All of them; in a quick campaign so many, evenly spread."""
        found = list(items)
        return found[:: max(1, -(-len(found) // few))] if self.quick else found

    def fresh(self) -> Path:
        """The empty folder in which one trial works."""
        shutil.rmtree(self.cell, ignore_errors=True)
        self.cell.mkdir()
        return self.cell

    def count(self, kind: str, trial: str, faults: list[str]) -> None:
        """A trial is over."""
        self.kinds[kind] += 1
        self.failures += [f"{kind}: {trial}: {fault}" for fault in faults]

    def refuses(
        self, kind: str, trial: str, words: list[str], *, statuses: tuple[int, ...] = (2,), says: str = ""
    ) -> Outcome:
        """Run a command that must not run the payload, and should be refused with one line."""
        outcome = call_forked(words, self.folder)
        faults = [f for f in [fault_in(outcome)] if f]
        if outcome.status not in statuses:
            faults.append(f"status {outcome.status}: {outcome.line()[:200]}")
        if says and says not in outcome.err:
            faults.append(f"no word of '{says}': {outcome.line()[:200]}")
        if self.marker.exists() or "foreign code ran" in outcome.out + outcome.err:
            self.marker.unlink(missing_ok=True)
            faults.append("the payload ran")
        self.count(kind, trial, faults)
        return outcome


def campaign(options: Options) -> Verdict:
    """All kinds of hostile files."""
    stage = Stage(options.folder, prepare(options.folder / "files"), options.quick)
    in_fork(lambda: make_runs(stage))
    for part in (controls, pickles, resumes, arrays, constructors, scripts):
        part(stage)
    hostile_names.run(stage)
    return Verdict(PROMISE, sum(stage.kinds.values()), stage.failures, dict(stage.kinds))


def make_runs(stage: Stage) -> None:
    """A finished pre-training, fine-tuning and the other tasks' data, once."""
    from cmt_mae.core.cli import main
    from cmt_mae.data.sample import write_coco, write_davis

    write_davis(stage.folder / "davis", 1, 4)
    write_coco(stage.folder / "coco", 8, 4)
    assert main(short_pretrain(stage, stage.folder / "run")) == 0
    if not stage.quick:
        assert main(short_finetune(stage, stage.folder / "finetuned")) == 0


def short_pretrain(stage: Stage, out: Path, *more: str) -> list[str]:
    """Four steps."""
    return stage.tiny.pretrain(
        stage.tiny.packed, out, "--epochs=0.8", "--optim.warmup_epochs=0.1", "--runtime.log_every=1", *more
    )


def short_finetune(stage: Stage, out: Path) -> list[str]:
    """Five steps."""
    return stage.tiny.finetune(out, "--epochs=1", "--warmup_epochs=0.1")


# --- code in pickles -----------------------------------------------------------------------------


def controls(stage: Stage) -> None:
    """The payloads are real: unpickled without care, each creates its file."""
    for name, payload in payloads(stage.marker).items():
        pickle.loads(pickle.dumps(payload))
        faults = [] if stage.marker.exists() else ["the payload does nothing: the campaign proves nothing"]
        stage.marker.unlink(missing_ok=True)
        stage.count("controls", name, faults)


def places(stage: Stage, file: Path) -> Iterator[tuple[str, list[str]]]:
    """Every command that reads a file of weights."""
    tiny, cell = stage.tiny, stage.cell
    of = ["--device=cpu", f"--out={cell / 'out'}", f"--backbone={file}"]
    yield "teacher", short_pretrain(stage, cell / "out", f"--teacher.name={file}")
    yield "init_from", short_pretrain(stage, cell / "out", f"--init_from={file}")
    yield "export", ["export", f"--backbone={file}", f"--out={cell / 'x.safetensors'}"]
    yield "bench", ["bench", *short_pretrain(stage, cell / "out")[1:], f"--teacher.name={file}"]
    for task, data in (
        ("knn", tiny.packed), ("linear", tiny.packed), ("finetune", tiny.packed), ("ade20k", tiny.segments),
        ("coco", stage.folder / "coco"), ("davis", stage.folder / "davis"),
    ):  # fmt: skip
        yield f"evaluate {task}", ["evaluate", task, *of, f"--data={data}"]
    yield "evaluate all", ["evaluate", "all", *of, f"--data_root={stage.folder / 'files'}"]
    if file.suffix == ".safetensors":
        run = cell / "run"
        shutil.copytree(stage.folder / "run", run)
        shutil.copy(file, run / "backbone.safetensors")
        yield "run directory", ["export", f"--backbone={run}", f"--out={cell / 'x.safetensors'}"]
    if file.suffix == ".bin":
        model = cell / "model"
        model.mkdir()
        shutil.copy(file, model / "pytorch_model.bin")
        (model / "config.json").write_text('{"model_type": "vit"}')
        yield "Hugging Face folder", ["export", f"--backbone={model}", f"--out={cell / 'x.safetensors'}"]


def pickles(stage: Stage) -> None:
    """Each place x each container x each payload; quick: each place once."""
    names = list(payloads(stage.marker))
    pairs = list(itertools.product(CONTAINERS, names))
    for number, (container, name) in enumerate(pairs):
        suffix, write = CONTAINERS[container]
        cell = stage.fresh()
        file = cell / f"weights{suffix}"
        write(file, payloads(stage.marker)[name])
        for at, (place, words) in enumerate(places(stage, file)):
            if stage.quick and (at % 2 or number != (at * 5) % len(pairs)):
                continue
            stage.refuses(
                "pickles",
                f"{place}, {container}, {name}",
                words,
                says="backbone" if place == "run directory" else file.stem,
            )
        if not stage.quick and name == "os.system":  # the same in a process of its own, as users start it
            words = next(iter(places(stage, file)))[1]
            real_process(stage, f"teacher, {container}", words)


def real_process(stage: Stage, trial: str, words: list[str]) -> None:
    """``python -m cmt_mae`` itself."""
    done = subprocess.run(
        [sys.executable, "-m", "cmt_mae", *words], capture_output=True, text=True, timeout=120, check=False
    )
    faults = [f for f in [fault_in(Outcome(done.returncode, done.stdout, done.stderr))] if f]
    if done.returncode != 2 or stage.marker.exists():
        stage.marker.unlink(missing_ok=True)
        faults.append(f"status {done.returncode}, or the payload ran")
    stage.count("pickles, new process", trial, faults)


def resumes(stage: Stage) -> None:
    """The newest checkpoint exchanged for a payload with a right checksum; the run continued, or started from."""
    for name, payload in stage.some(payloads(stage.marker).items(), 1):
        for kind, words in (
            ("run", lambda out: short_pretrain(stage, out)),
            ("finetuned", lambda out: short_finetune(stage, out)),
        ):
            if stage.quick and kind != "run":
                continue
            out = stage.fresh() / kind
            shutil.copytree(stage.folder / kind, out)
            last = sorted((out / "checkpoints").glob("step_*.pt"))[-1]
            torch.save({"step": 4, "payload": payload}, last)
            last.with_suffix(".sha256").write_text(sha256(last))
            stage.refuses("checkpoints", f"resume of {kind}, {name}", words(out), says=f"{last.name} is refused")
            if kind == "run":
                more = short_pretrain(stage, stage.cell / "new", f"--init_from={out}")
                stage.refuses("checkpoints", f"init_from, {name}", more, says=last.name)


def arrays(stage: Stage) -> None:
    """.npy files with pickled objects: packs, images in folders and shards; parquet whose cells are pickles."""
    payload = next(iter(payloads(stage.marker).values()))
    objects = np.array([payload] * 40, dtype=object)

    def bad_images(data: Path, trial: str) -> None:
        words = stage.tiny.pretrain(str(data), stage.cell / "out", "--epochs=0.8", "--data.max_bad=0.1")
        stage.refuses("arrays", trial, words)

    for name in stage.some(("images.npy", "labels.npy"), 1):
        pack = stage.fresh() / "packed"
        shutil.copytree(stage.tiny.packed, pack)
        np.save(pack / "train" / name, objects, allow_pickle=True)
        bad_images(pack / "train", f"pack, {name}")
    folder = stage.fresh() / "photos"
    folder.mkdir()
    raw = io.BytesIO()
    np.save(raw, objects, allow_pickle=True)
    for number in range(20):
        (folder / f"{number}.npy").write_bytes(raw.getvalue())
    bad_images(folder, "folder of .npy")
    with tarfile.open(stage.cell / "x.tar", "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
    bad_images(stage.cell / "x.tar", "shard of .npy")
    if not stage.quick:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.table({"image": [pickle.dumps(payload)] * 20})
        pq.write_table(table, stage.cell / "x.parquet")
        bad_images(stage.cell / "x.parquet", "parquet of pickles")
        fields = pa.schema([pa.field("image", pa.binary(), metadata={
            "ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickle.dumps(payload),
        })])  # fmt: skip
        pq.write_table(table.cast(fields), stage.cell / "y.parquet")
        bad_images(stage.cell / "y.parquet", "parquet with a Python extension type")


# --- YAML and settings ---------------------------------------------------------------------------


def constructors(stage: Stage) -> None:
    """YAML tags and class paths, in recipes, in a run's config.yaml and on the command line."""
    touch = f"touch {stage.marker}"
    tags = [
        f"!!python/object/apply:os.system ['{touch}']",
        f"!!python/object/apply:subprocess.check_output [['touch', '{stage.marker}']]",
        f"!!python/object/new:os.system ['{touch}']",
        f"!!python/object/apply:eval [\"open('{stage.marker}', 'w')\"]",
        "!!python/name:os.system",
        "!!python/module:os",
        "!!python/object:subprocess.Popen {}",
        "!!python/tuple [1, 2]",
        f"!<tag:yaml.org,2002:python/object/apply:os.system> ['{touch}']",
    ]
    classes = [
        json.dumps({"class_path": path, "init_args": {"args": touch, "command": touch}})
        for path in ("subprocess.Popen", "os.system", "cmt_mae.pretraining.settings.DataConfig")
    ]
    for value in stage.some(tags, 1):
        cell = stage.fresh()
        recipe = cell / "r.yaml"
        texts = (f"epochs: {value}\n", f"{value}\n", f"mask: {{ratio: {value}}}\n", f"? {value}\n: 3\n")
        for text in stage.some(texts, 2):
            recipe.write_text(text)
            words = short_pretrain(stage, cell / "out", f"--recipe={recipe}")
            stage.refuses("yaml", f"recipe, {text!r}", words, says="recipe")
        run = cell / "run"
        shutil.copytree(stage.folder / "run", run)
        (run / "config.yaml").write_text(f"epochs: {value}\n")
        stage.refuses("yaml", f"config.yaml, {value}", short_pretrain(stage, run), says="config.yaml")
    for value in stage.some([*tags, *classes], 2):
        for name in stage.some(("mask", "mask.ratio", "epochs", "data", "data.scale", "teacher"), 2):
            words = short_pretrain(stage, stage.fresh() / "out", f"--{name}", value)
            stage.refuses("yaml", f"--{name} {value}", words)


# --- TorchScript ---------------------------------------------------------------------------------


class Speaks(torch.nn.Module):
    """Scripted, it says so whenever an archive of it is loaded by torch.jit.load."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, bool]:
        return self.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]) -> None:
        print("foreign code ran")
        self.weight = state[0]
        self.training = state[1]


def scripts(stage: Stage) -> None:
    """An archive whose own code runs when it is loaded: read as data, or refused; never run."""
    file = stage.fresh() / "speaks.pt"
    in_fork(lambda: torch.jit.script(Speaks()).save(str(file)))
    said = stage.cell / "said"

    def load_unguarded() -> None:
        with open(said, "w") as text, contextlib.redirect_stdout(text):
            torch.jit.load(str(file))

    in_fork(load_unguarded)
    real = "foreign code ran" in said.read_text()
    stage.count("TorchScript", "control", [] if real else ["torch.jit.load runs nothing: proves nothing"])
    for place, words in stage.some(places(stage, file), 1):
        stage.refuses("TorchScript", place, words, says="speaks.pt")
