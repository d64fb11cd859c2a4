"""Edits in plain English, each in many wordings."""

import numpy as np

from joyjax.shapes.edits import Edit, Pair
from joyjax.shapes.scene import RADII, TEXTURES, Scene

RECOLOR = (
    "make {thing} {color}",
    "turn {thing} {color}",
    "paint {thing} {color}",
    "color {thing} {color}",
    "recolor {thing} to {color}",
    "change {thing} to {color}",
    "change the color of {thing} to {color}",
    "make the color of {thing} {color}",
    "{thing} should be {color}",
)
REMOVE = (
    "remove {thing}",
    "delete {thing}",
    "erase {thing}",
    "take away {thing}",
    "get rid of {thing}",
    "take {thing} out",
    "remove {thing} from the picture",
)
ADD = (
    "add {new} {at}",
    "draw {new} {at}",
    "put {new} {at}",
    "place {new} {at}",
    "insert {new} {at}",
    "there should be {new} {at}",
)
MOVE = (
    "move {thing} to {place}",
    "shift {thing} to {place}",
    "bring {thing} to {place}",
    "put {thing} {at}",
    "place {thing} {at}",
    "move {thing} so that it is {at}",
)
RESIZE = (
    "make {thing} {size}",
    "resize {thing} to {size}",
    "change the size of {thing} to {size}",
    "turn {thing} into a {size} one",
    "{thing} should be {size}",
)
LARGER = ("make {thing} bigger", "make {thing} larger", "enlarge {thing}", "grow {thing}")
SMALLER = ("make {thing} smaller", "shrink {thing}", "reduce {thing}")
SWAP = (
    "swap {thing} and {other}",
    "exchange {thing} and {other}",
    "swap {thing} with {other}",
    "switch the places of {thing} and {other}",
    "let {thing} and {other} trade places",
)
GROUND_COLOR = (
    "make the background {color}",
    "change the background to {color}",
    "turn the background {color}",
    "paint the background {color}",
    "change the color of the background to {color}",
    "the background should be {color}",
)
GROUND_TEXTURE = (
    "make the background {texture}",
    "change the background to {texture}",
    "turn the background {texture}",
    "the background should be {texture}",
)
SHAPE = (
    "turn {thing} into a {shape}",
    "change {thing} into a {shape}",
    "change {thing} to a {shape}",
    "make {thing} a {shape}",
    "replace {thing} with a {shape}",
    "{thing} should be a {shape}",
)
SYNONYMS = {
    "color": ("color", "colour"),
    "recolor": ("recolor", "recolour"),
    "center": ("center", "middle", "centre"),
    "large": ("large", "big"),
    "small": ("small", "little"),
    "grey": ("grey", "gray"),
    "checked": ("checked", "checkered"),
    "purple": ("purple", "violet"),
    "picture": ("picture", "image"),
}


def sentence(rng: np.random.Generator, pair: Pair) -> str:
    """Return an instruction for an edit in a random wording."""
    text = _wording(rng, pair)
    words = [
        str(rng.choice(SYNONYMS[word])) if word in SYNONYMS and rng.random() < 0.4 else word for word in text.split(" ")
    ]
    text = " ".join(words)
    if rng.random() < 0.2:
        text = text[0].upper() + text[1:]
    if rng.random() < 0.2:
        text += "."
    return text


def _wording(rng: np.random.Generator, pair: Pair) -> str:
    edit, scene = pair.edit, pair.source

    def say(templates: tuple[str, ...], **parts: str) -> str:
        return str(rng.choice(templates)).format(**parts)

    if edit.kind == "background":
        value = str(edit.value)
        return say(GROUND_TEXTURE, texture=value) if value in TEXTURES else say(GROUND_COLOR, color=value)
    if edit.kind == "add":
        return say(ADD, new=_new(rng, edit), at=_at(rng, str(edit.value)))
    assert edit.index is not None
    thing, value = refer(rng, scene, edit.index), str(edit.value)
    match edit.kind:
        case "recolor":
            return say(RECOLOR, thing=thing, color=value)
        case "remove":
            return say(REMOVE, thing=thing)
        case "move":
            return say(MOVE, thing=thing, place=f"the {value}", at=_at(rng, value))
        case "resize":
            order = list(RADII)
            steps = order.index(value) - order.index(scene.things[edit.index].size)
            if abs(steps) == 1 and rng.random() < 0.4:
                return say(LARGER if steps > 0 else SMALLER, thing=thing)
            return say(RESIZE, thing=thing, size=value)
        case "shape":
            return say(SHAPE, thing=thing, shape=value)
        case "swap":
            assert edit.other is not None
            return say(SWAP, thing=thing, other=refer(rng, scene, edit.other))
    raise ValueError(f"no kind of edit {edit.kind!r}")


def refer(rng: np.random.Generator, scene: Scene, index: int) -> str:
    """Return words that identify one thing of a scene: colour and shape, or one of them if that is enough."""
    thing = scene.things[index]
    others = [other for number, other in enumerate(scene.things) if number != index]
    if rng.random() < 0.3:
        ways = []
        if all(other.shape != thing.shape for other in others):
            ways.append(f"the {thing.shape}")
        if all(other.color != thing.color for other in others):
            ways += [f"the {thing.color} shape", f"the {thing.color} one"]
        if ways:
            return str(rng.choice(ways))
    return f"the {thing.color} {thing.shape}"


def _new(rng: np.random.Generator, edit: Edit) -> str:
    assert edit.thing is not None
    size, color, shape = edit.thing.size, edit.thing.color, edit.thing.shape
    if size == "medium" and rng.random() < 0.5:  # medium is the default
        article = "an" if color[0] in "aeiou" else "a"
        return f"{article} {color} {shape}"
    return f"a {size} {color} {shape}"


def _at(rng: np.random.Generator, cell: str) -> str:
    if cell == "center":
        return "in the center"
    return f"{rng.choice(('at', 'in'))} the {cell}"
