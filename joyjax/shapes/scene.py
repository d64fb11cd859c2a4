"""Scenes: a background and a few coloured shapes, as data.

Lengths are pixels of a picture of `SIDE` × `SIDE`. Shapes are near the centres of a 3×3 grid of cells, or overlap a
neighbour; later shapes cover earlier ones. Centres are on the lattice of the autoencoder's latents: a shape then has
the same latents at every position, and a small model can learn to draw it sharply.
"""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

SIDE = 128
CENTERS = (24, 64, 104)  # of the cells, along either axis
LATTICE = 8  # of the shapes' centres
JITTER = 8  # largest distance of a shape from its cell's centre

SHAPES = ("circle", "square", "triangle", "star", "heart", "ring")
RADII = {"small": 12, "medium": 16, "large": 20}  # half the side of the box that a shape fills
COLORS = {
    "red": (222, 44, 48),
    "orange": (250, 140, 20),
    "yellow": (248, 218, 40),
    "green": (40, 160, 70),
    "blue": (36, 96, 220),
    "purple": (132, 52, 176),
    "pink": (250, 120, 186),
    "brown": (122, 74, 36),
}
GROUNDS = {
    "white": (244, 244, 242),
    "grey": (176, 180, 186),
    "beige": (232, 212, 176),
    "mint": (176, 226, 200),
    "lavender": (206, 194, 242),
    "navy": (34, 44, 84),
}
TEXTURES = ("plain", "gradient", "striped", "checked")
CELLS = {
    f"{row} {column}".replace("middle center", "center").replace("middle ", ""): (x, y)
    for y, row in zip(CENTERS, ("top", "middle", "bottom"), strict=True)
    for x, column in zip(CENTERS, ("left", "center", "right"), strict=True)
}


@dataclasses.dataclass(frozen=True)
class Thing:
    """A shape in a scene, with the centre of its box at (x, y)."""

    shape: str
    color: str
    size: str
    x: int
    y: int

    @property
    def radius(self) -> int:
        """Half the side of the box it fills."""
        return RADII[self.size]

    @property
    def cell(self) -> str | None:
        """The name of its cell; None where it is too far from every cell's centre."""
        for name, (x, y) in CELLS.items():
            if max(abs(self.x - x), abs(self.y - y)) <= JITTER:
                return name
        return None


@dataclasses.dataclass(frozen=True)
class Ground:
    """A background."""

    color: str
    texture: str


@dataclasses.dataclass(frozen=True)
class Scene:
    """A picture as data; later things cover earlier ones."""

    ground: Ground
    things: tuple[Thing, ...]

    def with_thing(self, index: int, **changes: object) -> "Scene":
        """Return the scene with one thing changed."""
        changed = dataclasses.replace(self.things[index], **changes)  # type: ignore[arg-type]
        return dataclasses.replace(self, things=(*self.things[:index], changed, *self.things[index + 1 :]))

    def without(self, index: int) -> "Scene":
        """Return the scene without one thing."""
        return dataclasses.replace(self, things=self.things[:index] + self.things[index + 1 :])


# The picture of the README and of the notebooks, examples/shapes.png.
EXAMPLE = Scene(
    Ground("mint", "checked"),
    (
        Thing("circle", "red", "large", 32, 32),
        Thing("star", "yellow", "medium", 96, 24),
        Thing("heart", "pink", "large", 96, 96),
        Thing("square", "blue", "medium", 40, 104),
    ),
)


def room(thing: Thing, others: Iterator[Thing] | tuple[Thing, ...], share: float) -> bool:
    """Return whether a thing is within the picture and at least `share` of the sum of radii away from the others."""
    if not all(thing.radius + 1 <= middle < SIDE - thing.radius for middle in (thing.x, thing.y)):
        return False
    return all(
        math.hypot(thing.x - other.x, thing.y - other.y) >= share * (thing.radius + other.radius) for other in others
    )


def legible(scene: Scene) -> bool:
    """Return whether instructions can name each thing: all differ in colour or shape, none is half hidden."""
    for index, thing in enumerate(scene.things):
        before = scene.things[:index]
        if not room(thing, before, 0.6):
            return False
        if any((thing.shape, thing.color) == (other.shape, other.color) for other in before):
            return False
    return True


def random_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene of one to four things.

    Half of the scenes have a distractor, a thing that shares its colour or its shape with another one; in a fifth one
    thing overlaps another.
    """
    while True:
        ground = Ground(_pick(rng, GROUNDS), _pick(rng, TEXTURES))
        count = int(rng.choice((1, 2, 3, 4), p=(0.15, 0.3, 0.3, 0.25)))
        things: list[Thing] = []
        for cell in rng.permutation(len(CELLS))[:count]:
            x, y = list(CELLS.values())[cell]
            if rng.random() < 0.4:
                x, y = (middle + JITTER * int(rng.integers(-1, 2)) for middle in (x, y))
            things.append(Thing(_pick(rng, SHAPES), _pick(rng, COLORS), _pick(rng, RADII), x, y))
        if count > 1 and rng.random() < 0.5:
            shared = "color" if rng.random() < 0.6 else "shape"
            things[1] = dataclasses.replace(things[1], **{shared: getattr(things[0], shared)})
        if count > 1 and rng.random() < 0.2:
            things[-1] = _beside(rng, things[-1], things[0])
        scene = Scene(ground, tuple(things[index] for index in rng.permutation(count)))
        if legible(scene):
            return scene


def _beside(rng: np.random.Generator, thing: Thing, other: Thing) -> Thing:
    """Return the thing moved so that it overlaps the other."""
    angle, distance = rng.uniform(0, 2 * math.pi), rng.uniform(0.65, 0.85) * (thing.radius + other.radius)
    x, y = other.x + distance * math.cos(angle), other.y + distance * math.sin(angle)
    return dataclasses.replace(thing, x=LATTICE * round(x / LATTICE), y=LATTICE * round(y / LATTICE))


def _pick(rng: np.random.Generator, names: dict | tuple) -> str:
    return str(rng.choice(list(names)))
