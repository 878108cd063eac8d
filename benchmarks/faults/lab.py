"""What every fault is given (files, commands, an undisturbed run), and how a row of the table says what broke."""

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.faults.launch import Ended, Launch, in_fork, judged
from benchmarks.faults.same import differences
from benchmarks.photos import photo
from benchmarks.timing import SHARED

PRETRAIN = [
    "pretrain", "--epochs=4", "--batch_size=8", "--precision=fp32", "--student.img_size=[32]",
    "--student.patch_size=8", "--student.preset=micro", "--student.width=16", "--student.depth=2",
    "--student.heads=2", "--student.drop_path=0.2", "--decoder.width=16", "--decoder.depth=1",
    "--decoder.heads=2", "--optim.blr=0.03", "--optim.warmup_epochs=0.5", "--runtime.device=cpu",
    "--runtime.progress=false", "--runtime.log_every=1", "--runtime.checkpoint_every=0.4", "--data.workers=0",
]  # fmt: skip
"""40 images: 20 steps, the switch of stages at 10; drop path draws random numbers in every step."""
STOPPED = 75
"""Exit status of a run that was asked to stop and wrote its checkpoint."""


class Broken(Exception):
    """A promise was broken: the text says how, enough to repeat it."""


class NotHere(Exception):
    """The fault cannot be made on this machine; the text says why."""


@dataclass(frozen=True)
class Row:
    """One fault: ``trial`` sets up, injects, and raises Broken where the promise does not hold."""

    name: str
    promise: str
    trial: "Callable[[Lab, random.Random], object]"
    times: int = 1
    """Trials of a full run; a quick one makes one."""


@dataclass
class Lab:
    """The files and commands of one run of the harness."""

    folder: Path
    quick: bool = False
    shared: Path = SHARED
    """Real data; rows that need it raise NotHere without it."""
    number: int = 0
    whole_runs: dict[str, Path] = field(default_factory=dict)

    def fresh(self) -> Path:
        """The empty folder in which one trial works."""
        self.number += 1
        made = self.folder / f"trial{self.number}"
        made.mkdir(parents=True)
        return made

    def count(self, full: int, quick: int) -> int:
        """How often something is done within a trial."""
        return quick if self.quick else full

    @cached_property
    def files(self) -> Path:
        """packed and photos (two of them broken), teacher, backbone, segments; made in a fork."""
        root = self.folder / "files"
        in_fork(lambda: make_files(root), self.folder / "files.log")
        return root

    @property
    def packed(self) -> str:
        """40 labelled training and 20 validation images, packed at 40 px."""
        return str(self.files / "packed")

    @property
    def photos(self) -> str:
        """The same as JPEG files, two of them broken."""
        return str(self.files / "photos")

    @property
    def backbone(self) -> str:
        """A small ViT of random weights."""
        return str(self.files / "backbone.safetensors")

    def pretrain(self, out: Path, *more: str, data: str = "") -> list[str]:
        """Words of a pre-training of 20 steps."""
        teacher = self.files / "teacher.safetensors"
        words = [f"--data.path={data or self.packed}", "--data.max_bad=0.5", f"--teacher.name={teacher}"]
        return [*PRETRAIN, *words, f"--out={out}", *more]

    def finetune(self, out: Path, *more: str) -> list[str]:
        """Words of a fine-tuning of 10 steps with mixing, drop path, erasing and running average."""
        return [
            "evaluate", "finetune", f"--backbone={self.backbone}", f"--data={self.packed}", f"--out={out}",
            "--device=cpu", "--progress=false", "--workers=0", "--batch_size=8", "--micro_batch=4", "--epochs=2",
            "--log_every=1", "--checkpoint_every=0.4", "--eval_every=1", "--ema_decay=0.9", "--drop_path=0.2",
            "--pictures=2", *more,
        ]  # fmt: skip

    def segmentation(self, out: Path, *more: str) -> list[str]:
        """Words of a segmentation of 6 steps."""
        return [
            "evaluate", "ade20k", f"--backbone={self.backbone}", f"--data={self.files / 'segments'}",
            f"--out={out}", "--device=cpu", "--progress=false", "--workers=0", "--preset=quick", "--batch_size=4",
            "--iterations=6", "--crop_size=48", "--channels=8", "--log_every=1", "--eval_every=1",
            "--checkpoint_every=0.5", "--pictures=1", *more,
        ]  # fmt: skip

    def linear(self, out: Path, *more: str) -> list[str]:
        """Words of a linear probe."""
        return [
            "evaluate", "linear", f"--backbone={self.backbone}", f"--data={self.packed}", f"--out={out}",
            "--device=cpu", "--workers=0", "--protocol=mae", "--epochs=150", f"--cache={out}/cache", *more,
        ]  # fmt: skip

    def finished(self, name: str, words: Callable[[Path], list[str]], processes: int = 1) -> Path:
        """The undisturbed run of a command, made once; trials compare with it."""
        if name not in self.whole_runs:
            folder = self.fresh()
            launch = Launch(words(folder / "run"), folder / "log", processes).start()
            if any(launch.finish()):
                raise Broken(f"the undisturbed run failed: {launch.statuses} {launch.last()}")
            self.whole_runs[name] = folder / "run"
        return self.whole_runs[name]

    def copy_of_finished(self) -> Path:
        """A finished pre-training to hurt."""
        run = self.fresh() / "run"
        shutil.copytree(self.finished("pretrain", self.pretrain), run)
        return run

    def ends_as(self, whole: Path, words: list[str], processes: int = 1, **more: Any) -> None:
        """The command, left alone now, ends with the undisturbed run's bits."""
        run = Path(next(w for w in words if w.startswith("--out=")).removeprefix("--out="))
        launch = Launch(words, run.parent / "restart.log", processes, **more).start()
        if any(launch.finish()):
            raise Broken(f"the restart ended with {launch.statuses}: {launch.last()}")
        # config.yaml holds --out; a run in an interpreter of its own draws larger pictures
        left_out = ("config.yaml", "pictures") if launch.real else ("config.yaml",)
        found = [d for d in differences(whole, run) if not d.startswith(left_out)]
        if found:
            raise Broken(f"not the undisturbed run: {'; '.join(found[:3])}")

    def refused(
        self, words: list[str], *says: str, statuses: tuple[int, ...] = (2,), limit_s: float = 60
    ) -> Ended:
        """The command is refused with one line that says all of ``says`` (statuses: what else it may be)."""
        ended = judged(words, self.folder, limit_s)
        if fault := ended.fault():
            raise Broken(fault)
        if ended.status not in statuses:
            raise Broken(f"status {ended.status}, wanted {statuses}: {ended.line()}")
        if ended.status == 2 and (gone := [s for s in says if s.lower() not in ended.line().lower()]):
            raise Broken(f"the line does not say {gone}: {ended.line()}")
        return ended


def make_files(root: Path) -> None:
    """What ``Lab.files`` names."""
    import timm
    import torch

    from cmt_mae.backbones.save import save_backbone
    from cmt_mae.data.pack import PackConfig, pack

    write_photos(root / "photos")
    pack(PackConfig(data=str(root / "photos"), out=str(root / "packed"), size=40, workers=0))
    for path in sorted((root / "photos" / "train").rglob("*.jpg"))[5:27:21]:
        path.write_bytes(path.read_bytes()[:200])
    torch.manual_seed(5)
    for name, depth in (("teacher", 2), ("other_teacher", 2), ("backbone", 4)):
        kwargs = {"img_size": 48, "patch_size": 12, "embed_dim": 24, "depth": depth, "num_heads": 2}
        model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **kwargs)
        save_backbone(
            root / f"{name}.safetensors", model, architecture="vit_tiny_patch16_224", kwargs=kwargs, img_size=48,
            mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), licence="none",
            source="random weights of a test",
        )  # fmt: skip
    write_segments(root / "segments")


def write_photos(root: Path, classes: int = 4, train: int = 40, val: int = 20) -> None:
    """Small pictures of shapes in class folders."""
    for split, count in (("train", train), ("val", val)):
        for number in range(count):
            place = root / split / f"class{number % classes}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number:03d}.jpg").write_bytes(photo(number + 1000 * (split == "val"), (60, 50)))


def write_segments(root: Path) -> None:
    """ADE20K's layout: 9 training and 4 validation pictures of boxes on two grounds."""
    rng = np.random.default_rng(0)
    for split, count in (("training", 9), ("validation", 4)):
        for part in ("images", "annotations"):
            (root / part / split).mkdir(parents=True)
        for i in range(count):
            mask = np.ones((40, 48), dtype=np.uint8)
            mask[i % 5 + 4 : i % 5 + 24, 5:25], mask[:, 30:] = 2, 3
            pixels = mask[..., None] * np.array([70, 50, 20]) + rng.normal(0, 9, (*mask.shape, 3))
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(root / "images" / split / f"{i}.png")
            Image.fromarray(mask).save(root / "annotations" / split / f"{i}.png")
    (root / "objectInfo.txt").write_text("Name\nground\nbox\nwall\n")


def tree(root: Path) -> dict[str, bytes]:
    """Every file below a folder, links as their targets: what must not have changed."""
    return {
        str(p.relative_to(root)): os.readlink(p).encode() if p.is_symlink() else p.read_bytes()
        for p in root.rglob("*")
        if p.is_symlink() or p.is_file()
    }


def rows_of(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
