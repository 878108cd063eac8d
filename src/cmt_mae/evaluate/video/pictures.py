"""A strip of frames as in the paper's Figure 3: frames, ground truth, predictions in rows."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

from cmt_mae.core.text import printable
from cmt_mae.data.davis import VideoSequence, palette_bytes, read_frame, read_mask
from cmt_mae.evaluate.drawing import save_picture
from cmt_mae.evaluate.video.metrics import outlines
from cmt_mae.evaluate.video.sequence import Followed, SequenceStore

Row = tuple[str, list[NDArray[np.uint8] | None]]
"""Its name, and a mask uint8 (H, W) for each frame; None shows the frame alone."""
COVER = 0.55
"""How much of an object's colour lies over the frame."""
BRIGHT = 1.8
"""The palette's first colours are dark; over a frame they are shown so many times brighter."""
WIDTH = 1.9
"""Of a picture, in inches."""


def draw_strips(
    sequences: list[VideoSequence],
    rows: list[tuple[str, SequenceStore]],
    outcomes: list[list[Followed]],
    columns: int,
) -> list[Path]:
    """Write FOLDER/strips/SEQ.png for each sequence, in the folder of the first backbone.

    Args:
        rows: name of each backbone and where its masks are kept.
        outcomes: of each backbone, of (at least) the same sequences.
        columns: number of frames shown, evenly from the first to the last.
    """
    written = []
    for sequence in sequences:
        numbers = np.unique(np.linspace(0, len(sequence) - 1, columns).round().astype(int))
        strip: list[Row] = [("frames", [None] * len(numbers))]
        strip.append(("ground truth", [read_mask(sequence.masks[n]) for n in numbers]))
        for (name, store), found in zip(rows, outcomes, strict=True):
            outcome = next(o for o in found if o.name == sequence.name)
            score = 50 * (np.mean(outcome.j) + np.mean(outcome.f))
            title = f"{short(name)}\nJ&F {score:.1f}"
            strip.append((title, [read_mask(store.mask_file(sequence, n)) for n in numbers]))
        path = rows[0][1].folder / "strips" / f"{sequence.name}.png"
        frames = [read_frame(sequence.frames[n]) for n in numbers]
        save_picture(strip_figure(frames, strip, numbers.tolist()), path)
        written.append(path)
    return written


def short(name: str) -> str:
    """A backbone's name that fits beside a row: no folder or suffix, lines of 18, three at most."""
    lines = [""]
    for part in re.split(r"(?<=[_.-])", printable(Path(name).name).removesuffix(".safetensors")):
        if lines[-1] and len(lines[-1]) + len(part) > 18:
            lines.append("")
        lines[-1] += part
    return "\n".join(line[:24] for line in lines[:3])


def strip_figure(frames: list[NDArray[np.uint8]], rows: list[Row], numbers: list[int]) -> Figure:
    """A row for each (name, masks) over the same frames uint8 (H, W, 3)."""
    height, width = frames[0].shape[:2]
    size = (WIDTH * len(frames) + 1.1, WIDTH * height / width * len(rows) + 0.3)
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    figure = Figure(figsize=size, layout=layout)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), len(frames), squeeze=False)
    for (name, masks), line in zip(rows, axes, strict=True):
        for frame, mask, axis in zip(frames, masks, line, strict=True):
            axis.imshow(frame if mask is None else painted(frame, mask), interpolation="lanczos")
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(
            name, fontsize=8, rotation=0, ha="right", va="center", labelpad=6, parse_math=False
        )
    for number, axis in zip(numbers, axes[0], strict=True):
        axis.set_title(f"frame {number}", fontsize=8)
    return figure


def painted(frame: NDArray[np.uint8], mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The frame with each object in its palette colour and a white outline."""
    colours = (BRIGHT * np.frombuffer(palette_bytes(), dtype=np.uint8)).clip(0, 255).reshape(-1, 3)
    cover = COVER * (mask > 0)[:, :, None]
    picture = frame * (1 - cover) + colours[mask] * cover
    edge = np.zeros(mask.shape, dtype=bool)
    for i in np.unique(mask[mask > 0]):
        edge |= outlines((mask == i)[None])[0]
    thick = edge.copy()
    thick[1:] |= edge[:-1]
    thick[:, 1:] |= edge[:, :-1]
    picture[thick] = 255
    return picture.round().astype(np.uint8)
