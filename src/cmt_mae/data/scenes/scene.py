"""One scene with its ground truth."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cmt_mae.core.errors import InputError
from cmt_mae.data.scenes.render import GROUND, SKY, WALL, render
from cmt_mae.data.scenes.things import CLASSES, CLUTTER
from cmt_mae.data.scenes.world import World, make_world

SEMANTIC_CLASSES = (*CLASSES, "ground", "wall", "sky")
"""Names of the semantic labels 1..13; 0 is unlabelled (clutter)."""

Mask = NDArray[np.bool_]
Box = tuple[int, int, int, int]


@dataclass
class Scene:
    """A picture and all that is true of it.

    image: uint8 (H, W, 3). label: class of the main thing, -1 without things.
    instance_masks: bool (H, W) each, the visible pixels of a thing; no pixel is in two of them.
    boxes: (x, y, width, height) in pixels, tight round each mask. classes: 0..9 for each mask.
    crowd: True for a mask that is a heap of things of one class. semantic: uint8 (H, W), 0 for
    unlabelled, else 1 + index into :data:`SEMANTIC_CLASSES`.
    """

    image: NDArray[np.uint8]
    label: int
    instance_masks: list[Mask]
    boxes: list[Box]
    classes: list[int]
    crowd: list[bool]
    semantic: NDArray[np.uint8]


def render_scene(
    seed: int | Sequence[int],
    size: int = 96,
    label: int | None = None,
    *,
    width: int | None = None,
    objects: bool = True,
    crowd: bool = False,
) -> Scene:
    """A random scene; the same arguments give the same bytes on the same installation.

    Args:
        seed: one or several non-negative integers.
        size: height in pixels, and width where none is given; at least 16.
        label: class of the main thing, 0..9; None draws it.
        width: in pixels, at least 16.
        objects: False shows only clutter: no mask, no box, label -1.
        crowd: adds a heap of small things of one class, which share one mask.

    Raises:
        InputError: a label outside 0..9, a negative seed, a size under 16.
    """
    entropy = [seed] if isinstance(seed, int) else list(seed)
    width = size if width is None else width
    if min(entropy, default=-1) < 0:
        raise InputError(f"scenes need a seed of 0 or more, got {seed}")
    if min(size, width) < 16:
        raise InputError(f"scenes need at least 16 x 16 px, got {size} x {width}")
    if label is not None and not 0 <= label < len(CLASSES):
        raise InputError(f"scenes have classes 0 to {len(CLASSES) - 1}, got label {label}")
    # Now and then the main thing or the heap is hidden or out of sight: then the next try.
    for attempt in range(20):
        rng = np.random.default_rng([*entropy, attempt])
        main = int(rng.integers(len(CLASSES))) if label is None else label
        world = make_world(rng, main, aspect=width / size, objects=objects, crowd=crowd)
        picture = render(world, size, width)
        heap = np.isin(picture.ids, world.crowd) if crowd else picture.ids < SKY
        shown = not objects or (picture.ids == 0).mean() >= 0.015
        if shown and (not crowd or heap.mean() >= 0.004):
            break
    return _describe(world, picture.image, picture.ids, heap, main if objects else -1)


def _describe(
    world: World, image: NDArray[np.uint8], ids: NDArray[np.int16], heap: Mask, label: int
) -> Scene:
    """Masks, boxes and labels from the index of the thing seen at each pixel."""
    table = np.zeros(len(world.things) + 4, dtype=np.uint8)  # negative ids count from the end
    for index, thing in enumerate(world.things):
        table[index] = thing.label + 1
    for offset, kind in enumerate((GROUND, WALL, SKY)):
        table[kind] = len(CLASSES) + 1 + offset
    scene = Scene(image, label, [], [], [], [], table[ids])
    smallest = max(8, ids.size // 1200)  # a sliver of fewer pixels is not annotated
    masks = [
        (ids == index, thing.label, False)
        for index, thing in enumerate(world.things)
        if thing.label != CLUTTER and index not in world.crowd
    ]
    if world.crowd:
        masks.append((heap, world.things[world.crowd[0]].label, True))
    for mask, kind, crowded in masks:
        if mask.sum() < smallest:
            continue
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        left, top = int(columns[0]), int(rows[0])
        scene.instance_masks.append(mask)
        scene.boxes.append((left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top))
        scene.classes.append(kind)
        scene.crowd.append(crowded)
    return scene
