"""What the demo model can do, in words, and where a request leaves what it has learned."""

import functools
import re

import numpy as np
from PIL import Image

from joyjax.shapes import wording
from joyjax.shapes.draw import RELIEF
from joyjax.shapes.scene import CELLS, COLORS, GROUNDS, RADII, SHAPES, SIDE, TEXTURES

ABOUT = "the bundled demo model edits flat coloured shapes only; --model names another"
ASK = (
    'it understands "make the red circle blue", "remove …", "add a small yellow star at the top left", "move … to the '
    'center", "make … large", "swap … and …", "make the background mint", "turn … into a heart"'
)
CLOSE = 32  # in levels of 255: how far a pixel may be from the nearest colour of the world
KNOWN_SHARE = 0.93  # of a picture's pixels


def advice(prompt: str, pictures: tuple[Image.Image, ...]) -> list[str]:
    """Return what to tell a user whose prompt or picture is far from what the demo learned; nothing where it is not."""
    found = []
    words = re.findall(r"[^\W\d_]+|\d+", prompt.lower())
    strange = [word for word in dict.fromkeys(words) if word not in vocabulary()]
    if strange or not words:
        said = f"never saw the words {', '.join(map(repr, strange[:5]))}" if strange else "was given no words"
        found.append(f"the demo {said}: expect nonsense; {ASK}")
    if not pictures:
        found.append("the demo learned to edit, not to make pictures from nothing: give one with --image")
    for picture in pictures:
        if known_share(picture) < KNOWN_SHARE:
            found.append(
                "this picture is not of the kind that the demo learned, flat coloured shapes on a plain or patterned "
                "background: expect it to come out wrong; try examples/shapes.png"
            )
        elif picture.width != picture.height:
            found.append(
                f"the demo learned square pictures, {SIDE} × {SIDE}; this one is {picture.width} × {picture.height}"
            )
    return found


@functools.cache
def vocabulary() -> frozenset[str]:
    """Return every word of the instructions that the demo was trained on."""
    templates = [text for value in vars(wording).values() if isinstance(value, tuple) for text in value]
    names = [*COLORS, *GROUNDS, *SHAPES, *RADII, *TEXTURES, *CELLS, "shape one a an the at in"]
    synonyms = [word for words in wording.SYNONYMS.values() for word in words]
    text = " ".join([re.sub(r"\{\w+\}", " ", " ".join(templates)), *names, *synonyms])
    return frozenset(re.findall(r"\w+", text.lower()))


def known_share(picture: Image.Image) -> float:
    """Return the share of a picture's pixels that are near a colour of shapes or backgrounds; 0 to 1."""
    pixels = np.asarray(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR), np.float32).reshape(
        -1, 3
    )
    base = np.array([*COLORS.values(), *GROUNDS.values()], np.float32)
    grounds = np.array(list(GROUNDS.values()), np.float32)
    palette = np.concatenate([base, grounds + RELIEF, grounds - RELIEF])
    distance = np.sqrt(((pixels[:, None] - palette[None]) ** 2).sum(axis=-1)).min(axis=1)
    return float((distance <= CLOSE).mean())
