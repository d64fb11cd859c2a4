"""The parts of a converted folder whose arrays are in files of their own: what is large, and lies as it is needed.

    files-00007/blocks.3.img.qkv.kernel/.zarray      the shape and dtype
    files-00007/blocks.3.img.qkv.kernel/0.0.0.0      the bytes, in C order

This is an Orbax checkpoint of Zarr arrays with one chunk each, not compressed, and Orbax reads it like any other part.
Here the files are written and read directly: through TensorStore every byte is copied several times.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

from joyjax.convert.blocks import Source
from joyjax.convert.rules import Shape
from joyjax.errors import CheckpointError
from joyjax.reading import quoted, read_json, stamp

PREFIX = "files-"
LARGE = 2**20  # bytes of the parameters that are stored so


def in_files(part: str) -> bool:
    """Return whether the arrays of a part have files of their own, by its name."""
    return part.startswith(PREFIX)


def source(folder: Path, path: str, shape: Shape, dtype: str) -> Source:
    """Return the file of an array of the part `folder`.

    Raises:
        CheckpointError: if it is missing or not an array of this shape and dtype.
    """
    file = _chunk(folder, path, len(shape))
    expected = {"shape": list(shape), "chunks": list(shape), "order": "C", "compressor": None, "filters": None}
    try:
        raw = read_json(folder / path / ".zarray")
        found = stamp(file)
    except OSError as error:
        raise _damaged(folder, f"{path}: {error.strerror or error}") from None
    wrong = {key: raw.get(key) for key, value in expected.items() if raw.get(key) != value}
    if raw.get("dtype") not in (dtype, np.dtype(dtype).str):
        wrong["dtype"] = raw.get("dtype")
    if wrong:
        said = ", ".join(f"{key} {quoted(value)}" for key, value in wrong.items())
        raise _damaged(folder, f"{path} is stored with {said}; expected {dtype} {list(shape)} in one chunk")
    where = Source(file, 0, np.dtype(dtype), tuple(shape), found)
    if found[2] != where.nbytes:
        raise _damaged(folder, f"{path} has {found[2]} bytes; expected {where.nbytes}")
    return where


def stand_in(array: np.ndarray) -> np.ndarray:
    """Return an array of one entry, which Orbax writes in place of a large one: `write` replaces it."""
    return np.zeros((1,) * array.ndim, array.dtype)


def write(folder: Path, path: str, array: np.ndarray) -> None:
    """Write an array, in C order, in place of its stand-in in the part `folder`.

    Raises:
        OSError: if it cannot be written.
    """
    header, size = folder / path / ".zarray", list(array.shape)
    header.write_text(json.dumps(read_json(header) | {"shape": size, "chunks": size}), encoding="utf-8")
    with _chunk(folder, path, array.ndim).open("wb", buffering=0) as opened:
        rest = array.reshape(-1).view(np.uint8).data
        while rest:
            rest = rest[opened.write(rest) :]


def digest(folder: Path, path: str, shape: Shape, dtype: str) -> str:
    """Return the SHA-256 of the bytes of an array of the part `folder`, read from its file.

    Raises:
        CheckpointError: if it is missing or not an array of this shape and dtype, or cannot be read.
    """
    where = source(folder, path, shape, dtype)
    try:
        with where.file.open("rb", buffering=0) as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise _damaged(folder, f"{path}: {error.strerror or error}") from None


def _chunk(folder: Path, path: str, axes: int) -> Path:
    return folder / path / ".".join(["0"] * max(1, axes))


def fill(where: Source, target: np.ndarray, ranges: list[range], **options: object) -> bool:
    """Fill `target` as `Source.fill` does.

    Raises:
        CheckpointError: if the file cannot be read, or has changed.
    """
    try:
        return where.fill(target, ranges, **options)  # type: ignore[arg-type]
    except OSError as error:
        raise _damaged(where.file.parent.parent, f"{where.file.parent.name}: {error.strerror or error}") from None


def _damaged(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{folder} cannot be read; convert the model again ({what})")
