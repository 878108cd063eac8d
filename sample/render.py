"""From a world to a picture: rays, light, shadows, and a camera's blur and grain. numpy and PIL."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from shapes import Floats, hole, intersect, normals
from textures import Texture, albedo, noise, soft
from things import Thing
from world import Camera, World

GROUND, WALL, SKY = -2, -3, -4
"""Values of :class:`Picture` ids where no thing stands."""

Outlines = list[list[Floats]]  # of every thing, of every part: points around it

_SAMPLES = 2  # rays a pixel along each side, for the things; the blurred background has one


@dataclass
class Picture:
    """image: uint8 (H, W, 3); ids: int16 (H, W), the index of the thing seen there or a constant
    of this module."""

    image: NDArray[np.uint8]
    ids: NDArray[np.int16]


def render(world: World, height: int, width: int) -> Picture:
    """Render a world at ``height`` x ``width`` pixels; the same world gives the same bytes."""
    outlines = [thing.outlines() for thing in world.things]
    colour, ids = _background(world, outlines, height, width)
    layer, things = _things(world, outlines, height * _SAMPLES, width * _SAMPLES)
    if world.defocus > 0:  # a lens focused on the things softens what lies behind them
        colour = _blur(colour, world.defocus * height / 100)
    covered = _shrink((things >= 0).astype(np.float32)[..., None])
    colour = colour * (1 - covered) + _shrink(layer)
    seen = _vote(things)
    return Picture(_photograph(colour, world), np.where(seen >= 0, seen, ids))


def seen_things(world: World, height: int, width: int) -> NDArray[np.int16]:
    """(H, W) index of the thing seen at each pixel centre, -1 for none: a look before rendering."""
    return _things(world, [thing.outlines() for thing in world.things], height, width)[1]


def _rays(
    camera: Camera,
    height: int,
    width: int,
    window: tuple[slice, slice] = (slice(None), slice(None)),
    frame: Floats | None = None,
) -> Floats:
    """(3, N) directions through the pixel centres of a window, whose depth along the axis is 1.

    In world coordinates, or in those that ``frame`` (3, 3) turns the world into.
    """
    scale = np.float32(1 / (height * camera.focal))
    x = (np.arange(width, dtype=np.float32)[window[1]] + (0.5 - width / 2)) * scale
    y = ((height / 2 - 0.5) - np.arange(height, dtype=np.float32)[window[0]]) * scale
    axes = camera.axes if frame is None else camera.axes @ frame.T
    right, up, forward = axes[:, :, None]
    rows = up * y[None, :] + forward
    return (rows[:, :, None] + (right * x[None, :])[:, None, :]).reshape(3, -1)


def _project(camera: Camera, points: Floats, height: int, width: int) -> Floats:
    """(2, P) pixel coordinates x, y of world points; points beside the camera are pushed ahead."""
    local = camera.axes @ (points - camera.place[:, None])
    depth = np.maximum(local[2], np.float32(0.05))
    scale = camera.focal * height
    return np.stack([width / 2 + local[0] / depth * scale, height / 2 - local[1] / depth * scale])


# --- light ------------------------------------------------------------------------------------


def _lit(world: World, normal: Floats, open_sky: Floats, sun: Floats | np.float32) -> Floats:
    """(3, M) light that falls on unit normals: the sun, the sky above, the ground's glow below."""
    upward = (0.5 + 0.5 * normal[1]) * open_sky
    parts = np.stack([np.maximum(world.sun @ normal, 0) * sun, upward, open_sky - 0.5 * upward])
    return world.light @ parts


_TURN = np.arange(32, dtype=np.float32) * np.float32(2 * np.pi / 32)
_COMPASS = np.stack([np.cos(_TURN), np.sin(_TURN)], axis=1)


def _polygon(points: Floats) -> list[float]:
    """x, y, x, y, ... of the convex outline of 2-d points: the farthest ones in 32 directions."""
    corners: list[float] = points.T[(_COMPASS @ points).argmax(axis=1)].ravel().tolist()
    return corners


def _shadows(world: World, outlines: Outlines, height: int, width: int) -> tuple[Floats, Floats]:
    """(H, W) sunlight and open sky that reach the ground, 0..1: cast and contact shadows."""
    cast, contact = Image.new("L", (width, height)), Image.new("L", (width, height))
    pens = ImageDraw.Draw(cast), ImageDraw.Draw(contact)
    along, straight = world.sun / world.sun[1], np.array([0, 1, 0], dtype=np.float32)
    for thing, parts in zip(world.things, outlines, strict=True):
        for (solid, _), points in zip(thing.parts, parts, strict=True):
            outline = _polygon(_project(world.camera, _drop(points, along), height, width))
            if solid.kind == "tube":
                matrix, shift, _ = thing.frame(solid)
                rim = _drop(matrix @ hole(solid.taper) + shift[:, None], along)
                ring = _project(world.camera, rim, height, width).T.ravel().tolist()
                outline = [*outline, *outline[:2], *ring, *ring[:2]]  # a slit joins the two rings
            pens[0].polygon(outline, fill=255)
        foot = np.concatenate(parts, axis=1)
        low = _drop(foot[:, foot[1] < 0.3 * thing.size], straight)
        pens[1].polygon(_polygon(_project(world.camera, low, height, width)), fill=255)
    soften = world.shadow_blur * height / 100
    sun = np.asarray(cast.filter(ImageFilter.GaussianBlur(soften)), dtype=np.float32)
    sky = np.asarray(contact.filter(ImageFilter.GaussianBlur(height * 0.035)), dtype=np.float32)
    one = np.float32(1)
    return one - sun * np.float32(1 / 255), one - sky * np.float32(0.7 / 255)


def _drop(points: Floats, along: Floats) -> Floats:
    """Points moved onto the ground against the direction ``along``, whose y is 1."""
    return points - along[:, None] * points[1]


# --- background -------------------------------------------------------------------------------


def _background(
    world: World, outlines: Outlines, height: int, width: int
) -> tuple[Floats, NDArray[np.int16]]:
    """Linear colour (H, W, 3) and ids of ground, wall and sky."""
    rays, place = _rays(world.camera, height, width), world.camera.place
    down = rays[1] < -1e-4
    to_ground = np.where(down, place[1] / np.where(down, -rays[1], 1), np.float32(1e6))
    ids = np.where(down, np.int16(GROUND), np.int16(SKY))
    depth = to_ground
    if world.wall is not None:
        facing = np.array([np.sin(world.wall_yaw), 0, -np.cos(world.wall_yaw)], dtype=np.float32)
        towards = facing @ rays
        gap = world.wall_distance + float(facing @ place)
        hit = towards < -1e-4
        to_wall = np.where(hit, gap / np.where(hit, -towards, 1), np.float32(1e6))
        ids = np.where(to_wall < depth, np.int16(WALL), ids)
        depth = np.minimum(depth, to_wall)
    colour = np.empty((3, height * width), dtype=np.float32)
    sun, sky = _shadows(world, outlines, height, width)
    for kind in (GROUND, WALL, SKY):
        (here,) = np.nonzero(ids == kind)
        if not here.size:
            continue
        if kind == SKY:
            colour[:, here] = _sky(world, rays[:, here])
            continue
        points = place[:, None] + rays[:, here] * depth[here]
        if kind == GROUND:
            normal, u, v, skin = np.array([[0], [1], [0]]), points[0], points[2], world.ground
            light = _lit(world, normal.astype(np.float32), sky.ravel()[here], sun.ravel()[here])
        else:
            assert world.wall is not None
            along = np.array([facing[2], 0, -facing[0]], dtype=np.float32)
            u, v, skin = along @ points, points[1], world.wall
            light = _lit(world, facing[:, None], np.clip(0.6 + 0.3 * v, 0, 1), np.ones_like(v))
        fade = np.reciprocal(1 + (depth[here] / 9) ** 2)  # far texture would only alias
        colour[:, here] = _surface(skin, u, v, fade) * light
    return colour.reshape(3, height, width).transpose(1, 2, 0), ids.reshape(height, width)


def _surface(skin: Texture, u: Floats, v: Floats, fade: Floats) -> Floats:
    """(3, M) colour of a flat surface at (u, v), in world units."""
    scale = np.float32(0.11 if skin.noise in ("grain", "cells") else 0.17)
    shift = np.float32(64)
    coarse = noise(skin.noise, u * scale + skin.shift[0] + shift, v * scale + skin.shift[1] + shift)
    fine = noise(skin.noise, v * (scale * 4) + shift, u * (scale * 4) + skin.shift[1] + shift)
    grit = (coarse + fine) * np.float32(0.5)
    f = skin.frequency
    if skin.pattern == "lines":
        mix = soft(np.abs((u * f + shift) % 1 - 0.5) - 0.44, 14)
    elif skin.pattern == "tiles":
        mix = np.maximum(
            soft(np.abs((u * f + shift) % 1 - 0.5) - 0.45, 14),
            soft(np.abs((v * f + shift) % 1 - 0.5) - 0.45, 14),
        )
    elif skin.pattern == "bricks":
        row = np.floor(v * f * 2.2 + shift)
        mix = np.maximum(
            soft(np.abs((u * f + row * 0.5 + shift) % 1 - 0.5) - 0.45, 14),
            soft(np.abs((v * f * 2.2 + shift) % 1 - 0.5) - 0.42, 10),
        )
    else:
        mix = coarse
    first, second = skin.colours
    colour = first[:, None] + (second - first)[:, None] * (mix * fade)
    return colour * (1 + np.float32(2.4 * skin.roughness) * (grit - np.float32(0.5)) * fade)


def _sky(world: World, rays: Floats) -> Floats:
    """A sky that deepens upwards, with clouds."""
    rise = np.clip(rays[1] / np.sqrt((rays * rays).sum(axis=0)) * 2, 0, 1)
    horizon, zenith = world.sky
    flat = 1 / np.maximum(rays[1] + np.float32(0.25), np.float32(0.05))
    u, v = world.ground.shift
    cloud = noise("clouds", rays[0] * flat * 0.1 + 8 + u, rays[2] * flat * 0.1 + 8 + v)
    cloud = soft(cloud - np.float32(0.55), 2.5) * np.float32(0.5)
    colour = horizon[:, None] + (zenith - horizon)[:, None] * rise
    return colour + (1 - colour) * cloud


# --- things -----------------------------------------------------------------------------------


def _things(
    world: World, outlines: Outlines, height: int, width: int
) -> tuple[Floats, NDArray[np.int16]]:
    """Linear colour (H, W, 3), black where nothing stands, and the index of the thing or -1."""
    colour = np.zeros((height * width, 3), dtype=np.float32)
    depth = np.full((height, width), np.inf, dtype=np.float32)
    ids = np.full(height * width, -1, dtype=np.int16)
    away = [float(np.linalg.norm(t.place - world.camera.place)) for t in world.things]
    for index in np.argsort(away, kind="stable"):  # near first: what is hidden is never shaded
        thing = world.things[index]
        for (solid, skin), outline in zip(thing.parts, outlines[index], strict=True):
            x, y = _project(world.camera, outline, height, width)
            left, right = max(int(x.min()), 0), min(int(x.max()) + 1, width)
            top, bottom = max(int(y.min()), 0), min(int(y.max()) + 1, height)
            if left >= right or top >= bottom:
                continue
            window = (slice(top, bottom), slice(left, right))
            matrix, shift, inverse = thing.frame(solid)
            origin = inverse @ (world.camera.place - shift)
            local = _rays(world.camera, height, width, window, inverse)
            t = intersect(solid, origin, local)
            (hit,) = np.nonzero(t < depth[window].ravel())
            if not hit.size:
                continue
            t = t[hit]
            points = origin[:, None] + local[:, hit] * t
            unit = normals(solid, points)
            paint = albedo(skin, points, unit)
            normal = inverse.T @ unit
            normal /= np.sqrt((normal * normal).sum(axis=0)) + np.float32(1e-9)
            above = matrix[1] @ points + shift[1]
            rows, columns = np.divmod(hit, right - left)
            flat = (rows + top) * width + (columns + left)
            colour[flat] = _shade(world, thing, skin, paint, normal, above).T
            depth.ravel()[flat] = t
            ids[flat] = index
    return colour.reshape(height, width, 3), ids.reshape(height, width)


def _shade(
    world: World, thing: Thing, skin: Texture, paint: Floats, normal: Floats, above: Floats
) -> Floats:
    """(3, M) light that leaves a thing's surface; ``above`` is the height over the ground."""
    open_sky = np.clip(0.45 + above * np.float32(0.9 / thing.size), 0, 1)
    colour = paint * _lit(world, normal, open_sky, np.float32(1))
    if skin.gloss > 0:
        towards = world.camera.place - thing.place
        half = world.sun + towards / np.linalg.norm(towards)
        half /= np.linalg.norm(half)
        shine = np.maximum(half @ normal, 0)
        for _ in range(5):  # to the 32nd
            shine = shine * shine
        colour = colour + np.float32(skin.gloss * 0.5) * world.light[:, :1] * shine
    return colour


# --- camera -----------------------------------------------------------------------------------


def _shrink(image: Floats) -> Floats:
    """Mean of every block of 2 x 2."""
    rows = image[::2] + image[1::2]
    return (rows[:, ::2] + rows[:, 1::2]) * np.float32(0.25)


def _vote(ids: NDArray[np.int16]) -> NDArray[np.int16]:
    """The id of most of every 2 x 2 block: the second smallest of the four, so a tie of two and two
    goes to the smaller."""
    a, b, c, d = ids[::2, ::2], ids[::2, 1::2], ids[1::2, ::2], ids[1::2, 1::2]
    low, high = np.minimum(a, b), np.maximum(a, b)
    low2, high2 = np.minimum(c, d), np.maximum(c, d)
    return np.minimum(np.maximum(low, low2), np.minimum(high, high2))


def _blur(image: Floats, sigma: float) -> Floats:
    """Gaussian blur of (H, W, C) with a sigma in pixels; borders repeat."""
    reach = int(np.ceil(2 * sigma))
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    for axis in (0, 1):
        pad = [(0, 0)] * 3
        pad[axis] = (reach, reach)
        padded, length = np.pad(image, pad, mode="edge"), image.shape[axis]
        parts = [slice(start, start + length) for start in range(len(weights))]
        image = sum(  # type: ignore[assignment]
            weight * (padded[:, part] if axis else padded[part])
            for weight, part in zip(weights, parts, strict=True)
        )
    return image


def _photograph(image: Floats, world: World) -> NDArray[np.uint8]:
    """Exposure to a common mean, vignette, film curve, 8 bits, then blur and grain."""
    height, width = image.shape[:2]
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None, None]
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :, None]
    gain = np.float32(0.62 * world.exposure / (image.mean() + 0.02))
    light = image * ((gain * np.float32(511)) * (1 - np.float32(0.12) * (x * x + y * y)))
    film = np.take(_film(), light.astype(np.int32), mode="clip")
    scale = height / 100
    radii = (world.blur[0] * scale, world.blur[1] * scale)
    blurred = np.asarray(Image.fromarray(film).filter(ImageFilter.GaussianBlur(radii)))
    rng = np.random.default_rng(world.seed)
    grain = rng.standard_normal((height, width, 1), dtype=np.float32) * np.float32(world.grain)
    # Rounding half up; dark parts show more grain, as after a film curve they do.
    strength = (np.float32(320) - blurred) * grain + (blurred + np.float32(0.5))
    return np.clip(strength, 0, 255).astype(np.uint8)


@lru_cache(maxsize=1)
def _film() -> NDArray[np.uint8]:
    """Display value of 2048 levels of linear light, 511 of them to a unit: a soft shoulder."""
    return np.round((1 - np.exp(-np.arange(2048) / 511)) ** (1 / 2.2) * 255).astype(np.uint8)
