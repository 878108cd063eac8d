"""The published ways of propagating labels with frozen features, quirk by quirk (spec 9.1, 9.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from cmt_mae.core.errors import InputError
from cmt_mae.core.presets import OF_PRESET, filled
from cmt_mae.core.settings import Count, CountOrNone, Positive


@dataclass(kw_only=True)
class VideoProtocol:
    """Every setting of label propagation that moves J and F; those that are not given are the preset's."""

    size: Count | tuple[Count, Count] = OF_PRESET
    """Shorter side of the frames that the network sees, or height and width (dino: 480)."""
    side_rule: Literal["floor64", "patch"] = OF_PRESET
    """Longer side: floor64 (dino) cuts it to a multiple of 64, patch to one of the patch."""
    std_typo: bool = OF_PRESET
    """Divide by .228 in place of .229 where the backbone has ImageNet's statistics, as DINO's script does
    (dino: true)."""
    layer: Count | None = None
    """Block whose output is the feature, from 1. Default: the last."""
    final_norm: bool = OF_PRESET
    """Features after the final norm (default: true)."""
    positions: Literal["size", "scale_factor"] = OF_PRESET
    """Table of positions resized to a `size`, or by DINO's `scale_factor` of (grid + .1) / old grid."""
    first_mask: Literal["nearest", "linear"] = OF_PRESET
    """First mask to the grid: nearest (dino), or one-hot maps by bilinear resizing (linear; videowalk)."""
    objects: Literal["all", "seen"] = OF_PRESET
    """all objects of the first mask (default), or seen: up to the highest id left at grid size (DINO's script)."""
    context: CountOrNone = OF_PRESET
    """Preceding frames looked at besides the first (dino: 7)."""
    padded: bool = OF_PRESET
    """Fill places of frames before the first with the first (videowalk: true)."""
    soft_queue: bool = OF_PRESET
    """Preceding frames lend soft labels (default: true); false: one-hot ones at grid size."""
    radius: CountOrNone = OF_PRESET
    """Neighbourhood in patches (dino: 12); 0 is the whole frame."""
    window: Literal["square", "disc"] = OF_PRESET
    """square (dino): rows and columns at most radius apart; disc (videowalk): distance under radius."""
    limit_first: bool = OF_PRESET
    """The neighbourhood holds in the first frame too (dino: true); false (videowalk): that one is seen whole."""
    topk: Count = OF_PRESET
    """Neighbours kept for each patch, over all context frames together (dino: 5)."""
    keep_ties: bool = OF_PRESET
    """Neighbours as near as the last kept one are kept too (dino: true)."""
    temperature: Positive = OF_PRESET
    """A neighbour's weight is exp(cosine similarity / temperature) (dino: 0.1)."""
    softmax_over: Literal["kept", "neighbourhood"] = OF_PRESET
    """Weights sum to 1 over the `kept` neighbours (default), or over the `neighbourhood` before they are kept."""
    upsample: Literal["patch", "frame"] = OF_PRESET
    """patch (dino): bilinear by the patch's side, decide there, nearest to the frame; frame (videowalk):
    bilinear to the frame's size, decide there."""
    min_max: bool = OF_PRESET
    """Stretch each class map to 0..1 before the decision (dino: true)."""


PresetName = Literal["dino", "videowalk", "cropmae"]
_DINO: dict[str, Any] = {
    "size": 480, "side_rule": "floor64", "std_typo": True, "final_norm": True, "positions": "size",
    "first_mask": "nearest", "objects": "all", "context": 7, "padded": False, "soft_queue": True, "radius": 12,
    "window": "square", "limit_first": True, "topk": 5, "keep_ties": True, "temperature": 0.1,
    "softmax_over": "kept", "upsample": "patch", "min_max": True,
}  # fmt: skip
_VIDEOWALK = _DINO | {
    "side_rule": "patch", "std_typo": False, "first_mask": "linear", "context": 20, "padded": True,
    "window": "disc", "limit_first": False, "topk": 10, "keep_ties": False, "temperature": 0.05,
    "upsample": "frame", "min_max": False,
}  # fmt: skip
_CROPMAE = _VIDEOWALK | {"size": (480, 880), "topk": 7, "radius": 20, "temperature": 0.7}
PRESETS = {"dino": _DINO, "videowalk": _VIDEOWALK, "cropmae": _CROPMAE}
"""dino: eval_video_segmentation.py, with size=(h, w) for positions and the true number of objects.
videowalk: Jabri et al.'s test script, temperature of its README. cropmae: videowalk with the settings
of CropMAE and SiamMAE."""


def resolve(preset: PresetName, given: VideoProtocol) -> tuple[str, VideoProtocol]:
    """The preset with the given settings in their places, and its name: a changed one is ``NAME+changed``."""
    protocol = filled(VideoProtocol, PRESETS[preset], given)
    same = protocol == VideoProtocol(**PRESETS[preset])
    return preset if same else f"{preset}+changed", protocol


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
