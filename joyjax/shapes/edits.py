"""Edits of a scene: eight kinds, each with exactly one right result, and the held-out combinations."""

import dataclasses
import hashlib
from collections.abc import Iterator

import numpy as np

from joyjax.shapes.scene import (
    CELLS,
    COLORS,
    GROUNDS,
    RADII,
    SHAPES,
    TEXTURES,
    Ground,
    Scene,
    Thing,
    legible,
    random_scene,
    room,
)

KINDS = ("recolor", "remove", "add", "move", "resize", "swap", "background", "shape")
HELD_OUT = 8  # one in 8 combinations is held out from training


@dataclasses.dataclass(frozen=True)
class Edit:
    """The change of the thing at `index` (and `other`) of a scene to the new `value`.

    The value is a colour, a size, a shape, a cell, or a colour or texture of the background. `thing` is what "add"
    adds.
    """

    kind: str
    index: int | None = None
    other: int | None = None
    value: str | None = None
    thing: Thing | None = None


@dataclasses.dataclass(frozen=True)
class Pair:
    """A scene, an edit, and the resulting scene."""

    source: Scene
    edit: Edit
    target: Scene


def apply(scene: Scene, edit: Edit) -> Scene:
    """Return the scene after the edit."""
    index, value = edit.index, edit.value
    match edit.kind:
        case "add":
            assert edit.thing is not None
            return dataclasses.replace(scene, things=(*scene.things, edit.thing))
        case "background":
            color, texture = scene.ground.color, scene.ground.texture
            ground = Ground(color, str(value)) if value in TEXTURES else Ground(str(value), texture)
            return dataclasses.replace(scene, ground=ground)
    assert index is not None
    match edit.kind:
        case "remove":
            return scene.without(index)
        case "recolor":
            return scene.with_thing(index, color=value)
        case "shape":
            return scene.with_thing(index, shape=value)
        case "resize":
            return scene.with_thing(index, size=value)
        case "move":
            assert value is not None
            x, y = CELLS[value]
            return scene.with_thing(index, x=x, y=y)
        case "swap":
            assert edit.other is not None
            one, two = scene.things[index], scene.things[edit.other]
            return scene.with_thing(index, x=two.x, y=two.y).with_thing(edit.other, x=one.x, y=one.y)
    raise ValueError(f"no kind of edit {edit.kind!r}")


def propose(rng: np.random.Generator, scene: Scene, kind: str) -> Pair | None:
    """Draw an edit of one kind; None where this draw gives no legible result."""
    edit = _draw(rng, scene, kind)
    if edit is None:
        return None
    target = apply(scene, edit)
    if target == scene or not legible(target) or not 1 <= len(target.things) <= 5:
        return None
    if kind in ("add", "move"):  # only to free space
        index = len(target.things) - 1 if edit.index is None else edit.index
        if not room(target.things[index], target.without(index).things, 0.9):
            return None
    return Pair(scene, edit, target)


def _draw(rng: np.random.Generator, scene: Scene, kind: str) -> Edit | None:
    def pick(names: object) -> str:
        return str(rng.choice(list(names)))  # type: ignore[call-overload]

    index = int(rng.integers(len(scene.things)))
    match kind:
        case "recolor":
            return Edit(kind, index, value=pick(COLORS))
        case "shape":
            return Edit(kind, index, value=pick(SHAPES))
        case "resize":
            return Edit(kind, index, value=pick(RADII))
        case "remove":
            return Edit(kind, index) if len(scene.things) > 1 else None
        case "move":
            cell = pick(CELLS)
            return Edit(kind, index, value=cell) if scene.things[index].cell != cell else None
        case "add":
            cell = pick(CELLS)
            thing = Thing(pick(SHAPES), pick(COLORS), pick(RADII), *CELLS[cell])
            return Edit(kind, value=cell, thing=thing)
        case "swap":
            if len(scene.things) < 2:
                return None
            one, two = rng.choice(len(scene.things), 2, replace=False)
            return Edit(kind, int(one), int(two))
        case "background":
            return Edit(kind, value=pick(GROUNDS) if rng.random() < 0.75 else pick(TEXTURES))
    raise ValueError(f"no kind of edit {kind!r}")


def reverse(pair: Pair) -> Pair | None:
    """Return the edit that undoes a pair; None where no instruction describes it exactly."""
    edit, before, after = pair.edit, pair.source, pair.target
    match edit.kind:
        case "recolor" | "shape" | "resize":
            assert edit.index is not None
            name = {"recolor": "color", "shape": "shape", "resize": "size"}[edit.kind]
            back = dataclasses.replace(edit, value=getattr(before.things[edit.index], name))
        case "background":
            back = Edit("background", value=before.ground.texture if edit.value in TEXTURES else before.ground.color)
        case "swap":
            back = edit
        case "add":
            back = Edit("remove", len(after.things) - 1)
        case "remove" | "move":
            assert edit.index is not None
            thing = before.things[edit.index]
            if thing.cell is None:
                return None
            if edit.kind == "move":
                back = Edit("move", edit.index, value=thing.cell)
            else:
                back = Edit("add", value=thing.cell, thing=thing)
        case _:
            raise ValueError(f"no kind of edit {edit.kind!r}")
    if apply(after, back) != before or (back.kind == "remove" and len(after.things) < 2):
        return None
    return Pair(after, back, before)


def combination(pair: Pair) -> str:
    """Return the combination that an edit belongs to: its kind, shape and colour of its thing, and the new value."""
    edit, scene = pair.edit, pair.source
    if edit.kind == "background":
        return f"background: {scene.ground.color} {scene.ground.texture} to {edit.value}"
    if edit.kind == "swap":
        assert edit.index is not None
        assert edit.other is not None
        one, two = sorted(f"{scene.things[n].color} {scene.things[n].shape}" for n in (edit.index, edit.other))
        return f"swap: {one}, {two}"
    thing = edit.thing or scene.things[edit.index or 0]
    value = thing.cell if edit.kind == "remove" else edit.value
    return f"{edit.kind}: {thing.color} {thing.shape}, {value}"


def held_out(pair: Pair) -> bool:
    """Return whether a pair's combination is held out for the score."""
    return hashlib.sha256(combination(pair).encode()).digest()[0] % HELD_OUT == 0


def pairs(rng: np.random.Generator, kind: str, *, held: bool) -> Iterator[Pair]:
    """Yield pairs of one kind without end: only held-out combinations, or only the others."""
    while True:
        pair = propose(rng, random_scene(rng), kind)
        if pair is not None and held_out(pair) == held:
            yield pair
