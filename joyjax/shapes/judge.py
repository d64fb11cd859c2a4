"""Judges results by their pixels against the expected scene.

Two tests, since a mean error alone accepts a ring for a disc. `pixel`: pixels that should change are near the expected
picture, and the others have not changed. `strict`: each thing, and the background, is nearer to its expected rendering
than to every alternative that differs in one attribute.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float32, UInt8

from joyjax.shapes.draw import box_of, render
from joyjax.shapes.edits import Pair
from joyjax.shapes.scene import COLORS, GROUNDS, RADII, SHAPES, TEXTURES, Ground, Scene, Thing

CHANGED_ERROR = 32  # mean error, in levels of 255, where source and target differ
KEPT_ERROR = 6  # … and elsewhere
FAR = 60  # a pixel with an error above this in a channel is a stray
KEPT_STRAYS = 0.006  # share of strays among the pixels that should not change
GROUND_KEPT_ERROR, GROUND_KEPT_STRAYS = 16, 0.04  # for edits of the background, where only edges and things stay
STRAYS = 40  # pixels outside every thing's window
MARGIN = 5  # of a thing's window around its box
SHOWS = 6  # a pixel changes where a channel of source and target differs by more


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a result passes each test, and its peak signal-to-noise ratio to the expected picture, in dB."""

    pixel: bool
    strict: bool
    psnr: float


def judge(pair: Pair, result: UInt8[np.ndarray, "h w 3"]) -> Verdict:
    """Judge the result of an edit."""
    expected = render(pair.target).astype(np.float32)
    got = result.astype(np.float32)
    mse = float(np.mean((got - expected) ** 2))
    psnr = float("inf") if mse == 0 else 10 * float(np.log10(255**2 / mse))
    return Verdict(_pixel(pair, got, expected), _strict(pair, got, expected), psnr)


def _pixel(pair: Pair, got: Float32[np.ndarray, "h w 3"], expected: Float32[np.ndarray, "h w 3"]) -> bool:
    error = np.abs(got - expected)
    changed = np.abs(render(pair.source).astype(np.float32) - expected).max(axis=-1) > SHOWS
    kept, strays = error[~changed], error.max(axis=-1)[~changed] > FAR
    ground = pair.edit.kind == "background"
    kept_error, kept_strays = (GROUND_KEPT_ERROR, GROUND_KEPT_STRAYS) if ground else (KEPT_ERROR, KEPT_STRAYS)
    if error[changed].mean() >= CHANGED_ERROR:
        return False
    return not kept.size or bool(kept.mean() < kept_error and strays.mean() < kept_strays)


def _strict(pair: Pair, got: Float32[np.ndarray, "h w 3"], expected: Float32[np.ndarray, "h w 3"]) -> bool:
    error = np.abs(got - expected).max(axis=-1)
    for thing, alternative in _alternatives(pair):
        window = box_of(thing, MARGIN)
        other = render(alternative)[window].astype(np.float32)
        if np.sum((got[window] - other) ** 2) <= np.sum((got[window] - expected[window]) ** 2):
            return False
    bare = np.ones(error.shape, bool)
    for thing in (*pair.source.things, *pair.target.things):
        bare[box_of(thing, MARGIN)] = False
    if (error[bare] > FAR).sum() >= STRAYS:
        return False
    distances = {
        ground: np.sum((got[bare] - render(Scene(ground, ()))[bare]) ** 2)
        for ground in (Ground(color, texture) for color in GROUNDS for texture in TEXTURES)
    }
    return min(distances, key=lambda ground: distances[ground]) == pair.target.ground


def _alternatives(pair: Pair) -> Iterator[tuple[Thing, Scene]]:
    """Yield each thing, whose window is compared, with a scene that is wrong there in one attribute."""
    target = pair.target
    for index, thing in enumerate(target.things):
        yield thing, target.without(index)
        for name, values in (("shape", SHAPES), ("color", COLORS), ("size", RADII)):
            for value in values:
                if value != getattr(thing, name):
                    yield thing, target.with_thing(index, **{name: value})
    for thing in pair.source.things:  # things that the edit removes
        if thing not in target.things:
            alternative = dataclasses.replace(target, things=(*target.things, thing))
            if np.any(render(alternative) != render(target)):
                yield thing, alternative
