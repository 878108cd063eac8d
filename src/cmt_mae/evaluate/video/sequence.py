"""One video from its frames to its scores, and what is kept of it on disk."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cmt_mae.core.errors import InputError
from cmt_mae.core.files import same_fingerprint, write_json
from cmt_mae.data.davis import VideoSequence, read_frame, read_mask, write_mask
from cmt_mae.evaluate.video.features import Extractor, resize_linear
from cmt_mae.evaluate.video.metrics import score_frame
from cmt_mae.evaluate.video.propagate import Propagation, decide, first_labels


@dataclass
class Followed:
    """What came out for one video."""

    name: str
    fingerprint: str
    frames: int
    size: list[int]
    """Height and width of the frames."""
    input: list[int]
    """Height and width that the network saw."""
    grid: list[int]
    """Rows and columns of patches."""
    objects: list[int]
    """Ids of the objects, those of the first mask."""
    vanished: list[int]
    """Objects that the first mask loses at grid size, so that they cannot be followed."""
    j: list[list[float]]
    """J, 0..1: one row per object, one number for each frame but the first and the last."""
    f: list[list[float]]
    """F, likewise."""
    seconds: dict[str, float]
    """Wall time: features, propagation (with the decision), all."""


@dataclass
class SequenceStore:
    """Where masks and scores of one backbone under one protocol are kept."""

    folder: Path
    masks: bool
    """Whether predicted masks are kept too."""

    def mask_folder(self, sequence: VideoSequence) -> Path:
        """Folder of a sequence's predicted masks: NAME/00000.png, ... as the official evaluation wants."""
        return self.folder / "masks" / sequence.name

    def mask_file(self, sequence: VideoSequence, number: int) -> Path:
        """Predicted mask of one frame."""
        return self.mask_folder(sequence) / f"{sequence.frames[number].stem}.png"

    def load(self, sequence: VideoSequence) -> Followed | None:
        """What is kept of the same sequence; None if there is nothing whole."""
        try:
            text = self._score_file(sequence).read_text(encoding="utf-8")
            kept = Followed(**json.loads(text))
        except (OSError, ValueError, TypeError):
            return None
        if not same_fingerprint(kept.fingerprint, sequence.fingerprint):
            return None
        numbers = range(len(sequence))
        if self.masks and not all(self.mask_file(sequence, n).is_file() for n in numbers):
            return None
        return kept

    def save(self, sequence: VideoSequence, outcome: Followed) -> None:
        """Keep the scores: written last, so that they stand for a whole sequence."""
        write_json(self._score_file(sequence), asdict(outcome))

    def _score_file(self, sequence: VideoSequence) -> Path:
        return self.folder / "scores" / f"{sequence.name}.json"


def follow(
    sequence: VideoSequence,
    extractor: Extractor,
    *,
    pool: Executor,
    batch_size: int = 4,
    store: SequenceStore | None = None,
) -> Iterator[Followed | None]:
    """Carry the first mask through the video; yields None after every frame and the outcome at the end.

    Frames are read and masks scored and written by the pool while the network works. Only the
    context's features are in memory, however long the video.

    Raises:
        InputError: a broken frame or mask, features that are not finite, a full disk.
    """
    began = time.perf_counter()
    protocol, grid = extractor.protocol, extractor.grid
    mask = read_mask(sequence.masks[0])
    classes = [0, *sequence.objects]
    labels = first_labels(mask, classes, grid, protocol.first_mask)
    vanished = [
        i for i, seen in zip(classes, labels.amax((1, 2)) > 0, strict=True) if i and not seen
    ]
    if protocol.objects == "seen":
        last = max(n for n in range(len(classes)) if classes[n] not in vanished)
        classes, labels = classes[: last + 1], labels[: last + 1]
    if store is not None and store.masks:
        make_folder(store.mask_folder(sequence))
        write_mask(store.mask_file(sequence, 0), mask)
    propagation: Propagation | None = None
    spent = {"features": 0.0, "propagation": 0.0}
    scored: list[Future[tuple[NDArray[np.float64], NDArray[np.float64]]]] = []
    number = 0
    for frames in read_batches(sequence, extractor, pool, batch_size):
        start = time.perf_counter()
        features = extractor(frames)
        spent["features"] += time.perf_counter() - start
        for one in features:
            start = time.perf_counter()
            if propagation is None:
                propagation = Propagation(one, labels.to(one.device), protocol)
            else:
                soft = propagation.step(one)
                ids = decide(soft, classes, extractor.size, sequence.size, protocol)
                scored.append(pool.submit(settle, sequence, number, ids, store))
            spent["propagation"] += time.perf_counter() - start
            number += 1
            yield None
    scores = [future.result() for future in scored][:-1]  # the last frame is only written
    spent["all"] = time.perf_counter() - began
    outcome = Followed(
        name=sequence.name,
        fingerprint=sequence.fingerprint,
        frames=len(sequence),
        size=list(sequence.size),
        input=list(extractor.size),
        grid=list(grid),
        objects=list(sequence.objects),
        vanished=vanished,
        j=np.stack([j for j, _ in scores], axis=1).tolist(),
        f=np.stack([f for _, f in scores], axis=1).tolist(),
        seconds={k: round(v, 3) for k, v in spent.items()},
    )
    if store is not None:
        store.save(sequence, outcome)
    yield outcome


def settle(
    sequence: VideoSequence, number: int, ids: NDArray[np.uint8], store: SequenceStore | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Write one predicted mask, and score it: J and F, each (objects,)."""
    if store is not None and store.masks:
        write_mask(store.mask_file(sequence, number), ids)
    return score_frame(ids, read_mask(sequence.masks[number]), sequence.objects)


def read_batches(
    sequence: VideoSequence, extractor: Extractor, pool: Executor, batch_size: int
) -> Iterator[NDArray[np.uint8]]:
    """Frames at the input size, uint8 (B, height, width, C), read one batch ahead by the pool."""
    channels = len(extractor.backbone.mean)

    def load(file: Path) -> NDArray[np.uint8]:
        return resize_linear(read_frame(file, channels), *extractor.size)

    files = sequence.frames
    chunks = [files[i : i + batch_size] for i in range(0, len(files), batch_size)]
    ahead = [pool.submit(load, file) for file in chunks[0]]
    for chunk in [*chunks[1:], ()]:
        ready, ahead = ahead, [pool.submit(load, file) for file in chunk]
        yield np.stack([future.result() for future in ready])


def make_folder(folder: Path) -> None:
    """Create a folder; InputError where that cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot make the folder {folder}: {error.strerror or error}; give another --out"
        ) from None
