"""The teacher's outputs on disk, for runs whose crops are fixed: each image goes through the teacher once.

Exact: attention and features are kept in fp32 as they came. An image counts as kept only once ``save`` has
written so, after its numbers have reached the disk; what a kill loses is computed again, with the same batch.
"""

import fcntl
import math
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cmt_mae.core.errors import InputError
from cmt_mae.core.files import write_atomically, writing
from cmt_mae.method.teacher import Teacher, TeacherOutput


class TeacherCache:
    """``attention.npy`` (N, L), ``mass.npy`` (N,), ``features.npy`` (N, T, E) in one folder, memory-mapped.

    Several processes of one machine may share it: each writes images of its own and notes them in a file of
    its own.
    """

    def __init__(
        self,
        folder: Path,
        teacher: Teacher,
        *,
        images: int,
        heads: str,
        class_token: bool,
        rank: int = 0,
    ) -> None:
        """images: N, of the training data. heads: see MaskConfig.heads. Nothing is touched before ``open``."""
        self.folder, self.teacher, self.rank, self.images = folder, teacher, rank, images
        self.heads, self.class_token = heads, class_token
        patches = teacher.grid[0] * teacher.grid[1]
        self.shapes = {
            "attention": (images, patches),
            "mass": (images,),
            "features": (images, patches + class_token, teacher.width),
        }
        self.arrays: dict[str, np.ndarray] = {}
        self.kept = np.zeros(images, dtype=bool)

    def create(self, *, from_the_start: bool) -> None:
        """Make the files unless they are there, with all their space on the disk taken.

        from_the_start: the run has no checkpoint, so nothing says what made the outputs of an earlier start:
        they are forgotten, as they are where a file is missing. Raises InputError where the disk is too small.
        """
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        # another run that shares the folder must not put new files in place of those in use
        with open(self.folder / "create.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._create(from_the_start)

    def _create(self, from_the_start: bool) -> None:
        missing = [name for name in self.shapes if not self._path(name).exists()]
        with writing(self.folder):
            if missing or from_the_start:
                for path in self.folder.glob("kept_*.npy"):
                    path.unlink()
        need = sum(4 * math.prod(self.shapes[name]) for name in missing)
        free = shutil.disk_usage(self.folder).free
        if need > free:
            raise InputError(
                f"the teacher's outputs of {self.images} images need {need / 1e9:.1f} GB in {self.folder}, where "
                f"{free / 1e9:.1f} GB are free: make room, or set teacher.cache to false"
            )
        for name in missing:
            write_atomically(self._path(name), partial(make_array, shape=self.shapes[name]))

    def open(self) -> None:
        """Map the files and read which images are kept. Raises InputError where they are of another shape."""
        for name, shape in self.shapes.items():
            try:
                array = np.load(self._path(name), mmap_mode="r+")
            except (OSError, ValueError) as error:
                raise InputError(
                    f"{self._path(name)} cannot be read ({error}): delete it"
                ) from None
            if array.shape != shape:
                raise InputError(
                    f"{self._path(name)} holds {array.shape}, wanted {shape}: delete {self.folder}"
                )
            self.arrays[name] = array
        self.read_kept()

    def read_kept(self) -> None:
        """Learn which images any process has kept up to its last ``save``."""
        for path in sorted(self.folder.glob("kept_*.npy")):
            try:
                kept = np.load(path)
            except (OSError, ValueError, EOFError):
                continue  # as if nothing were kept: computed again
            if kept.shape == self.kept.shape and kept.dtype == bool:
                self.kept |= kept

    def look(self, images: Tensor, index: Tensor) -> TeacherOutput:
        """Outputs for a batch: images (B, C, H, W) normalised for the student, index (B,) their numbers.

        Where any image is new, the teacher runs on the whole batch; what was kept before stays as it is.
        """
        rows = index.numpy()
        new = ~self.kept[rows]
        if new.any():
            fresh = self.run(images)
            values = {name: getattr(fresh, name).cpu().numpy() for name in self.shapes}
            finite = [np.isfinite(v.reshape(len(rows), -1)).all(1) for v in values.values()]
            if not np.logical_and.reduce(finite)[new].all():
                return fresh  # the step will be skipped; nothing of it is kept
            for name, array in self.arrays.items():
                array[rows[new]] = values[name][new]
            self.kept[rows[new]] = True
        return TeacherOutput(
            **{
                name: torch.from_numpy(array[rows]).to(images.device, non_blocking=True)
                for name, array in self.arrays.items()
            }
        )

    @torch.no_grad()
    def run(self, images: Tensor) -> TeacherOutput:
        """The teacher's forward pass, every token finished."""
        state = self.teacher.look(images)
        attention, mass = self.teacher.attention(state, self.heads)
        features = self.teacher.features(state, None, self.class_token)
        return TeacherOutput(attention.float(), mass.float(), features.float())

    def save(self) -> None:
        """Bring numbers to the disk, then the note of which images have them."""
        self.read_kept()  # of runs that share the folder
        for array in self.arrays.values():
            assert isinstance(array, np.memmap)
            array.flush()
        path = self.folder / f"kept_{self.rank}.npy"

        def write(aside: Path) -> None:
            with open(aside, "wb") as file:
                np.save(file, self.kept)

        write_atomically(path, write)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npy"


def make_array(path: Path, *, shape: tuple[int, ...]) -> None:
    """Write an fp32 .npy file of zeros with every block taken: a full disk is told here, as OSError.

    Written to through a map, a file with holes would end the process with a signal on a full disk.
    """
    np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
