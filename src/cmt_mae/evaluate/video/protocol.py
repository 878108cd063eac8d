"""The published ways of propagating labels with frozen features, quirk by quirk (spec 9.1, 9.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from cmt_mae.core.errors import InputError

SideRule = Literal["floor64", "patch"]
Positions = Literal["size", "scale_factor"]
Objects = Literal["all", "seen"]
FirstMask = Literal["nearest", "linear"]
Window = Literal["square", "disc"]
SoftmaxOver = Literal["kept", "neighbourhood"]
Upsample = Literal["patch", "frame"]


@dataclass(frozen=True)
class VideoProtocol:
    """Every setting of label propagation that moves J and F. The defaults are DINO's."""

    name: str = "dino"
    size: int | tuple[int, int] = 480
    """Shorter side of the frames that the network sees, or their height and width."""
    side_rule: SideRule = "floor64"
    """Longer side: floor64 = in proportion, down to a multiple of 64; patch = to one of the patch."""
    std_typo: bool = True
    """Divide by (.228, .224, .225), as DINO's script does, where the network has ImageNet's (.229, ...)."""
    layer: int | None = None
    """Block whose output is the feature, from 1; None = the last."""
    final_norm: bool = True
    """Features after the network's final norm."""
    positions: Positions = "size"
    """Table of positions resized to the grid's size, or by the factor (grid + .1) / old grid (DINO)."""
    first_mask: FirstMask = "nearest"
    """First mask to the grid: nearest (DINO), or one-hot maps by bilinear resizing (videowalk)."""
    objects: Objects = "all"
    """Classes: all = the objects of the first mask; seen = up to the highest id left at grid size (DINO)."""
    context: int = 7
    """Number of preceding frames that are looked at, besides the first frame."""
    padded: bool = False
    """Fill the places of frames before the first with the first frame (videowalk)."""
    soft_queue: bool = True
    """Preceding frames lend their soft labels; False: one-hot at grid size."""
    radius: int = 12
    """Neighbourhood in patches; 0 = the whole frame."""
    window: Window = "square"
    """square: rows and columns at most radius apart; disc: distance under radius (videowalk)."""
    limit_first: bool = True
    """The neighbourhood holds in the first frame too; False: the first frame is seen whole (videowalk)."""
    topk: int = 5
    """Neighbours kept for each patch, over all context frames together."""
    keep_ties: bool = True
    """Neighbours as near as the k-th are kept too (DINO)."""
    temperature: float = 0.1
    """A neighbour's weight is exp(cosine similarity / temperature)."""
    softmax_over: SoftmaxOver = "kept"
    """Weights sum to 1 over the kept neighbours, or over the whole neighbourhood before the k are kept."""
    upsample: Upsample = "patch"
    """patch: bilinear by the patch's side, decide there, nearest to the frame (DINO); frame: bilinear
    to the frame's size, decide there (videowalk)."""
    min_max: bool = True
    """Stretch each upsampled class map to 0..1 before the decision (DINO)."""


DINO = VideoProtocol()
VIDEOWALK = VideoProtocol(
    name="videowalk",
    side_rule="patch",
    std_typo=False,
    first_mask="linear",
    context=20,
    padded=True,
    window="disc",
    limit_first=False,
    topk=10,
    keep_ties=False,
    temperature=0.05,
    upsample="frame",
    min_max=False,
)
CROPMAE = replace(VIDEOWALK, name="cropmae", size=(480, 880), topk=7, radius=20, temperature=0.7)
PRESETS = {preset.name: preset for preset in (DINO, VIDEOWALK, CROPMAE)}
"""dino: eval_video_segmentation.py, with size=(h, w) for positions and the true number of objects.
videowalk: Jabri et al.'s test script, temperature of its README. cropmae: videowalk with the settings
of CropMAE and SiamMAE."""


def choose(name: str, **changes: Any) -> VideoProtocol:
    """A preset with the settings that are not None changed. A changed one is called ``NAME+changed``.

    Raises:
        InputError: unknown preset, or a value without meaning.
    """
    if name not in PRESETS:
        raise InputError(f"unknown protocol {name!r}; use {', '.join(PRESETS)}")
    preset = PRESETS[name]
    given = {k: v for k, v in changes.items() if v is not None and v != getattr(preset, k)}
    protocol = replace(preset, **given, name=f"{name}+changed") if given else preset
    sides = (protocol.size,) if isinstance(protocol.size, int) else protocol.size
    lowest = [("context", protocol.context, 0), ("radius", protocol.radius, 0)]
    lowest += [("topk", protocol.topk, 1), ("size", min(sides), 1)]
    lowest += [("layer", 1 if protocol.layer is None else protocol.layer, 1)]
    for setting, value, least in lowest:
        if value < least:
            raise InputError(f"DAVIS: {setting} is {value}; it must be {least} or more")
    if not protocol.temperature > 0:
        raise InputError(f"DAVIS: temperature is {protocol.temperature}; it must be above 0")
    return protocol


def input_size(
    frame: tuple[int, int], protocol: VideoProtocol, patch: tuple[int, int]
) -> tuple[int, int]:
    """Height and width that the network sees, both multiples of the patch.

    The shorter side is the protocol's size, the longer one in proportion, cut down to a multiple of
    64 (spec 9.1: 854 x 480 -> 832 x 480) or of the patch. A patch that does not divide 64 takes the
    patch itself for the 64; a size that the patch does not divide is cut down to one that it does.

    Args:
        frame: height and width of the video in pixels.
        patch: height and width of a patch.

    Raises:
        InputError: less than one patch remains.
    """
    if isinstance(protocol.size, int):
        ratio = max(frame) / min(frame)
        longer = math.floor(protocol.size * ratio + 1e-9)  # 480 * (854 / 480) must not be 853.99
        wide = frame[1] >= frame[0]
        height, width = (protocol.size, longer) if wide else (longer, protocol.size)
        steps = list(patch)
        along = 1 if wide else 0
        if protocol.side_rule == "floor64" and 64 % patch[along] == 0:
            steps[along] = 64
    else:
        (height, width), steps = protocol.size, list(patch)
    height, width = height // steps[0] * steps[0], width // steps[1] * steps[1]
    if not height or not width:
        raise InputError(
            f"DAVIS: frames of {frame[1]} x {frame[0]} at size {protocol.size} are smaller than a patch "
            f"of {patch[1]} x {patch[0]} or a step of 64; take a larger size, or the side rule patch"
        )
    return height, width
