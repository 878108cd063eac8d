"""One scene with its ground truth."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from render import GROUND, SKY, WALL, render
from things import CLASSES, CLUTTER
from world import World, make_world

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
    seed: Sequence[int],
    height: int,
    width: int,
    label: int,
    *,
    objects: bool = True,
    crowd: bool = False,
) -> Scene:
    """A random scene whose main thing has class ``label`` (0..9); the same arguments give the same bytes.

    objects: False shows only clutter: no mask, no box, label -1. crowd: adds a heap of small things of one
    class, which share one mask.
    """
    # Now and then the main thing or the heap is hidden or out of sight: then the next try.
    for attempt in range(20):
        rng = np.random.default_rng([*seed, attempt])
        world = make_world(rng, label, aspect=width / height, objects=objects, crowd=crowd)
        picture = render(world, height, width)
        heap = np.isin(picture.ids, world.crowd) if crowd else picture.ids < SKY
        shown = not objects or (picture.ids == 0).mean() >= 0.015
        if shown and (not crowd or heap.mean() >= 0.004):
            break
    return _describe(world, picture.image, picture.ids, heap, label if objects else -1)


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
