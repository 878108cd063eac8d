"""Short videos of things that pass before each other."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from render import render, seen_things
from shapes import Floats
from things import CLASSES, make_thing, rotation
from world import Camera, World, look_at, make_world

_TRIES = 60


@dataclass
class Video:
    """images: uint8 (H, W, 3) each; masks: uint8 (H, W) each, 0 or the number 1..objects of the
    annotated object seen there; classes: 0..9 of each object."""

    images: list[NDArray[np.uint8]]
    masks: list[NDArray[np.uint8]]
    classes: list[int]


@dataclass
class _Path:
    """Way of one thing over the video: ground positions, turning, hops."""

    start: Floats
    end: Floats
    spin: float
    hops: float


@dataclass
class _Plan:
    """A world, whose first things move, and the camera's walk sideways."""

    world: World
    paths: list[_Path]
    walk: float


def render_video(seed: Sequence[int], n_frames: int, height: int) -> Video:
    """A video (16:9) of 2-3 moving objects, two of which cross each other's way; same seed, same bytes.

    Every object is seen in the first frame. Of seeded trials the first is taken in which, in some
    frame between first and last, an object shows less than 0.4 of its first area.
    """
    width = round(height * 16 / 9)
    plan = _find_plan(seed, n_frames, width / height)
    movers = len(plan.paths)
    table = np.zeros(len(plan.world.things) + 4, dtype=np.uint8)
    table[:movers] = np.arange(1, movers + 1)
    video = Video([], [], [thing.label for thing in plan.world.things[:movers]])
    for frame in range(n_frames):
        picture = render(_at(plan, _time(frame, n_frames), frame), height, width)
        video.images.append(picture.image)
        video.masks.append(table[picture.ids])
    return video


def _time(frame: int, n_frames: int) -> float:
    return frame / max(1, n_frames - 1)


def _find_plan(seed: Sequence[int], n_frames: int, aspect: float) -> _Plan:
    """The first plan, of those drawn one after another, in which what is promised can be seen."""
    best, best_score = None, -1.0
    height, width = 36, round(36 * aspect)
    for attempt in range(_TRIES):
        plan = _plan(np.random.default_rng([*seed, attempt]), aspect)
        movers = len(plan.paths)
        areas = np.zeros((n_frames, movers))
        for frame in range(n_frames):
            ids = seen_things(_at(plan, _time(frame, n_frames), frame), height, width)
            areas[frame] = np.bincount(ids.ravel() + 1, minlength=movers + 1)[1 : movers + 1]
            if frame == 0 and areas[0].min() < 0.008 * ids.size:
                break
        else:
            lost = float((1 - areas[1:-1].min(axis=0) / areas[0]).max())
            if lost >= 0.6:
                return plan
            if lost > best_score:
                best, best_score = plan, lost
    if best is None:
        raise RuntimeError(
            f"no plan of {_TRIES} shows every object in the first frame: seed {seed}"
        )
    return best


def _plan(rng: np.random.Generator, aspect: float) -> _Plan:
    """Two things cross before the camera at different distances; a third may stroll behind."""
    world = make_world(rng, int(rng.integers(len(CLASSES))), aspect=aspect)
    still = [t for t in world.things[1:] if t.place[2] > 1.4]
    side, reach = float(rng.choice([-1.0, 1.0])), 0.55 * aspect
    lanes = [rng.uniform(-0.35, -0.1), rng.uniform(0.75, 1.1), rng.uniform(1.5, 1.9)]
    movers, paths = [world.things[0]], []
    for _ in range(rng.integers(1, 3)):
        movers.append(make_thing(rng, int(rng.integers(len(CLASSES))), rng.uniform(0.7, 1.0)))
    for number, lane in enumerate(lanes[: len(movers)]):
        way = side * (-1) ** number
        x = (-way * reach * rng.uniform(0.7, 1.0), way * reach * rng.uniform(0.5, 1.0))
        ends = np.array([[x[0], lane], [x[1], lane + rng.uniform(-0.15, 0.15)]], dtype=np.float32)
        hops = rng.uniform(0.05, 0.25) if rng.random() < 0.3 else 0.0
        paths.append(_Path(ends[0], ends[1], rng.uniform(-1.5, 1.5), hops))
    world.things = [*movers, *still]
    place, focal = world.camera.place * np.float32(1.25), world.camera.focal
    target = np.array([0, 0.4, 0.3], dtype=np.float32)
    world.camera = Camera(place, look_at(place, target), focal)
    return _Plan(world, paths, rng.uniform(-0.4, 0.4))


def _at(plan: _Plan, time: float, frame: int) -> World:
    """The world at a time 0..1; every frame has its own grain."""
    things = list(plan.world.things)
    for index, path in enumerate(plan.paths):
        x, z = path.start + (path.end - path.start) * np.float32(time)
        y = float(things[index].place[1]) + path.hops * abs(math.sin(3 * math.pi * time))
        turn = rotation(path.spin * time) @ things[index].turn
        place = np.array([x, y, z], dtype=np.float32)
        things[index] = replace(things[index], place=place, turn=turn)
    eye = plan.world.camera
    place = eye.place + eye.axes[0] * np.float32(plan.walk * (time - 0.5))
    target = np.array([0, 0.4, 0.3], dtype=np.float32)
    camera = Camera(place, look_at(place, target), eye.focal)
    return replace(plan.world, things=things, camera=camera, seed=plan.world.seed + frame)
