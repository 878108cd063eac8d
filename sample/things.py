"""The things that stand in a scene: ten classes, and clutter that belongs to none."""

import colorsys
import math
from dataclasses import dataclass, field

import numpy as np
from shapes import Floats, Solid, hull
from textures import Texture

CLASSES = (
    "ball",
    "can",
    "cone",
    "crate",
    "die",
    "drum",
    "mushroom",
    "pebble",
    "ring",
    "tree",
)
"""Names of the ten classes, sorted, so that label i is the i-th folder of an ImageFolder.

A class is a shape with a structure of its surface; colours are drawn freely for every thing. Shapes
are shared on purpose (ball / pebble, crate / die, can / drum, cone / tree).
"""

CLUTTER = -1
"""Label of things that belong to no class."""


@dataclass
class Thing:
    """A rigid body: solids with a texture each; ``turn`` (3, 3) and ``place`` (3,) set it down.

    ``reach`` is its radius on the ground, known once it rests there.
    """

    label: int
    parts: list[tuple[Solid, Texture]]
    size: float
    turn: Floats
    place: Floats = field(default_factory=lambda: np.zeros(3, dtype=np.float32))
    reach: float = 0.0

    def frame(self, solid: Solid) -> tuple[Floats, Floats, Floats]:
        """(A, b, A^-1) with world = A @ unit + b for one of its solids."""
        scale = np.array(solid.scale, dtype=np.float32) * np.float32(self.size)
        offset = np.array(solid.offset, dtype=np.float32) * np.float32(self.size)
        return self.turn * scale, self.turn @ offset + self.place, self.turn.T / scale[:, None]

    def outlines(self) -> list[Floats]:
        """For each solid (3, P) world points whose convex hull holds it."""
        frames = [(solid, self.frame(solid)) for solid, _ in self.parts]
        return [f[0] @ hull(solid.kind, solid.taper) + f[1][:, None] for solid, f in frames]

    def outline(self) -> Floats:
        """(3, P) world points whose convex hull holds the thing."""
        return np.concatenate(self.outlines(), axis=1)

    def rest(self, x: float, z: float) -> None:
        """Set it on the ground at (x, z)."""
        self.place = np.zeros(3, dtype=np.float32)
        outline = self.outline()
        self.reach = float(np.sqrt((outline[[0, 2]] ** 2).sum(axis=0)).max())
        self.place = np.array([x, -outline[1].min(), z], dtype=np.float32)


def rotation(yaw: float, pitch: float = 0.0, roll: float = 0.0) -> Floats:
    """(3, 3) turn round y, then x, then z."""
    cy, sy, cp, sp = math.cos(yaw), math.sin(yaw), math.cos(pitch), math.sin(pitch)
    cr, sr = math.cos(roll), math.sin(roll)
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_x = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    about_z = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    return (about_y @ about_x @ about_z).astype(np.float32)


def colour(
    rng: np.random.Generator, low: float = 0.08, high: float = 0.9, vivid: float = 0.85
) -> Floats:
    """A linear RGB of any hue, from grey to saturation ``vivid``; low and high bound its value."""
    rgb = colorsys.hsv_to_rgb(rng.random(), vivid * rng.beta(1.2, 1.8), rng.uniform(low, high))
    return np.array(rgb, dtype=np.float32) ** np.float32(2.2)


def two_colours(rng: np.random.Generator, vivid: float = 0.85) -> Floats:
    """(2, 3): any two colours, one clearly darker, in either order."""
    pair = [colour(rng, 0.12, 0.42, vivid), colour(rng, 0.6, 0.95, vivid)]
    order = (0, 1) if rng.random() < 0.5 else (1, 0)
    return np.stack([pair[order[0]], pair[order[1]]])


def texture(
    rng: np.random.Generator,
    pattern: str,
    colours: Floats,
    frequency: tuple[float, float] = (4.0, 4.0),
    roughness: tuple[float, float] = (0.15, 0.6),
    noise: str = "rough",
    gloss: float = 0.0,
) -> Texture:
    """A texture with its free parts drawn from the ranges given."""
    return Texture(
        pattern=pattern,
        colours=colours,
        frequency=rng.uniform(*frequency),
        phase=rng.uniform(-3.1, 3.1),
        roughness=rng.uniform(*roughness),
        noise=noise,
        gloss=gloss * rng.uniform(0.3, 1.0),
        shift=(rng.random(), rng.random()),
    )


def make_thing(rng: np.random.Generator, label: int, size: float) -> Thing:
    """One thing of a class, about ``size`` high or wide, lying as such a thing lies, at (0, 0)."""
    parts, turn = _BUILDERS[CLASSES[label]](rng)
    thing = Thing(label, parts, size, turn)
    thing.rest(0.0, 0.0)
    return thing


Parts = list[tuple[Solid, Texture]]


def _yaw(rng: np.random.Generator) -> float:
    return float(rng.uniform(0, 2 * math.pi))


def _upright_or_lying(rng: np.random.Generator, lying: float) -> Floats:
    if rng.random() < lying:
        return rotation(_yaw(rng), math.pi / 2)
    return rotation(_yaw(rng), rng.uniform(-0.05, 0.05))


def _ball(rng: np.random.Generator) -> tuple[Parts, Floats]:
    skin = texture(rng, "panels", two_colours(rng), (2.5, 4.5), (0.05, 0.4), gloss=0.7)
    return [(Solid("sphere", (0.5, 0.5, 0.5)), skin)], rotation(*rng.uniform(0, 6.28, 3))


def _can(rng: np.random.Generator) -> tuple[Parts, Floats]:
    wide, metal = rng.uniform(0.26, 0.34), np.tile(rng.uniform(0.35, 0.75), (2, 3))
    skin = texture(rng, "bands", two_colours(rng), (6, 10), (0.05, 0.3), gloss=0.8)
    rim = texture(rng, "plain", metal.astype(np.float32), noise="fine", gloss=1.2)
    parts = [
        (Solid("frustum", (wide, 0.47, wide)), skin),
        (Solid("frustum", (wide * 0.94, 0.5, wide * 0.94)), rim),
    ]
    return parts, _upright_or_lying(rng, 0.25)


def _cone(rng: np.random.Generator) -> tuple[Parts, Floats]:
    colours = two_colours(rng)
    skin = texture(rng, "bands", colours, (4, 7), (0.1, 0.45))
    base = texture(rng, "plain", np.tile(colours[0], (2, 1)), noise="fine")
    wide, taper = rng.uniform(0.24, 0.3), rng.uniform(0.08, 0.2)
    parts = [
        (Solid("frustum", (wide, 0.48, wide), (0, 0.02, 0), taper), skin),
        (Solid("box", (wide * 1.3, 0.035, wide * 1.3), (0, -0.465, 0)), base),
    ]
    return parts, rotation(_yaw(rng))


def _crate(rng: np.random.Generator) -> tuple[Parts, Floats]:
    wood = texture(rng, "planks", two_colours(rng), (3, 6), (0.3, 0.7), noise="grain")
    scale = (rng.uniform(0.38, 0.5), rng.uniform(0.34, 0.46), rng.uniform(0.38, 0.5))
    return [(Solid("box", scale), wood)], rotation(_yaw(rng))


def _die(rng: np.random.Generator) -> tuple[Parts, Floats]:
    skin = texture(rng, "pips", two_colours(rng), roughness=(0.05, 0.35), gloss=0.7)
    sides = rng.integers(0, 4, 2) * (math.pi / 2)
    return [(Solid("box", (0.42, 0.42, 0.42)), skin)], rotation(_yaw(rng)) @ rotation(
        0.0, float(sides[0]), float(sides[1])
    )


def _drum(rng: np.random.Generator) -> tuple[Parts, Floats]:
    colours, high = two_colours(rng), rng.uniform(0.26, 0.36)
    skin = texture(rng, "zigzag", colours, (5, 8), (0.1, 0.4), gloss=0.4)
    rim = texture(rng, "plain", np.tile(colours[1], (2, 1)), gloss=0.5)
    parts = [(Solid("frustum", (0.46, high, 0.46)), skin)]
    for side in (-1, 1):
        parts.append((Solid("tube", (0.5, 0.035, 0.5), (0, side * high * 0.95, 0), 0.88), rim))
    return parts, _upright_or_lying(rng, 0.2)


def _mushroom(rng: np.random.Generator) -> tuple[Parts, Floats]:
    cap = texture(rng, "spots", two_colours(rng), (0.2, 0.27), (0.1, 0.4), gloss=0.5)
    pale = np.stack([colour(rng, 0.35, 0.9), colour(rng, 0.35, 0.9)])
    stem = texture(rng, "plain", pale, noise="grain")
    thick, wide, high = rng.uniform(0.1, 0.17), rng.uniform(0.4, 0.52), rng.uniform(0.32, 0.48)
    parts = [
        (Solid("dome", (wide, high, wide), (0, -0.02, 0)), cap),
        (Solid("frustum", (thick * 1.25, 0.25, thick * 1.25), (0, -0.25, 0), 0.75), stem),
    ]
    return parts, rotation(_yaw(rng), rng.uniform(-0.2, 0.2), rng.uniform(-0.2, 0.2))


def _pebble(rng: np.random.Generator) -> tuple[Parts, Floats]:
    stone = texture(rng, "veins", two_colours(rng), (3, 6), (0.3, 0.8), noise="clouds", gloss=0.4)
    scale = (0.5, rng.uniform(0.24, 0.36), rng.uniform(0.32, 0.46))
    return [(Solid("sphere", scale), stone)], rotation(_yaw(rng), *rng.uniform(-0.25, 0.25, 2))


def _ring(rng: np.random.Generator) -> tuple[Parts, Floats]:
    tyre = texture(rng, "ribs", two_colours(rng), (14, 22), (0.1, 0.5))
    flat = Solid("tube", (0.5, rng.uniform(0.13, 0.2), 0.5), taper=rng.uniform(0.5, 0.66))
    if rng.random() < 0.35:
        return [(flat, tyre)], rotation(_yaw(rng))
    yaw = rng.uniform(-0.9, 0.9) + (math.pi if rng.random() < 0.5 else 0)
    return [(flat, tyre)], rotation(float(yaw), math.pi / 2 + rng.uniform(-0.2, 0.2))


def _tree(rng: np.random.Generator) -> tuple[Parts, Floats]:
    leaves = texture(rng, "foliage", two_colours(rng), (6, 11), (0.5, 0.9), noise="rough")
    bark = texture(rng, "plain", two_colours(rng) * 0.5, noise="grain")
    wide = rng.uniform(0.28, 0.38)
    parts = [(Solid("frustum", (0.06, 0.15, 0.06), (0, -0.4, 0), 0.8), bark)]
    for tier, (bottom, high) in enumerate(((-0.36, 0.42), (-0.1, 0.36), (0.14, 0.34))):
        reach = wide * (1 - 0.24 * tier)
        centre = (0.0, bottom + high / 2, 0.0)
        parts.append((Solid("frustum", (reach, high / 2, reach), centre, 0.06), leaves))
    return parts, rotation(_yaw(rng))


_BUILDERS = {
    "ball": _ball,
    "can": _can,
    "cone": _cone,
    "crate": _crate,
    "die": _die,
    "drum": _drum,
    "mushroom": _mushroom,
    "pebble": _pebble,
    "ring": _ring,
    "tree": _tree,
}


def make_clutter(rng: np.random.Generator) -> Thing:
    """A pole, a board or a bush: patterned like things of the classes, but none of them."""
    kind = rng.integers(3)
    pattern = ("plain", "bands", "checks", "veins", "foliage")[rng.integers(5)]
    skin = texture(rng, pattern, two_colours(rng), (3, 9), (0.2, 0.8))
    if kind == 0:
        thick = rng.uniform(0.03, 0.08)
        parts = [(Solid("frustum", (thick, rng.uniform(0.6, 1.3), thick), taper=0.8), skin)]
        turn = rotation(_yaw(rng), *rng.uniform(-0.25, 0.25, 2))
    elif kind == 1:
        scale = (rng.uniform(0.3, 0.8), rng.uniform(0.2, 0.7), rng.uniform(0.02, 0.06))
        parts = [(Solid("box", scale), skin)]
        turn = rotation(rng.uniform(-0.9, 0.9), rng.uniform(-0.35, 0.35))
    else:
        leaves = texture(rng, "foliage", two_colours(rng) * 0.6, (3, 9), (0.7, 1.0))
        blobs = rng.uniform(-0.3, 0.3, (3, 3))
        parts = [
            (
                Solid(
                    "sphere",
                    (rng.uniform(0.2, 0.35), rng.uniform(0.15, 0.3), 0.25),
                    (float(x), float(y) * 0.5, float(z)),
                ),
                leaves,
            )
            for x, y, z in blobs
        ]
        turn = rotation(_yaw(rng))
    thing = Thing(CLUTTER, parts, rng.uniform(0.7, 1.2), turn)
    thing.rest(0.0, 0.0)
    return thing
