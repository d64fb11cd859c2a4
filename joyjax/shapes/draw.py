"""Rendering scenes, identically on every machine: integer positions and one table of masks."""

import functools

import numpy as np
from jaxtyping import Bool, Float32, UInt8

from joyjax.shapes.scene import COLORS, GROUNDS, RADII, SIDE, Ground, Scene, Thing

SAMPLES = 8  # along each side of a pixel, for smooth edges
RELIEF = 11  # amplitude of a texture, in levels of 255


def render(scene: Scene) -> UInt8[np.ndarray, "h w 3"]:
    """Render a scene, `SIDE` × `SIDE`."""
    pixels = _ground(scene.ground).copy()
    for thing in scene.things:
        box, mask = box_of(thing), mask_of(thing.shape, thing.size)[..., None]
        rows, columns = box
        top, left = thing.y - thing.radius, thing.x - thing.radius
        mask = mask[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
        color = np.array(COLORS[thing.color], np.float32)
        pixels[box] += mask * (color - pixels[box])
    return np.rint(pixels).astype(np.uint8)


def box_of(thing: Thing, margin: int = 0) -> tuple[slice, slice]:
    """Return rows and columns of a thing's bounding box with a margin, clipped to the picture."""
    reach = thing.radius + margin
    rows, columns = (slice(max(0, middle - reach), min(SIDE, middle + reach)) for middle in (thing.y, thing.x))
    return rows, columns


@functools.cache
def _ground(ground: Ground) -> Float32[np.ndarray, "h w 3"]:
    y, x = np.indices((SIDE, SIDE), np.float32)
    reliefs: dict[str, np.ndarray] = {
        "plain": np.zeros_like(x),
        "gradient": 1.6 * (1 - 2 * y / (SIDE - 1)),
        "striped": np.where((x // 8) % 2 == 0, 1, -1),
        "checked": np.where((x // 16 + y // 16) % 2 == 0, 1, -1),
    }
    relief = reliefs[ground.texture][..., None].astype(np.float32)
    return np.clip(np.array(GROUNDS[ground.color], np.float32) + RELIEF * relief, 0, 255)


@functools.cache
def mask_of(shape: str, size: str) -> Float32[np.ndarray, "h w"]:
    """Return the coverage, 0 to 1, of each pixel of a shape's box."""
    side = 2 * RADII[size]
    unit = (np.arange(side * SAMPLES) + 0.5) / (side * SAMPLES) * 2 - 1
    x, y = np.meshgrid(unit, -unit)
    inside = _inside(shape, x, y).reshape(side, SAMPLES, side, SAMPLES)
    return inside.mean(axis=(1, 3)).astype(np.float32)


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> Bool[np.ndarray, "h w"]:
    """Return which points of the square [-1, 1]² belong to a shape; y points up."""
    radius = np.hypot(x, y)
    match shape:
        case "circle":
            return radius <= 0.96
        case "ring":
            return (radius <= 0.98) & (radius >= 0.52)
        case "square":
            return np.maximum(abs(x), abs(y)) <= 0.86
        case "triangle":
            return (y >= -0.8) & (abs(x) <= (0.94 - y) * 0.56)
        case "heart":
            u, v = 1.2 * x, 1.17 * y + 0.12
            return (u**2 + v**2 - 1) ** 3 <= u**2 * v**3
        case "star":
            return radius <= _star_edge(np.arctan2(x, y))
    raise ValueError(f"no shape {shape!r}")


def _star_edge(angle: np.ndarray) -> Float32[np.ndarray, "h w"]:
    """Return the radius of a five-pointed star at an angle from its top point."""
    outer, inner, half = 1.0, 0.46, np.pi / 5
    turn = np.abs((angle + half) % (2 * half) - half)  # from the nearest point, 0 to 36°
    # The straight edge from (outer, angle 0) to (inner, angle 36°).
    ax, ay, bx, by = outer, 0.0, inner * np.cos(half), inner * np.sin(half)
    nx, ny = by - ay, ax - bx
    return ((nx * ax + ny * ay) / (nx * np.cos(turn) + ny * np.sin(turn))).astype(np.float32)
