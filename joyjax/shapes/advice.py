"""What the demo model can do, and notes on requests outside of its training domain."""

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
CLOSE = 32  # in levels of 255: largest distance of a pixel from the nearest colour of the domain
KNOWN_SHARE = 0.93  # smallest share of such pixels in a picture


def advice(prompt: str, pictures: tuple[Image.Image, ...]) -> list[str]:
    """Return notes for a user whose prompt or pictures are outside of the demo's training domain."""
    found = []
    words = re.findall(r"[^\W\d_]+|\d+", prompt.lower())
    strange = [word for word in dict.fromkeys(words) if word not in vocabulary()]
    if strange or not words:
        problem = f"never saw the words {', '.join(map(repr, strange[:5]))}" if strange else "was given no words"
        found.append(f"the demo {problem}: expect nonsense; {ASK}")
    if not pictures:
        found.append("the demo only edits pictures, it does not generate them: give one with --image")
    for picture in pictures:
        if known_share(picture) < KNOWN_SHARE:
            found.append(
                "this picture is outside of the demo's training domain, flat coloured shapes on a plain or patterned "
                "background: expect a wrong result; try examples/shapes.png"
            )
        elif picture.width != picture.height:
            found.append(
                f"the demo is trained on {SIDE} × {SIDE} pictures; this one is {picture.width} × {picture.height}"
            )
    return found


@functools.cache
def vocabulary() -> frozenset[str]:
    """Return all words of the demo's training instructions."""
    templates = [text for value in vars(wording).values() if isinstance(value, tuple) for text in value]
    names = [*COLORS, *GROUNDS, *SHAPES, *RADII, *TEXTURES, *CELLS, "shape one a an the at in"]
    synonyms = [word for words in wording.SYNONYMS.values() for word in words]
    text = " ".join([re.sub(r"\{\w+\}", " ", " ".join(templates)), *names, *synonyms])
    return frozenset(re.findall(r"\w+", text.lower()))


def known_share(picture: Image.Image) -> float:
    """Return the share, 0 to 1, of a picture's pixels that are near a colour of shapes or backgrounds."""
    pixels = np.asarray(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR), np.float32).reshape(
        -1, 3
    )
    base = np.array([*COLORS.values(), *GROUNDS.values()], np.float32)
    grounds = np.array(list(GROUNDS.values()), np.float32)
    palette = np.concatenate([base, grounds + RELIEF, grounds - RELIEF])
    distance = np.sqrt(((pixels[:, None] - palette[None]) ** 2).sum(axis=-1)).min(axis=1)
    return float((distance <= CLOSE).mean())
