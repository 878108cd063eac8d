"""Surface patterns in the solids' own coordinates, so that they turn and move with the object."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from shapes import Floats

_SIDE = 256
# Rows of the noise bank: how rough, and how far stretched along u (1 = the same both ways).
_NOISES = {"clouds": (1.6, 1), "rough": (1.05, 1), "fine": (0.5, 1), "grain": (1.1, 12)}


@dataclass(frozen=True)
class Texture:
    """How a surface looks.

    pattern: name of a function of this file; colours: two linear RGB, (2, 3); frequency and phase
    of the pattern; roughness: strength of the noise on top; noise: its name; gloss: of the
    highlight; shift: where in the noise this surface lies.
    """

    pattern: str
    colours: Floats
    frequency: float = 4.0
    phase: float = 0.0
    roughness: float = 0.4
    noise: str = "rough"
    gloss: float = 0.0
    shift: tuple[float, float] = (0.0, 0.0)


@lru_cache(maxsize=1)
def _bank() -> dict[str, NDArray[np.float32]]:
    """Tileable pictures of filtered noise, 256 x 256 in 0..1, the same for every scene."""
    rng = np.random.default_rng(20250712)
    fy, fx = np.meshgrid(np.fft.fftfreq(_SIDE), np.fft.rfftfreq(_SIDE), indexing="ij")
    bank = {}
    for name, (slope, stretch) in _NOISES.items():
        frequency = np.hypot(fy * (1 / stretch**0.5), fx * stretch**0.5)
        frequency[0, 0] = 1
        spectrum = np.fft.rfft2(rng.standard_normal((_SIDE, _SIDE))) / frequency**slope
        spectrum[0, 0] = 0
        field = np.fft.irfft2(spectrum, s=(_SIDE, _SIDE))
        bank[name] = np.clip(0.5 + field / (5 * field.std()), 0, 1).astype(np.float32).ravel()
    cells = rng.uniform(0, _SIDE, (2, 220))
    grid = np.arange(_SIDE) + 0.5
    gaps = [np.abs(grid[:, None] - c[None, :]) for c in cells]
    gaps = [np.minimum(g, _SIDE - g) ** 2 for g in gaps]
    distance = np.sqrt((gaps[0][:, None, :] + gaps[1][None, :, :]).min(axis=-1))
    bank["cells"] = np.clip(1 - distance / distance.max() * 1.4, 0, 1).astype(np.float32).ravel()
    return bank


def noise(name: str, u: Floats, v: Floats) -> Floats:
    """Value of a noise picture at (u, v), one period a unit, nearest pixel."""
    row = (v * _SIDE).astype(np.int32) & (_SIDE - 1)
    column = (u * _SIDE).astype(np.int32) & (_SIDE - 1)
    return np.take(_bank()[name], row * _SIDE + column, mode="clip")


def soft(value: Floats, sharpness: float = 8.0) -> Floats:
    """A step at 0 with a ramp instead of a jump: 0..1."""
    return np.clip(value * np.float32(sharpness) + np.float32(0.5), 0, 1)


def albedo(texture: Texture, points: Floats, normal: Floats) -> Floats:
    """(3, M) linear RGB of points (3, M) on a unit solid with these unit-frame normals."""
    # Two skew directions turn a flat noise picture into one for surfaces that face any way.
    u = points[0] * 0.31 + points[1] * 0.13 + points[2] * 0.19 + texture.shift[0] + 8
    v = points[1] * 0.37 - points[2] * 0.23 + points[0] * 0.11 + texture.shift[1] + 8
    grit = noise(texture.noise, u, v)
    mix = PATTERNS[texture.pattern](texture, points, normal, grit)
    first, second = texture.colours
    colour = first[:, None] + (second - first)[:, None] * mix
    return colour * (1 + np.float32(2 * texture.roughness) * (grit - np.float32(0.5)))


def _turn(points: Floats) -> Floats:
    """Angle round the y axis."""
    return np.arctan2(points[2], points[0])


def _face(points: Floats, normal: Floats) -> tuple[Floats, Floats, NDArray[np.intp]]:
    """Coordinates -1..1 on the face of a box, and the face's number 0..5."""
    axis = np.abs(normal).argmax(axis=0)
    u = np.where(axis == 0, points[2], points[0])
    v = np.where(axis == 1, points[2], points[1])
    positive = np.take_along_axis(normal, axis[None], axis=0)[0] > 0
    return u, v, axis * 2 + positive


def plain(texture: Texture, points: Floats, normal: Floats, grit: Floats) -> Floats:
    """One colour with a little of the other where the noise is high."""
    del texture, points, normal
    return grit * np.float32(0.5)


def panels(texture: Texture, points: Floats, normal: Floats, grit: Floats) -> Floats:
    """Sectors from pole to pole, and a small disc at each pole: a beach ball."""
    del normal, grit
    sectors = np.sin(_turn(points) * round(texture.frequency) + texture.phase)
    return np.where(np.abs(points[1]) > 0.93, np.float32(1), soft(sectors, 4))


def bands(texture: Texture, points: Floats, normal: Floats, grit: Floats) -> Floats:
    """Level bands along the axis."""
    del normal, grit
    return soft(np.sin(points[1] * texture.frequency + texture.phase), 4)


def zigzag(texture: Texture, points: Floats, normal: Floats, grit: Floats) -> Floats:
    """A zigzag round the side; flat ends stay plain."""
    del grit
    wave = np.abs((_turn(points) * (texture.frequency / np.pi) + texture.phase) % 2 - 1)
    mix = soft(0.28 - np.abs(points[1] - (wave - 0.5) * 1.5), 7)
    return np.where(np.abs(normal[1]) > 0.9, np.float32(0), mix)


def planks(texture: Texture, points: Floats, normal: Floats, grit: Floats) -> Floats:
    """Boards with dark gaps in a frame with one brace, on each face of a box."""
    del grit
    u, v, _ = _face(points, normal)
    edge = np.maximum(np.abs(u), np.abs(v))
    brace = np.abs(u - v) if texture.phase > 0 else np.abs(u + v)
    gap = np.abs((v * texture.frequency * 0.5 + 8) % 1 - 0.5) - 0.42
    inside = soft(gap, 10)  # 1 in the gaps between the boards
    frame = (edge > 0.76) | (brace < 0.2)
    line = (np.abs(edge - 0.76) < 0.04) | ((np.abs(brace - 0.2) < 0.04) & (edge < 0.76))
    return np.where(line, np.float32(1), np.where(frame, np.float32(0), inside))


_PIPS = {
    0: [(0, 0)],
    1: [(-1, -1), (1, 1)],
    2: [(-1, -1), (0, 0), (1, 1)],
    3: [(-1, -1), (-1, 1), (1, -1), (1, 1)],
    4: [(-1, -1), (-1, 1), (1, -1), (1, 1), (0, 0)],
    5: [(-1, -1), (-1, 0), (-1, 1), (1, -1), (1, 0), (1, 1)],
}


def pips(texture: Texture, points: Floats, normal: Floats, grit: Floats) -> Floats:
    """One to six round spots a face: a die."""
    del texture, grit
    u, v, face = _face(points, normal)
    mix = np.zeros_like(u)
    for number in np.unique(face):
        here = face == number
        # Opposite faces sum to seven: numbers 0, 1 of an axis are spots n and 7 - n.
        spots = number // 2 if number % 2 == 0 else 5 - number // 2
        distance = np.full(int(here.sum()), 9, dtype=np.float32)
        for x, y in _PIPS[int(spots)]:
            distance = np.minimum(distance, np.hypot(u[here] - 0.52 * x, v[here] - 0.52 * y))
        mix[here] = soft(0.21 - distance, 12)
    return mix


@lru_cache(maxsize=1)
def _directions() -> Floats:
    """(24, 3) unit vectors spread over the sphere by the golden angle."""
    index = np.arange(24) + 0.5
    height, turn = 1 - index / 12, index * 2.399963
    radius = np.sqrt(1 - height**2)
    return np.stack([radius * np.cos(turn), height, radius * np.sin(turn)], 1).astype(np.float32)


def spots(texture: Texture, points: Floats, normal: Floats, grit: Floats) -> Floats:
    """Round spots over a dome; its underside is plain."""
    del grit
    nearest = (_directions() @ points).max(axis=0)
    mix = soft(nearest - np.float32(np.cos(texture.frequency)), 30)
    return np.where(normal[1] < -0.9, np.float32(0.6), mix)


def veins(texture: Texture, points: Floats, normal: Floats, grit: Floats) -> Floats:
    """Marble: thin bright lines bent by the noise."""
    del normal
    along = points[0] * 0.6 + points[1] * 0.8 + points[2] * 0.5
    wave = np.sin(along * texture.frequency + texture.phase + 7 * grit)
    return soft(np.abs(wave) - 0.84, 5)


def ribs(texture: Texture, points: Floats, normal: Floats, grit: Floats) -> Floats:
    """Slanted ribs round the outside and the flat sides of a tube: a tyre."""
    del grit
    turn = _turn(points) * round(texture.frequency)
    tread = soft(np.sin(turn + 2 * np.abs(points[1])), 3)
    radius = np.hypot(points[0], points[2])
    flank = soft(0.05 - np.abs(radius - 0.82), 18)
    return np.where(np.abs(normal[1]) > 0.9, flank, tread)


def foliage(texture: Texture, points: Floats, normal: Floats, grit: Floats) -> Floats:
    """Dark and light tufts that hang in rows."""
    del normal
    rows = np.sin(points[1] * 5 + 9 * grit + np.sin(_turn(points) * texture.frequency))
    return np.clip(0.15 + 0.5 * grit + 0.35 * rows, 0, 1)


def checks(texture: Texture, points: Floats, normal: Floats, grit: Floats) -> Floats:
    """Squares in space."""
    del normal, grit
    wave = np.sin(points[0] * texture.frequency + texture.phase) * np.sin(
        points[1] * texture.frequency + 1
    )
    return soft(wave, 5)


PATTERNS = {
    f.__name__: f
    for f in (
        plain,
        panels,
        bands,
        zigzag,
        planks,
        pips,
        spots,
        veins,
        ribs,
        foliage,
        checks,
    )
}
