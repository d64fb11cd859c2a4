"""Checks that families share: consistency of a checkpoint's parts, sizes, and given noise."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from joyjax.errors import CheckpointError, RequestError
from joyjax.families.request import Request
from joyjax.layers.patch import patchify
from joyjax.media.image import Size


def check_equal(folder: Path, pairs: Iterable[tuple[str, str, Any, str, Any]]) -> None:
    """Compare values of two parts: (file, key, value, name of the expected value, expected value).

    Raises:
        CheckpointError: for the first pair that differs.
    """
    for file, key, value, other, expected in pairs:
        if value != expected:
            raise CheckpointError(f"{folder / file}: {key} is {value}, but {other} is {expected}; is this one model?")


def check_vocabulary(folder: Path, tokenizer: Any, vocab_size: int) -> None:
    """Raise CheckpointError if a tokenizer has more tokens than the text encoder."""
    tokens = 1 + max(tokenizer.get_vocab().values())  # ids may have gaps
    if tokens > vocab_size:
        raise CheckpointError(f"{folder} has {tokens} tokens; the text encoder {vocab_size}")


def check_sides(size: Size, sides: Size, option: str) -> None:
    """Raise RequestError unless a size is a multiple of `sides`, the height and width of a token in pixels."""
    height, width = size
    if height % sides[0] or width % sides[1]:
        fit = [max(1, round(length / side)) * side for length, side in zip(size, sides, strict=True)]
        raise RequestError(
            f"height is {height} and width is {width}; {option} needs multiples of {sides[0]} and {sides[1]}: "
            f"the nearest are height {fit[0]} and width {fit[1]}"
        )


def check_noise(request: Request, shape: tuple[int, ...], size: Size) -> None:
    """Raise RequestError if given noise does not have the shape for a result of this size."""
    if request.noise is not None and request.noise.shape != shape:
        raise RequestError(
            f"noise has shape {request.noise.shape}; a {size[0]}×{size[1]} result needs {shape}: "
            "batch, height, width, channels"
        )


def noise_tokens(noise: np.ndarray, patch: tuple[int, int], padded: int) -> np.ndarray:
    """Return noise, `[1, height, width, channels]`, as padded tokens."""
    tokens = patchify(noise, patch)
    return np.pad(tokens, ((0, 0), (0, padded - tokens.shape[1]), (0, 0)))
