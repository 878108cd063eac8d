"""Solids of the scenes: closed-form ray intersections of five unit primitives, and their hulls.

Every primitive lives in its own frame (axis along y, extent about 1); an affine map carries it into
the world. A ray keeps its parameter t under an affine map, so depths compare across primitives.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Kind = Literal["sphere", "dome", "box", "frustum", "tube"]
_MISS = np.float32(np.inf)
_TINY = np.float32(1e-9)


@dataclass(frozen=True)
class Solid:
    """A primitive placed in the frame of its object.

    kind: sphere (radius 1), dome (its half y >= 0), box ([-1, 1]^3), frustum (|y| <= 1, radius 1 at
    the bottom and ``taper`` at the top), tube (|y| <= 1, radii ``taper`` to 1).
    """

    kind: Kind
    scale: tuple[float, float, float]
    offset: tuple[float, float, float] = (0.0, 0.0, 0.0)
    taper: float = 1.0


def intersect(solid: Solid, origin: Floats, rays: Floats) -> Floats:
    """Nearest t > 0 with origin + t * ray on the solid, inf where it is missed.

    Args:
        solid: only its kind and taper count here.
        origin: (3,) in the solid's unit frame, outside of it.
        rays: (3, N) directions in the same frame, of any length.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if solid.kind == "box":
            return _box(origin, rays)
        if solid.kind == "frustum":
            return _frustum(origin, rays, solid.taper)
        if solid.kind == "tube":
            return _tube(origin, rays, solid.taper)
        return _sphere(origin, rays, half=solid.kind == "dome")


def _roots(a: Floats, b: Floats, c: float) -> tuple[Floats, Floats]:
    """Both roots of a t^2 + 2 b t + c, NaN where there is none (NaN fails every comparison)."""
    root = np.sqrt(b * b - a * c)
    return (-b - root) / a, (-b + root) / a


def _sphere(origin: Floats, rays: Floats, half: bool) -> Floats:
    near, _ = _roots(np.einsum("kn,kn->n", rays, rays), origin @ rays, float(origin @ origin) - 1)
    if not half:
        return np.where(near > 0, near, _MISS)
    t = np.where((near > 0) & (origin[1] + near * rays[1] >= 0), near, _MISS)
    if origin[1] < 0:  # the flat side faces the camera
        flat = -origin[1] / rays[1]
        x, z = origin[0] + flat * rays[0], origin[2] + flat * rays[2]
        t = np.where((flat > 0) & (x * x + z * z < 1), np.minimum(t, flat), t)
    return t


def _box(origin: Floats, rays: Floats) -> Floats:
    inverse = 1 / np.where(np.abs(rays) < _TINY, _TINY, rays)
    one, two = (-1 - origin[:, None]) * inverse, (1 - origin[:, None]) * inverse
    enter, leave = np.minimum(one, two).max(axis=0), np.maximum(one, two).min(axis=0)
    return np.where((enter < leave) & (enter > 0), enter, _MISS)


def _cap(origin: Floats, rays: Floats, inner: float, bottom: float, top: float) -> Floats:
    """The flat end that faces the origin: a ring from ``inner`` to the radius of that end."""
    if abs(origin[1]) <= 1:
        return np.full(rays.shape[1], _MISS)
    side = 1.0 if origin[1] > 0 else -1.0
    t = (side - origin[1]) / rays[1]
    x, z = origin[0] + t * rays[0], origin[2] + t * rays[2]
    square = x * x + z * z
    outer = top if side > 0 else bottom
    return np.where((t > 0) & (square <= outer * outer) & (square >= inner * inner), t, _MISS)


def _frustum(origin: Floats, rays: Floats, taper: float) -> Floats:
    mean, slope = (1 + taper) / 2, (taper - 1) / 2  # radius = mean + slope * y
    here = mean + slope * origin[1]
    a = rays[0] * rays[0] + rays[2] * rays[2] - slope * slope * (rays[1] * rays[1])
    b = origin[0] * rays[0] + origin[2] * rays[2] - slope * here * rays[1]
    t = _cap(origin, rays, 0.0, 1.0, taper)
    c = float(origin[0] ** 2 + origin[2] ** 2 - here**2)
    # Both roots, for the order turns round where a < 0; an exit never beats the entry.
    for root in _roots(np.where(np.abs(a) < _TINY, _TINY, a), b, c):
        y = origin[1] + root * rays[1]
        t = np.where((root > 0) & (np.abs(y) <= 1), np.fmin(t, root), t)
    return t


def _tube(origin: Floats, rays: Floats, inner: float) -> Floats:
    a = rays[0] * rays[0] + rays[2] * rays[2]
    a = np.where(a < _TINY, _TINY, a)
    b = origin[0] * rays[0] + origin[2] * rays[2]
    c = float(origin[0] ** 2 + origin[2] ** 2)
    outside, _ = _roots(a, b, c - 1)
    _, inside = _roots(a, b, c - inner * inner)
    t = _cap(origin, rays, inner, 1.0, 1.0)
    for root in (outside, inside):
        y = origin[1] + root * rays[1]
        t = np.where((root > 0) & (np.abs(y) <= 1), np.fmin(t, root), t)
    return t


def normals(solid: Solid, points: Floats) -> Floats:
    """(3, M) outward normals in the unit frame, not normalised, of points (3, M) on the solid."""
    if solid.kind == "sphere":
        return points
    if solid.kind == "dome":
        return np.where(points[1] > 1e-4, points, _column(0, -1, 0))
    if solid.kind == "box":
        largest = np.abs(points).argmax(axis=0)
        return np.where(np.arange(3)[:, None] == largest, np.sign(points), 0).astype(np.float32)
    side = points.copy()
    if solid.kind == "frustum":
        radius = np.sqrt(points[0] ** 2 + points[2] ** 2)
        side[1] = radius * ((1 - solid.taper) / 2)
    else:
        outward = points[0] ** 2 + points[2] ** 2 > ((1 + solid.taper) / 2) ** 2
        side *= np.where(outward, np.float32(1), np.float32(-1))
        side[1] = 0
    return np.where(np.abs(points[1]) > 1 - 1e-4, _column(0, 1, 0) * np.sign(points[1]), side)


def _column(x: float, y: float, z: float) -> Floats:
    return np.array([[x], [y], [z]], dtype=np.float32)


@lru_cache(maxsize=64)
def hull(kind: Kind, taper: float) -> Floats:
    """(3, P) points of the unit frame whose convex hull holds the primitive, a few percent wide."""
    if kind == "box":
        corners = [(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]
        return np.array(corners, dtype=np.float32).T
    angle = np.arange(16) * (2 * np.pi / 16)
    circle = np.stack([np.cos(angle), np.zeros(16), np.sin(angle)]) / np.cos(np.pi / 16)
    if kind in ("frustum", "tube"):
        top = taper if kind == "frustum" else 1.0
        rings = [(1.0, -1.0), (top, 1.0)]
    else:
        heights = [-0.95, -0.6, 0.0, 0.6, 0.95] if kind == "sphere" else [0.0, 0.6, 0.95]
        rings = [(np.sqrt(1 - h * h) * 1.05, h * 1.08) for h in heights]
    points = [circle * np.array([[r], [1.0], [r]]) + [[0.0], [h], [0.0]] for r, h in rings]
    return np.concatenate(points, axis=1).astype(np.float32)


def hole(taper: float) -> Floats:
    """(3, 16) the rim of a tube's hole, half way up."""
    angle = np.arange(16) * (2 * np.pi / 16)
    rim = np.stack([np.cos(angle), np.zeros(16), np.sin(angle)]) * taper
    return rim.astype(np.float32)
