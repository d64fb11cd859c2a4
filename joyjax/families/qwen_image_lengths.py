"""Padded lengths of Qwen-Image's edits: few programs for all sizes of pictures and all prompts.

Pictures have about `base_size`² pixels, whatever their shape, so their tokens differ by a few percent. A result has the
size of its picture (`natural`) or a given one. With a given size the other lengths are padded further, so that it is
the target alone whose classes multiply the programs.
"""

from collections.abc import Sequence

from joyjax.families.qwen_image_stages import token_class
from joyjax.media.image import Size

PARTS = 16  # of the tokens of a square of the base size: the step of the classes of natural sizes
TEXT_SIZES = 256, 512  # kept hidden states: the first class, and the step of all others
GIVEN_CLASSES = 4  # padded token counts between a power of two and the next, of given sizes
WINDOW_CLASSES = 4


def target(tokens: int, usual: int, *, natural: bool) -> int:
    """Return the padded tokens of a target; `usual` are those of a square of the base size."""
    return _near(tokens, usual, usual // PARTS) if natural else token_class(tokens, GIVEN_CLASSES)


def references(tokens: int, pictures: int, usual: int, *, natural: bool) -> int:
    """Return the padded tokens of all references."""
    step = usual * pictures // PARTS
    return _near(tokens, usual * pictures + (0 if natural else step), step)


def text(states: int, pictures: int, *, natural: bool) -> int:
    """Return the padded hidden states of a prompt with its pictures."""
    first, step = TEXT_SIZES
    if not natural:
        step *= 2 * -(-pictures // 2)  # a small part of the whole beside several pictures
    elif states <= first:
        return first
    return -(-states // step) * step


def windows(grids: Sequence[Size], window: int) -> int:
    """Return the padded windows of each picture in the vision tower; `grids` are in tokens of the text encoder."""
    most = max(-(-rows // window) * -(-columns // window) for rows, columns in grids)
    return token_class(most, WINDOW_CLASSES)


def fewest(side: int, token: int) -> int:
    """Return a number of tokens, of `token`² pixels, that all but very thin pictures of `side`² pixels exceed.

    The text encoder computes the prefix of template and pictures once for both prompts, and its length compiles a
    program, so it must not be that of one shape.
    """
    return int(0.8 * (side / token) ** 2)


def _near(tokens: int, least: int, step: int) -> int:
    """Return the next multiple of `step`, at least `least`."""
    step = max(1, step)
    return max(least, -(-tokens // step) * step)
