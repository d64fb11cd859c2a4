"""A part of a converted folder: an Orbax checkpoint of a flat dict {path: array}.

`orbax.checkpoint.StandardCheckpointer().restore(part)` opens it. The manifest lists the arrays of each part
(manifest.py).
"""

import contextlib
import hashlib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from joyjax.convert import array_files
from joyjax.convert.array_files import in_files
from joyjax.convert.blocks import aligned
from joyjax.convert.host_memory import give_back
from joyjax.convert.manifest import Told
from joyjax.convert.rules import Shape
from joyjax.errors import CheckpointError
from joyjax.reading import parse_json, quoted

CHUNK_BYTES = 2**23  # the largest chunk; a read fetches whole chunks
FEW = 64  # longest axis that is cut: Orbax cuts it into single entries


def write_part(folder: Path, arrays: Mapping[str, np.ndarray], axes: Mapping[str, int]) -> None:
    """Write one Orbax checkpoint; the system may still hold it in memory. `axes`: those that devices split, by path.

    Not compressed: compression takes three times as long and saves a fifth. The folder's name says whether each array
    has a file of its own (array_files.py).

    Raises:
        CheckpointError: if it cannot be written, for example to a full disk.
    """
    if in_files(folder.name):
        try:
            array_files.write(folder, arrays)
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be written ({error.strerror or error})") from error
        return
    import orbax.checkpoint as ocp

    how = {}
    for path, array in arrays.items():
        cut = array.nbytes > CHUNK_BYTES and array.shape[axes[path]] <= FEW
        how[path] = ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(axes[path],) if cut else ())
    try:
        # Not StandardCheckpointer, which is asynchronous: after a failure its threads keep running and print to stderr.
        with (
            _quiet(),
            ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False)) as checkpointer,
        ):
            checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(dict(arrays), save_args=how))
    except Exception as error:  # Orbax raises bare ones too
        raise CheckpointError(f"{folder} cannot be written ({_reason(error)})") from error
    finally:
        give_back()


def read_part(folder: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Read one Orbax checkpoint; `wanted` has the shape, dtype and sharding of each array, or a NumPy array to fill.

    Raises:
        CheckpointError: if it cannot be read.
    """
    import orbax.checkpoint as ocp

    _check_chunks(folder, {path: tuple(array.shape) for path, array in wanted.items()})
    # Every process reads independently; by default Orbax synchronises all processes.
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(me, {me}, f"process_{me}")
    try:
        with _quiet(), ocp.StandardCheckpointer(multiprocessing_options=alone) as checkpointer:
            return checkpointer.restore(folder.absolute(), dict(wanted))
    except Exception as error:  # see `write_part`
        raise CheckpointError(f"{folder} cannot be read; convert the model again ({_reason(error)})") from error
    finally:
        give_back()


def _check_chunks(folder: Path, shapes: Mapping[str, Shape]) -> None:
    """Check the chunks of arrays before they are read: TensorStore allocates the size that a chunk claims."""
    import tensorstore as ts

    try:
        store = ts.KvStore.open(
            {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder.absolute()}/"}}
        ).result()
        found = {path: parse_json(store.read(f"{path}/.zarray").result().value) for path in shapes}
    except (ValueError, TypeError) as error:  # TensorStore's are ValueErrors
        raise CheckpointError(f"{folder} cannot be read; convert the model again ({_reason(error)})") from error
    for path, raw in found.items():
        shape, chunks = shapes[path], raw.get("chunks")
        if raw.get("shape") != list(shape):
            raise CheckpointError(
                f"{folder} cannot be read; convert the model again ({path} is stored with the shape "
                f"{quoted(raw.get('shape'))}; expected {list(shape)})"
            )
        fit = (
            isinstance(chunks, list)
            and len(chunks) == len(shape)
            and all(
                type(chunk) is int and 1 <= chunk <= max(1, size) for chunk, size in zip(chunks, shape, strict=True)
            )
        )
        if not fit or raw.get("compressor") is not None or raw.get("filters") is not None:
            raise CheckpointError(
                f"{folder} cannot be read; convert the model again ({path} is stored in chunks of {quoted(chunks)}, "
                f"compressed by {quoted(raw.get('compressor'))}; expected at most {list(shape)}, not compressed)"
            )


def compare_part(folder: Path, arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Read a part and compare it with the arrays that were written; return their digests.

    Raises:
        CheckpointError: for the first array that differs.
    """
    if in_files(folder.name):
        return {path: array_files.compare(folder, path, array) for path, array in arrays.items()}
    told = {path: (array.shape, str(array.dtype), digest(array)) for path, array in arrays.items()}
    check_part(folder, told)
    return {path: sha256 for path, (_, _, sha256) in told.items()}


def check_part(folder: Path, held: Told) -> None:
    """Read a part and compare it with the expected arrays.

    Raises:
        CheckpointError: for the first array that differs.
    """
    if in_files(folder.name):
        found = {
            path: (shape, dtype, array_files.digest(folder, path, shape, dtype))
            for path, (shape, dtype, _) in held.items()
        }
    else:
        wanted = {path: aligned(shape, np.dtype(dtype)) for path, (shape, dtype, _) in held.items()}
        read = read_part(folder, wanted)
        found = {path: (array.shape, str(array.dtype), digest(array)) for path, array in read.items()}
    for path, expected in held.items():
        if found[path] != expected:
            raise array_files.not_as_written(folder, path)


def digest(array: np.ndarray) -> str:
    """Return the SHA-256 of an array's bytes, row by row."""
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


def _reason(error: Exception) -> str:
    code = re.search("os_error_code='([0-9]+)'", str(error))  # in TensorStore's message, which is long
    return os.strerror(int(code[1])) if code else str(error).partition("\n")[0][:200]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Orbax from logging the errors of its threads with tracebacks; it raises them too."""
    logger = logging.getLogger("absl")

    def silent(record: logging.LogRecord) -> bool:  # of this call alone: two threads may be here
        return False

    logger.addFilter(silent)
    try:
        yield
    finally:
        logger.removeFilter(silent)
