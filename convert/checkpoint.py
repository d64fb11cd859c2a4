"""The parts of a converted folder: Orbax checkpoints of flat dicts {path: array}.

A part is a complete checkpoint: `orbax.checkpoint.StandardCheckpointer().restore(part)` opens it. The manifest lists
the arrays of each part (manifest.py).
"""

import contextlib
import dataclasses
import functools
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from joyjax.convert.component import Component
from joyjax.convert.finite import all_finite, all_finite_on_device
from joyjax.convert.host_memory import freeing, give_back
from joyjax.convert.manifest import MANIFEST, Manifest, Piece, Stored, Told, parts
from joyjax.convert.rules import Shape, raise_faults
from joyjax.convert.stream import Progress
from joyjax.dtypes import STORED
from joyjax.errors import CheckpointError
from joyjax.layers.stored import (
    Storage,
    array_leaves,
    filled_with_arrays,
    own_places,
    places,
    storable,
    storage_faults,
    with_storage,
)
from joyjax.layers.weights import Weights, leaves
from joyjax.reading import parse_json, quoted
from joyjax.sharding.build import build
from joyjax.sharding.place import parameter_sharding
from joyjax.storage import forms
from joyjax.storage.quantize import quantize_array

CHUNK_BYTES = 2**23  # the largest chunk; a read fetches whole chunks
FEW = 64  # longest axis that is cut: Orbax cuts it into single entries


def write_part(folder: Path, arrays: Mapping[str, np.ndarray], axes: Mapping[str, int]) -> None:
    """Write one Orbax checkpoint; returns when it is on disk. `axes` are the axes that devices split, by path.

    Not compressed: compression takes three times as long and saves a fifth.

    Raises:
        CheckpointError: if it cannot be written, for example to a full disk.
    """
    import orbax.checkpoint as ocp

    how = {}
    for path, array in arrays.items():
        cut = array.nbytes > CHUNK_BYTES and array.shape[axes[path]] <= FEW
        how[path] = ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(axes[path],) if cut else ())
    try:
        # Not StandardCheckpointer, which is asynchronous: after a failure its threads keep running and print to stderr.
        with _quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False)) as checkpointer:
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


def check_part(folder: Path, held: Told) -> None:
    """Read a part and compare it with the expected arrays.

    Raises:
        CheckpointError: for the first array that differs.
    """
    wanted = {path: np.empty(shape, dtype) for path, (shape, dtype, _) in held.items()}
    for path, array in read_part(folder, wanted).items():
        shape, dtype, sha256 = held[path]
        if (array.shape, str(array.dtype)) != (shape, dtype) or digest(array) != sha256:
            raise CheckpointError(f"{folder}: {path} is not what was written; is the disk sound? Convert it again")


def digest(array: np.ndarray) -> str:
    """Return the SHA-256 of an array's bytes, row by row."""
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


@dataclasses.dataclass(frozen=True)
class ReadPlan:
    """The source of every parameter of `abstract` in the parts of one component. Shapes are checked; nothing is read.

    `parameters` are the arrays of the folder by path. A kernel that is an array there and has another form in
    `abstract` is quantized while it is read; a kernel that has the form already is read as it is.
    """

    folder: Path
    abstract: Weights
    parameters: Mapping[str, Stored]

    @property
    def nbytes(self) -> int:
        """The bytes to read."""
        return sum(stored.nbytes for stored in self.parameters.values())

    def fill(self, mesh: Mesh | None = None, progress: Progress | None = None) -> Weights:
        """Read the network: see `restore`."""
        with freeing():
            return self._fill(mesh, progress)

    def _fill(self, mesh: Mesh | None, progress: Progress | None) -> Weights:
        placed, own = places(self.abstract.state, mesh), array_leaves(self.abstract.state)
        goals = {
            path: leaf
            for path, leaf in leaves(self.abstract.state).items()
            if path in self.parameters and path not in own
        }
        arrays: dict[str, jax.Array] = {}
        done, total = 0, self.nbytes

        def wanted(path: str) -> Any:
            """Return the destination of an array: its sharding, or host memory if one device quantizes it."""
            if path not in goals:
                value = own[path].value
                return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=placed[path])
            goal, stored = goals[path], self.parameters[path]
            if mesh is None:
                return np.empty(stored.shape, stored.dtype)
            place = parameter_sharding(path, stored.shape, goal.axes, mesh)
            return jax.ShapeDtypeStruct(stored.shape, np.dtype(goal.dtype), sharding=place)

        def keep(part: str, read: dict[str, Any]) -> None:
            """Check the arrays of a part, and free each kernel once it is quantized."""
            nonlocal done
            done += sum(self.parameters[path].nbytes for path in read)
            while read:
                path, array = read.popitem()
                if not (all_finite(array) if isinstance(array, np.ndarray) else all_finite_on_device(array)):
                    place = self.folder / part
                    raise CheckpointError(
                        f"{place}: {path} holds NaN or infinity: the file is damaged; convert the model again"
                    )
                if path in goals:
                    goal = goals[path].get_value()
                    leaf = quantize_array(goal, goals[path].inputs, own_places(path, goal, placed), array)
                    arrays.update({forms.array_path(path, name): each for name, each in forms.arrays(leaf).items()})
                else:
                    arrays[path] = array
                del array
            if progress:
                progress(done, total)

        # Arrays in several pieces are concatenated in host memory; first, while little else is there.
        pieces = [path for path, stored in self.parameters.items() if len(stored.pieces) > 1]
        for path in pieces:
            if isinstance(want := wanted(path), np.ndarray):
                built: Any = self._reader(path, want.dtype)(tuple(slice(0, size) for size in want.shape))
            else:
                built = build(want.shape, want.dtype, want.sharding, self._reader(path, want.dtype))
            keep(self.parameters[path].pieces[0].part, {path: built})
            del built
        whole = {path: stored for path, stored in self.parameters.items() if path not in pieces}
        for part, held in parts(whole).items():
            keep(part, read_part(self.folder / part, {path: wanted(path) for path in held}))
        return filled_with_arrays(self.abstract, arrays)

    def _reader(self, path: str, dtype: DTypeLike) -> Callable[[tuple[slice, ...]], np.ndarray]:
        """Return a function that reads a slice of a parameter stored in several pieces."""
        stored = self.parameters[path]

        @functools.lru_cache(1)
        def read_piece(piece: Piece) -> np.ndarray:
            wanted = np.empty(stored.piece_shape(piece), stored.dtype)
            return read_part(self.folder / piece.part, {path: wanted})[path]

        def read(index: tuple[slice, ...]) -> np.ndarray:
            rows, *rest = index
            shares = []
            for piece in stored.pieces:
                start, stop = max(rows.start, piece.start), min(rows.stop, piece.stop)
                if start < stop:
                    share = read_piece(piece)[(slice(start - piece.start, stop - piece.start), *rest)]
                    shares.append(share.astype(dtype))
            return np.concatenate(shares)

        return read


def plan(folder: Path, component: Component, config: Any, dtype: DTypeLike, storage: Storage = None) -> ReadPlan:
    """Find the parameters of one component in a converted folder.

    `storage` is the form of all storable kernels; None keeps the form that each has in the folder.

    Raises:
        CheckpointError: if the manifest is missing or damaged or lacks the component, or listing all parameters and
            parts that are missing, left over, of another shape or form.
    """
    components = Manifest.read(folder).components
    if component.folder not in components:
        raise CheckpointError(
            f"{folder / MANIFEST} has no component {component.folder}, only {', '.join(components)}: "
            f"add it with joyjax convert SOURCE {folder} --component {component.folder}"
        )
    converted, place = components[component.folder], folder / component.folder
    parameters, what = converted.parameters, f"{place}: the parameters are not those of its configuration"
    plain = component.abstract(config, dtype)
    raise_faults(what, storage_faults(plain.state, converted.forms))
    held = with_storage(plain, converted.forms)
    wanted = {path: array.value for path, array in array_leaves(held.state).items()}
    formed = {path for path, array in array_leaves(held.state).items() if path != array.parameter}
    faults = [
        f"parameter {path} {list(array.shape)} is missing" for path, array in wanted.items() if path not in parameters
    ]
    for path, stored in parameters.items():
        if path not in wanted:
            faults.append(f"parameter {path} {list(stored.shape)} is not part of this network")
        elif stored.shape != tuple(wanted[path].shape):
            faults.append(f"parameter {path} has shape {list(stored.shape)}, expected {list(wanted[path].shape)}")
        elif path in formed and stored.dtype != str(np.dtype(wanted[path].dtype)):
            faults.append(f"parameter {path} is {stored.dtype}, expected {np.dtype(wanted[path].dtype)}")
        elif path not in formed and stored.dtype not in STORED:
            faults.append(f"parameter {path} is {stored.dtype}, expected {' or '.join(STORED)}")
    faults += [f"{part} is missing" for part in parts(parameters) if not (place / part).is_dir()]
    raise_faults(what, faults)
    asked = dict.fromkeys(storable(plain.state), storage) if isinstance(storage, str) else dict(storage or {})
    raise_faults(
        f"{place}: a kernel is never quantized a second time; load the folder without the option",
        [
            f"parameter {path} has the form {form}, not {asked[path]}"
            for path, form in converted.forms.items()
            if asked.get(path, form) != form
        ],
    )
    return ReadPlan(place, with_storage(plain, {**asked, **converted.forms}), parameters)


def restore(
    folder: Path,
    component: Component,
    config: Any,
    dtype: DTypeLike,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
    storage: Storage = None,
) -> Weights:
    """Read one component of a converted folder; the counterpart of `stream.fill`. `storage` as in `plan`.

    Raises:
        CheckpointError: if folder and network do not fit, or a part cannot be read.
        MeshError: if a parameter cannot be split over the mesh.
    """
    return plan(folder, component, config, dtype, storage).fill(mesh, progress)


def _reason(error: Exception) -> str:
    code = re.search("os_error_code='([0-9]+)'", str(error))  # in TensorStore's message, which is long
    return os.strerror(int(code[1])) if code else str(error).partition("\n")[0][:200]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Orbax from logging the errors of its threads with tracebacks; it raises them too."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
