"""A whole scene before it is rendered: things in their places, room or field, sun, camera."""

import math
from dataclasses import dataclass, field

import numpy as np
from shapes import Floats
from textures import Texture
from things import (
    Thing,
    make_clutter,
    make_thing,
    texture,
    two_colours,
)


@dataclass
class Camera:
    """A pinhole: ``axes`` rows are right, up and forward; ``focal`` in units of image height."""

    place: Floats
    axes: Floats
    focal: float


@dataclass
class World:
    """Everything that :func:`render.render` needs."""

    things: list[Thing]
    camera: Camera
    ground: Texture
    wall: Texture | None
    wall_distance: float
    wall_yaw: float
    sky: Floats  # (2, 3): horizon, zenith
    sun: Floats  # (3,) towards it
    light: Floats  # (3, 3): columns are the colours of sun, open sky and glow of the ground
    shadow_blur: float
    exposure: float
    defocus: float  # of the background; this and blur: sigma in 1/100 of the picture's height
    blur: tuple[float, float]  # of the whole picture along x and y
    grain: float  # standard deviation in the dark, 0..1
    seed: int
    crowd: list[int] = field(default_factory=list)  # things that make up one crowd


def look_at(place: Floats, target: Floats, roll: float = 0.0) -> Floats:
    """Camera axes (right, up, forward) from ``place`` towards ``target``."""
    forward = target - place
    forward = forward / np.linalg.norm(forward)
    right = np.cross(np.array([0.0, 1.0, 0.0]), forward)
    right = right / np.linalg.norm(right)
    up = np.cross(forward, right)
    c, s = math.cos(roll), math.sin(roll)
    return np.stack([c * right + s * up, c * up - s * right, forward]).astype(np.float32)


def make_world(
    rng: np.random.Generator,
    label: int,
    *,
    aspect: float = 1.0,
    objects: bool = True,
    crowd: bool = False,
) -> World:
    """A scene whose main thing has class ``label`` and fills about half of the picture's height.

    Args:
        rng: every choice is drawn from it.
        label: class of the main thing, 0..9; unused without objects.
        aspect: width over height of the picture, to spread the things over it.
        objects: False leaves only clutter.
        crowd: adds a heap of 6-10 small things of one class.
    """
    things: list[Thing] = []
    if objects:
        things.append(make_thing(rng, label, 1.0))
        for _ in range(rng.integers(1, 5)):
            _stand(
                rng, things, make_thing(rng, int(rng.integers(10)), rng.uniform(0.45, 1.0)), aspect
            )
    members = _heap(rng, things, aspect) if crowd else []
    for _ in range(rng.integers(1, 4)):
        _stand(rng, things, make_clutter(rng), aspect)
    world = _surroundings(rng, things, _camera(rng, things[0] if objects else None))
    world.crowd = members
    return world


def _stand(rng: np.random.Generator, things: list[Thing], thing: Thing, aspect: float) -> bool:
    """Put a thing on free ground, mostly behind the first one; False if no place was found.

    Before the first one only small things stand, and to its side, so that they may cover its edge
    but not its middle.
    """
    own = thing.reach
    for _ in range(8):
        x, z = rng.uniform(-1.6, 1.6) * max(1.0, aspect), rng.uniform(-0.9, 3.2)
        if z < 0.25 and (abs(x) < 0.42 + own or thing.size > 0.75):
            continue
        near = (math.hypot(x - t.place[0], z - t.place[2]) < 0.8 * (own + t.reach) for t in things)
        if not any(near):
            thing.place[[0, 2]] = x, z
            things.append(thing)
            return True
    return False


def _heap(rng: np.random.Generator, things: list[Thing], aspect: float) -> list[int]:
    """Small things of one class close together, beside and behind the first; their indices."""
    label, members = int(rng.integers(10)), []
    x, z = (
        rng.choice([-1, 1]) * rng.uniform(0.75, 0.95) * max(1.0, aspect * 0.8),
        rng.uniform(0, 0.6),
    )
    for _ in range(rng.integers(6, 11)):
        thing = make_thing(rng, label, rng.uniform(0.2, 0.28))
        thing.place[[0, 2]] = x + rng.uniform(-0.4, 0.4), z + rng.uniform(-0.35, 0.35)
        members.append(len(things))
        things.append(thing)
    return members


def _camera(rng: np.random.Generator, main: Thing | None) -> Camera:
    """Look at the main thing from a side and height a person might choose."""
    pitch, fov = math.radians(rng.uniform(6, 36)), math.radians(rng.uniform(32, 56))
    focal = 0.5 / math.tan(fov / 2)
    distance = focal / rng.uniform(0.4, 0.78)  # a thing of size 1 takes this share of the height
    middle = float(main.outline()[1].mean()) if main is not None else 0.4
    target = np.array([rng.uniform(-0.28, 0.28), middle + rng.uniform(-0.12, 0.16), 0.0])
    yaw = rng.uniform(-0.5, 0.5)
    away = np.array(
        [math.sin(yaw) * math.cos(pitch), math.sin(pitch), -math.cos(yaw) * math.cos(pitch)]
    )
    place = (target + distance * away).astype(np.float32)
    return Camera(place, look_at(place, target.astype(np.float32), rng.normal(0, 0.03)), focal)


_GROUNDS = (
    ("plain", "rough"),
    ("plain", "cells"),
    ("plain", "fine"),
    ("tiles", "rough"),
    ("lines", "grain"),
)
_WALLS = (
    ("plain", "clouds"),
    ("plain", "rough"),
    ("bricks", "rough"),
    ("lines", "grain"),
    ("tiles", "clouds"),
)


def _surroundings(rng: np.random.Generator, things: list[Thing], camera: Camera) -> World:
    """Ground, wall or sky, light and the camera's faults around things already placed."""

    def surface(choice: tuple[str, str]) -> Texture:
        pair = two_colours(rng, 0.32)
        pair[1] = pair[0] + (pair[1] - pair[0]) * np.float32(rng.uniform(0.2, 0.7))
        return texture(rng, choice[0], pair, (1.2, 3.5), (0.4, 1.0), noise=choice[1])

    turn, height = rng.uniform(-2.2, 2.2), math.radians(rng.uniform(28, 70))
    sun = [math.sin(turn) * math.cos(height), math.sin(height), -math.cos(turn) * math.cos(height)]
    warmth, strength = rng.uniform(-0.12, 0.25), rng.uniform(0.8, 2.8)
    sunlight = np.array([1 + warmth, 1.0, 1 - warmth]) * strength
    zenith = np.array([0.35, 0.5, 0.75]) * rng.uniform(0.3, 1.0) + rng.uniform(0.0, 0.25)
    horizon = zenith * 0.5 + rng.uniform(0.3, 0.6)
    ground = surface(_GROUNDS[rng.integers(len(_GROUNDS))])
    light = [sunlight, (horizon + zenith) * 0.375, ground.colours[0] * 0.35 * sunlight]
    return World(
        things=things,
        camera=camera,
        ground=ground,
        wall=surface(_WALLS[rng.integers(len(_WALLS))]) if rng.random() < 0.6 else None,
        wall_distance=rng.uniform(2.6, 5.0),
        wall_yaw=rng.uniform(-0.5, 0.5),
        sky=np.stack([horizon, zenith]).astype(np.float32),
        sun=np.array(sun, dtype=np.float32),
        light=np.stack(light, axis=1).astype(np.float32),
        shadow_blur=rng.uniform(0.4, 2.0),
        exposure=rng.uniform(0.75, 1.4),
        defocus=rng.uniform(0.6, 1.6) if rng.random() < 0.35 else 0.0,
        blur=(0.25 + rng.gamma(2.0, 0.14), 0.25 + rng.gamma(2.0, 0.14)),
        grain=rng.uniform(0.002, 0.018),
        seed=int(rng.integers(2**31)),
    )
