"""The parts of a converted folder whose arrays are in files of their own: what is large, and lies as it is needed.

    files-00007/blocks.3.img.qkv.kernel/.zarray      the shape and dtype
    files-00007/blocks.3.img.qkv.kernel/0.0.0.0      the bytes, in C order

This is an Orbax checkpoint of Zarr arrays with one chunk each, not compressed, and Orbax reads it like any other part.
Here the files are written and read directly: through TensorStore every byte is copied several times.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from joyjax.convert.blocks import BLOCK_BYTES, Source
from joyjax.convert.rules import Shape
from joyjax.errors import CheckpointError
from joyjax.reading import quoted, read_json, stamp

PREFIX = "files-"
LARGE = 2**20  # bytes of the parameters that are stored so
CONSTANT_HEADER = {"dimension_separator": ".", "fill_value": None, "zarr_format": 2}
CONSTANT_METADATA = {
    "use_ocdbt": False,
    "use_zarr3": False,
    "store_array_data_equal_to_fill_value": True,
    "custom_metadata": None,
}
HANDLER = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"


def in_files(part: str) -> bool:
    """Return whether the arrays of a part have files of their own, by its name."""
    return part.startswith(PREFIX)


def source(folder: Path, path: str, shape: Shape, dtype: str) -> Source:
    """Return the file of an array of the part `folder`.

    Raises:
        CheckpointError: if it is missing or not an array of this shape and dtype.
    """
    file = _chunk(folder, path, len(shape))
    expected = _header(shape)
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


def write(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write the part `folder`, which does not exist yet, from contiguous arrays.

    The two files beside the arrays hold what Orbax 0.12 writes for a flat dict, without times.

    Raises:
        OSError: if it cannot be written.
    """
    folder.mkdir()
    tree = {
        str((path,)): {
            "key_metadata": [{"key": path, "key_type": 2}],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
        for path in arrays
    }
    metadata = {"tree_metadata": tree, **CONSTANT_METADATA}
    (folder / "_METADATA").write_text(json.dumps(metadata), encoding="utf-8")
    (folder / "_CHECKPOINT_METADATA").write_text(json.dumps({"item_handlers": HANDLER}), encoding="utf-8")
    for path, array in arrays.items():
        (folder / path).mkdir()
        header = _header(array.shape) | {"dtype": _zarr_dtype(array.dtype), **CONSTANT_HEADER}
        (folder / path / ".zarray").write_text(json.dumps(header), encoding="utf-8")
        with _chunk(folder, path, array.ndim).open("wb", buffering=0) as opened:
            for block in _blocks(array):
                while block:
                    block = block[opened.write(block) :]


def compare(folder: Path, path: str, array: np.ndarray) -> str:
    """Compare the file of an array with the array that was written, byte by byte; return the SHA-256 of both.

    Raises:
        CheckpointError: if they differ, or the file is missing or cannot be read.
    """
    where, found = source(folder, path, array.shape, str(array.dtype)), hashlib.sha256()
    scratch = np.empty(BLOCK_BYTES, np.uint8)
    try:
        with where.file.open("rb") as opened:
            for block in _blocks(array):
                read = scratch[: len(block)]
                if opened.readinto(read.data) != len(block) or not np.array_equal(read, np.frombuffer(block, np.uint8)):
                    raise not_as_written(folder, path)
                found.update(block)
    except OSError as error:
        raise _damaged(folder, f"{path}: {error.strerror or error}") from None
    return found.hexdigest()


def digest(folder: Path, path: str, shape: Shape, dtype: str) -> str:
    """Return the SHA-256 of the bytes of an array of the part `folder`, read from its file.

    Raises:
        CheckpointError: if it is missing or not an array of this shape and dtype, or cannot be read.
    """
    where = source(folder, path, shape, dtype)
    try:
        with where.file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise _damaged(folder, f"{path}: {error.strerror or error}") from None


def _blocks(array: np.ndarray) -> Iterator[memoryview]:
    """Yield the bytes of a contiguous array in blocks."""
    raw = array.reshape(-1).view(np.uint8).data
    return (raw[start : start + BLOCK_BYTES] for start in range(0, len(raw), BLOCK_BYTES))


def _header(shape: Shape) -> dict[str, Any]:
    """Return what the header of an array says of its layout."""
    return {"shape": list(shape), "chunks": list(shape), "order": "C", "compressor": None, "filters": None}


def _zarr_dtype(dtype: np.dtype) -> str:
    """Return the name of a dtype in a header: NumPy's, or TensorStore's for a dtype that NumPy lacks."""
    return dtype.str if dtype.isbuiltin == 1 else str(dtype)


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


def not_as_written(folder: Path, path: str) -> CheckpointError:
    """Return the error of an array that reads back otherwise."""
    return CheckpointError(f"{folder}: {path} is not what was written; is the disk sound? Convert it again")


def _damaged(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{folder} cannot be read; convert the model again ({what})")
