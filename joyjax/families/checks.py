"""Checks that families share: the tokenizer, consistency of a checkpoint's parts, and sizes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from joyjax.errors import CheckpointError, RequestError
from joyjax.media.image import Size
from joyjax.processors.text import Tokenizer, control_token, load_tokenizer
from joyjax.processors.tokenizer import check_tokenizer
from joyjax.processors.vision import VisionProcessorConfig

Pairs = tuple[tuple[str, str, Any, str, Any], ...]


def check_equal(folder: Path, pairs: Pairs) -> None:
    """Compare values of two parts: (file, key, value, name of the expected value, expected value).

    Raises:
        CheckpointError: for the first pair that differs.
    """
    for file, key, value, other, expected in pairs:
        if value != expected:
            raise CheckpointError(f"{folder / file}: {key} is {value}, but {other} is {expected}; is this one model?")


def vision_pairs(tokenizer: Tokenizer, processor: VisionProcessorConfig, encoder: Any) -> Pairs:
    """Return the pairs for `check_equal` of a text encoder that reads pictures, the tokenizer and the processor."""
    image, tower = control_token(tokenizer, "<|image_pad|>"), encoder.vision
    file = "processor/preprocessor_config.json"
    return (
        ("text_encoder/config.json", "image_token_id", encoder.image_token_id, "the tokenizer's <|image_pad|>", image),
        (file, "patch_size", processor.patch_size, "the vision tower's", tower.patch_size),
        (
            file,
            "temporal_patch_size",
            processor.temporal_patch_size,
            "the vision tower's",
            tower.temporal_patch_size,
        ),
        (
            file,
            "merge_size",
            processor.merge_size,
            "the vision tower's spatial_merge_size",
            tower.spatial_merge_size,
        ),
    )


def open_tokenizer(folder: Path, vocab_size: int, template: Callable[[Tokenizer], object]) -> Tokenizer:
    """Read a tokenizer's folder; `template` builds a prompt with every control token of the chat template.

    Raises:
        CheckpointError: if a file is damaged, a control token is missing, or the text encoder has fewer tokens.
    """
    check_tokenizer(folder)
    tokenizer = load_tokenizer(folder)
    try:
        template(tokenizer)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    tokens = 1 + max(tokenizer.get_vocab().values())  # ids may have gaps
    if tokens > vocab_size:
        raise CheckpointError(f"{folder} has {tokens} tokens; the text encoder {vocab_size}")
    return tokenizer


def check_sides(size: Size, sides: Size, option: str) -> None:
    """Raise RequestError unless a size is a multiple of `sides`, the height and width of a token in pixels."""
    height, width = size
    if height % sides[0] or width % sides[1]:
        fit = [max(1, round(length / side)) * side for length, side in zip(size, sides, strict=True)]
        raise RequestError(
            f"height is {height} and width is {width}; {option} needs multiples of {sides[0]} and {sides[1]}: "
            f"the nearest are height {fit[0]} and width {fit[1]}"
        )
