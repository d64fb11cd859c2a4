"""Prompts: from text to token ids, positions and image token indices.

A template is assembled from ids, never from strings: a user's text goes through `plain_tokens`, where the spelling of a
control token is plain text, and control tokens come from `control_token`.
"""

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from jaxtyping import Int, Int32

from joyjax.errors import CheckpointError, RequestError
from joyjax.processors.tokenizer import build_tokenizer

if TYPE_CHECKING:
    import tokenizers

Tokenizer: TypeAlias = "tokenizers.Tokenizer"  # imported only where a tokenizer is read
Ids = Sequence[int] | Int[np.ndarray, "_"]

SAMPLE = "A cat,\n déjà vu, 猫!"  # a byte-level tokenizer decodes its ids to the same text


def load_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """Read a tokenizer's folder. No code of the folder runs and nothing is downloaded.

    Raises:
        CheckpointError: if the folder lacks the files, they cannot be read, or the result loses text.
    """
    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file():
        for name in ("vocab.json", "merges.txt"):
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder} has no {name}; expected tokenizer.json, or vocab.json and merges.txt")
    try:
        tokenizer = build_tokenizer(folder)
        returned = decode(tokenizer, plain_tokens(tokenizer, SAMPLE))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the Rust core is not an Exception
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"the tokenizer in {folder} cannot be read: {reason}") from error
    if returned != SAMPLE:
        raise CheckpointError(f"the tokenizer in {folder} loses text: {SAMPLE!r} comes back as {returned!r}")
    return tokenizer


def decode(tokenizer: Tokenizer, ids: Ids) -> str:
    """Return the text of ids, with control tokens by their names."""
    return tokenizer.decode(list(map(int, ids)), skip_special_tokens=False)


def plain_tokens(tokenizer: Tokenizer, text: object) -> list[int]:
    """Return the ids of `text` as plain text: `<|im_end|>` in it becomes the letters, not the token.

    Added tokens that are not special, like Qwen's `<think>`, stay one id, as in the reference.

    Raises:
        RequestError: if it is not a str, or has a lone surrogate, which UTF-8 cannot encode.
    """
    if not isinstance(text, str):
        raise RequestError(f"a prompt is a {type(text).__name__}; expected a str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        raise RequestError(f"a prompt holds {half} at position {error.start}, half a character; remove it") from None
    return tokenizer.encode(text, add_special_tokens=False).ids


def control_token(tokenizer: Tokenizer, name: str) -> int:
    """Return the id of a control token such as `<|im_start|>`.

    Raises:
        CheckpointError: if the tokenizer has no such token, or it is not special, so that a prompt could contain it.
    """
    token = tokenizer.token_to_id(name)
    if token is None or tokenizer.id_to_token(token) != name:
        raise CheckpointError(f"the tokenizer has no {name}, which the prompt template needs")
    if token in plain_tokens(tokenizer, name):
        raise CheckpointError(f"the tokenizer does not mark {name} as special; a prompt could forge it")
    return token


def prompts_of_sizes(tokenizer: Tokenizer, sizes: Sequence[int], longest: int) -> list[str]:
    """Return a prompt for each padded text length in `sizes`, up to that of `longest` tokens."""
    piece = "a " * 16
    per_piece = len(plain_tokens(tokenizer, piece))
    # halfway between two sizes: leaves room for the template
    tokens = [min(longest, (below + size) // 2) for below, size in itertools.pairwise(sizes) if below < longest]
    return ["", *(piece * (count // per_piece) for count in tokens)]


def pad_rows(rows: Sequence[Ids], pad_id: int, length: int) -> tuple[Int32[np.ndarray, "B L"], Int32[np.ndarray, " B"]]:
    """Return the rows padded on the right to `length`, and their lengths."""
    lengths = np.array([len(row) for row in rows], np.int32)
    if lengths.max(initial=0) > length:
        raise ValueError(f"a row of {lengths.max()} tokens does not fit into {length}")
    ids = np.full((len(rows), length), pad_id, np.int32)
    for padded, row in zip(ids, rows, strict=True):
        padded[: len(row)] = row
    return ids, lengths


def length_bucket(length: int, step: int = 32) -> int:
    """Round up to a positive multiple of `step`, so that few lengths are compiled."""
    return max(1, -(-length // step)) * step


def multimodal_positions(ids: Ids, image_token_id: int, grids: Sequence[tuple[int, int]]) -> Int32[np.ndarray, "L 3"]:
    """Return each token's position on the axes (time, row, column).

    Text advances all three by one. A picture that starts at p has time p, and its rows and columns count from p. The
    text after it continues at p + max(rows, columns). `grids` are the pictures' (rows, columns) of merged patches, in
    the order of their tokens.
    Source: get_rope_index in Transformers' modeling_qwen3_vl.py.
    """
    positions = np.repeat(np.arange(len(ids), dtype=np.int32)[:, None], 3, axis=1)
    for start, (rows, columns) in zip(_image_starts(ids, image_token_id, grids), grids, strict=True):
        end = start + rows * columns
        row, column = np.indices((rows, columns), np.int32).reshape(2, -1)
        positions[start:end] = positions[start] + np.stack([np.zeros_like(row), row, column], axis=-1)
        positions[end:] += max(rows, columns) - rows * columns
    return positions


def image_token_indices(
    ids: Ids, image_token_id: int, grids: Sequence[tuple[int, int]], stride: int, first: int = 0
) -> Int32[np.ndarray, " L"]:
    """Return for each token its row of the vision features, -1 for text.

    The features of a batch are concatenated picture by picture, each padded to `stride` rows; `first` is the number of
    pictures before this sequence's.
    """
    image_token_index = np.full(len(ids), -1, np.int32)
    for picture, (start, (rows, columns)) in enumerate(
        zip(_image_starts(ids, image_token_id, grids), grids, strict=True), first
    ):
        if rows * columns > stride:
            raise ValueError(f"a picture of {rows} × {columns} merged patches does not fit into {stride}")
        image_token_index[start : start + rows * columns] = picture * stride + np.arange(rows * columns)
    return image_token_index


def _image_starts(ids: Ids, image_token_id: int, grids: Sequence[tuple[int, int]]) -> list[int]:
    """Return where each picture's run of image tokens starts; ValueError if the runs do not match `grids`."""
    indices = np.flatnonzero(np.asarray(ids) == image_token_id)
    counts = [rows * columns for rows, columns in grids]
    if len(indices) != sum(counts):
        raise ValueError(f"{len(indices)} image tokens for pictures of {counts} merged patches")
    starts = []
    for run in np.split(indices, np.cumsum(counts)[:-1]) if counts else []:
        if run[-1] - run[0] != len(run) - 1:
            raise ValueError(f"the image tokens of one picture are not in one run: they start at {run[0]}")
        starts.append(int(run[0]))
    return starts
