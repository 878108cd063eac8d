"""The teacher's outputs on disk, so that it runs once a picture: whole photos (``teacher.view photo``) or, with
fixed crops, crops (``teacher.cache``).

One record a picture in ``outputs.bin`` and its CRC-32 in ``sums.bin``, both memory-mapped. A record counts only
while its sum is right, so whatever a kill, a power cut or a second process leaves half written is computed again.
A batch always gets what was read back from the store: a run is the same whether it filled a record itself or
found it there.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from cmt_mae.backbones import Backbone
from cmt_mae.core.errors import InputError
from cmt_mae.core.files import write_json, writing
from cmt_mae.data.source import Source
from cmt_mae.method.cmtmae import takes_class_token
from cmt_mae.method.photo_view import Grid, at_crops
from cmt_mae.method.teacher import Teacher, TeacherOutput
from cmt_mae.method.vit import block_number
from cmt_mae.pretraining.settings import PretrainConfig

KeepAs = Literal["fp32", "fp16", "int8"]
AT_ONCE = 16
"""Pictures of one forward pass, always: another number would give other last bits."""


def teacher_store(
    config: PretrainConfig,
    teacher: Teacher,
    source: Source,
    accelerator: Accelerator,
    backbone: Backbone,
) -> "TeacherStore":
    """Where the teacher's outputs of this run are kept. Raises InputError over several machines."""
    if int(os.environ.get("WORLD_SIZE", 1)) != int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        raise InputError(
            "the teacher's outputs can be kept on one machine only: set teacher.cache to false and "
            "teacher.view to crop, or start one machine"
        )
    made_by = what_outputs_follow_from(config, teacher, source, accelerator, backbone.digest)
    made_by["teacher_facts"] = backbone.facts
    key = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(config.teacher.cache_folder or Path(config.out) / "teacher_cache") / key
    return TeacherStore(
        folder, teacher, pictures=len(source), heads=config.mask.heads,
        class_token=takes_class_token(config.target), keep_as=made_by["keep_as"], made_by=made_by,
    )  # fmt: skip


def what_outputs_follow_from(
    config: PretrainConfig, teacher: Teacher, source: Source, accelerator: Accelerator, digest: str
) -> dict[str, Any]:
    """Everything that the teacher's outputs follow from; runs that agree in it share one store."""
    settings, student, data = config.teacher, config.student, config.data
    photo = settings.view == "photo"
    made_by: dict[str, Any] = {
        "teacher": digest,
        "images": source.fingerprint(),
        "view": settings.view,
        "input_size": teacher.input_size,
        "grid": teacher.grid,
        "attention_block": block_number(teacher.model, settings.attention_block),
        "heads": config.mask.heads,
        "feature": [settings.feature, settings.last_k if settings.feature == "last_k" else 0],
        "project_to": settings.project_to,
        "class_token": takes_class_token(config.target),
        "keep_as": settings.keep_as if settings.keep_as != "auto" else "fp16" if photo else "fp32",
        "channels": teacher.channels,
        "shrink": data.shrink,
        # the same settings give other last bits elsewhere
        "computed": [
            accelerator.mixed_precision, config.frozen_precision, config.runtime.compile, accelerator.device.type
        ],
    }  # fmt: skip
    if not photo:
        made_by["crops"] = [
            config.seed, data.scale, data.flip, student.size(), settings.pixels, settings.grid_align, data.mean,
            data.std,
        ]  # fmt: skip
    return made_by


class TeacherStore:
    """Records of N pictures in one folder, shared by all processes of this machine that open it."""

    def __init__(
        self,
        folder: Path,
        teacher: Teacher,
        *,
        pictures: int,
        heads: str,
        class_token: bool,
        keep_as: KeepAs,
        made_by: dict[str, Any],
    ) -> None:
        """pictures: N, of the training data. heads: see MaskConfig.heads. made_by: what the outputs follow from,
        for people. Nothing is touched before ``create``."""
        self.folder, self.teacher, self.heads = folder, teacher, heads
        self.class_token, self.keep_as, self.made_by = class_token, keep_as, made_by
        patches = teacher.grid[0] * teacher.grid[1]
        tokens = patches + class_token
        number: Any = {"fp32": np.float32, "fp16": np.float16, "int8": np.int8}[keep_as]
        fields: list[Any] = [
            ("attention", np.float32, (patches,)),
            ("mass", np.float32),
            *([("scale", np.float32, (tokens,))] if keep_as == "int8" else []),
            ("features", number, (tokens, teacher.width)),
        ]
        size = np.dtype(fields).itemsize
        self.kind = np.dtype([*fields, ("_", np.uint8, (-size % 4,))])
        self.pictures = pictures
        self.files: Files | None = None
        self.warned = False

    @property
    def bytes(self) -> int:
        """Size on the disk."""
        return self.pictures * (self.kind.itemsize + 4)

    def create(self) -> None:
        """Make the files unless they are there, with all their space on the disk taken. Called by one process.

        Raises InputError where the disk is too small. A file that was cut short is made whole again; its lost
        records no longer have the right sums.
        """
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        # another run that shares the folder may be about to do the same
        with open(self.folder / "create.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._reserve()

    def _reserve(self) -> None:
        sizes = {"outputs.bin": self.pictures * self.kind.itemsize, "sums.bin": 4 * self.pictures}
        taken = sum(taken_on_disk(self.folder / name) for name in sizes)
        need, free = sum(sizes.values()) - taken, shutil.disk_usage(self.folder).free
        if need > free:
            raise InputError(
                f"the teacher's outputs of {self.pictures} pictures need {need / 1e9:.1f} GB in {self.folder}, "
                f"where {free / 1e9:.1f} GB are free: make room, choose another place with teacher.cache_folder, "
                "or keep less with teacher.keep_as int8 or teacher.project_to"
            )
        for name, size in sizes.items():
            path = self.folder / name
            with writing(path), open(path, "ab") as file:
                os.truncate(path, size)
                # through a map, a full disk would end the process with a signal: here it is an error
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
        write_json(self.folder / "store.json", {**self.made_by, "bytes": self.bytes})

    def open(self) -> None:
        """Map the files; after ``create`` has returned in one of the processes."""
        self.files = Files(self.folder, self.kind, self.pictures)

    def wanted(self) -> "Wanted":
        """For the loader: which pictures have to be computed, and so to be sent along."""
        return Wanted(self.folder, self.kind, self.pictures)

    def count(self) -> int:
        """How many pictures are kept (their sums not verified)."""
        assert self.files is not None
        return int(np.count_nonzero(self.files.sums))

    def outputs(self, index: Tensor, pictures: Tensor | None, rows: Tensor) -> TeacherOutput:
        """Outputs of a batch on the device of ``pictures`` (else on the CPU), on the teacher's grid.

        index (B,) int64: numbers of the pictures; pictures (K, C, H, W) normalised for the student: those of the
        batch's ``rows`` (K,), which are computed and kept where they are not yet. All others must be there.
        """
        assert self.files is not None
        numbers = index.numpy()
        records = self.files.records[numbers]
        places = rows.tolist()
        new = [k for k, row in enumerate(places) if not self.files.holds(int(numbers[row]))]
        for begin in range(0, len(new), AT_ONCE):
            chosen = new[begin : begin + AT_ONCE]
            assert pictures is not None
            packed = self._compute(pictures[chosen])
            for k, record in zip(chosen, packed, strict=True):
                records[places[k]] = record
                if is_finite(record):  # else the step will be skipped, and computed again next time
                    self._spoilt(int(numbers[places[k]]))
                    self.files.keep(int(numbers[places[k]]), record)
        return self._unpack(records)

    def at_boxes(
        self,
        index: Tensor,
        photos: Tensor | None,
        rows: Tensor,
        boxes: Tensor,
        flip: Tensor | None,
        grid: Grid,
    ) -> TeacherOutput:
        """``outputs`` of whole photos, read at crops on the student's ``grid``. boxes, flip: see ``at_crops``."""
        found = self.outputs(index, photos, rows)
        return at_crops(found, self.teacher.grid, grid, boxes, flip)

    def _spoilt(self, number: int) -> None:
        assert self.files is not None
        if self.files.sums[number] and not self.warned:
            self.warned = True
            logging.getLogger(__name__).warning(
                "%s was damaged (picture %d and maybe others): computed again", self.folder, number
            )

    @torch.no_grad()
    def _compute(self, pictures: Tensor) -> np.ndarray:
        """Records of up to AT_ONCE pictures."""
        count = len(pictures)
        filler = pictures[:1].expand(AT_ONCE - count, -1, -1, -1)
        found = self.teacher.outputs(torch.cat([pictures, filler]), self.heads, self.class_token)
        records = np.zeros(count, dtype=self.kind)
        records["attention"] = found.attention[:count].cpu().numpy()
        records["mass"] = found.mass[:count].cpu().numpy()
        features = found.features[:count].cpu().numpy()
        if self.keep_as == "int8":
            scale = np.abs(features).max(-1) / 127
            records["scale"] = scale
            safe = np.where(scale > 0, scale, 1)[..., None]
            features = np.rint(np.nan_to_num(features / safe))
        elif (
            self.keep_as == "fp16"
            and np.abs(features[np.isfinite(features)]).max(initial=0) > 65504
        ):
            raise InputError(
                "the teacher's features do not fit into fp16 (above 65504): set teacher.keep_as to fp32"
            )
        records["features"] = features
        return records

    def _unpack(self, records: np.ndarray) -> TeacherOutput:
        device = next(self.teacher.parameters()).device

        def part(name: str) -> Tensor:
            values = torch.from_numpy(np.ascontiguousarray(records[name]))
            return values.to(device, non_blocking=True).float()

        features = part("features")
        if self.keep_as == "int8":
            features = features * part("scale")[..., None]
        return TeacherOutput(part("attention"), part("mass"), features)


class Files:
    """The two maps."""

    def __init__(self, folder: Path, kind: np.dtype, pictures: int) -> None:
        try:
            self.records = np.memmap(folder / "outputs.bin", kind, "r+", shape=(pictures,))
            self.sums = np.memmap(folder / "sums.bin", np.uint32, "r+", shape=(pictures,))
        except (OSError, ValueError) as error:
            raise InputError(
                f"the teacher's outputs in {folder} cannot be read ({error}): delete it"
            ) from None

    def holds(self, number: int) -> bool:
        """Whether this picture is kept and undamaged."""
        return bool(self.sums[number]) and self.sums[number] == checksum(self.records[number])

    def keep(self, number: int, record: np.ndarray) -> None:
        """Write a picture, then its sum."""
        self.records[number] = record
        self.sums[number] = checksum(record)


class Wanted:
    """Whether a picture is missing in the store. Small enough to be sent to a loader's process, where it maps the
    files itself; reading them there also brings them into memory before the training process wants them."""

    def __init__(self, folder: Path, kind: np.dtype, pictures: int) -> None:
        self.where = (folder, kind, pictures)
        self.files: Files | None = None

    def __call__(self, number: int) -> bool:
        if self.files is None:
            self.files = Files(*self.where)
        return not self.files.holds(number)

    def __getstate__(self) -> dict[str, Any]:
        return {"where": self.where, "files": None}


def checksum(record: np.ndarray) -> int:
    """CRC-32 of a record; never 0, which means that there is none."""
    return zlib.crc32(record.tobytes()) or 1


def is_finite(record: np.ndarray) -> bool:
    """Whether all numbers of a record are."""
    names = record.dtype.names or ()
    return all(np.isfinite(record[name]).all() for name in names if name != "_")


def taken_on_disk(path: Path) -> int:
    """Bytes of a file that have their place on the disk."""
    return 512 * path.stat().st_blocks if path.exists() else 0
