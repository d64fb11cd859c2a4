"""Reading the parts of a converted folder as the parameters of a network; the counterpart of stream.py."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from joyjax.convert import array_files
from joyjax.convert.blocks import aligned_in_order, reading_threads
from joyjax.convert.component import Component
from joyjax.convert.finite import all_finite, all_finite_on_device
from joyjax.convert.host_memory import freeing
from joyjax.convert.manifest import MANIFEST, Manifest, Piece, Stored, parts
from joyjax.convert.orbax_part import read_part
from joyjax.convert.rules import raise_faults
from joyjax.convert.stream import Progress, build_leaf
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
from joyjax.sharding.build import Transfers, build, build_each, have_own_memory
from joyjax.sharding.place import parameter_sharding
from joyjax.storage import forms
from joyjax.storage.quantize import quantize_array


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
                    raise _not_finite(self.folder / part, path)
                if path in goals:
                    goal = goals[path].get_value()
                    leaf = quantize_array(goal, goals[path].inputs, own_places(path, goal, placed), array)
                    arrays.update({forms.array_path(path, name): each for name, each in forms.arrays(leaf).items()})
                else:
                    arrays[path] = array
                del array
            if progress:
                progress(done, total)

        filed = [path for path, stored in self.parameters.items() if array_files.in_files(stored.pieces[0].part)]
        with reading_threads() as pool:
            transfers = Transfers()

            def build_one(path: str) -> dict[str, jax.Array]:
                """Return an array of the folder, or the arrays of the kernel that it is quantized to."""
                if path in goals:
                    read = self._file_reader(path, goals[path].dtype, pool)
                    leaf = build_leaf(path, goals[path], placed, mesh, read)
                    return {forms.array_path(path, name): each for name, each in forms.arrays(leaf).items()}
                value = own[path].value
                read = functools.partial(self._file_reader(path, value.dtype, pool), order=None)
                return {path: transfers.add(build(value.shape, value.dtype, placed[path], read))}

            side_by_side = not goals and have_own_memory(placed.values())
            with contextlib.closing(build_each(build_one, filed, side_by_side=side_by_side)) as each:
                for path, found in zip(filed, each, strict=True):
                    arrays.update(found)
                    done += self.parameters[path].nbytes
                    if progress:
                        progress(done, total)

        # Arrays in several pieces are concatenated in host memory; first, while little else is there.
        others = {path: stored for path, stored in self.parameters.items() if path not in filed}
        pieces = [path for path, stored in others.items() if len(stored.pieces) > 1]
        for path in pieces:
            if isinstance(want := wanted(path), np.ndarray):
                built: Any = self._reader(path, want.dtype)(tuple(slice(0, size) for size in want.shape))
            else:
                built = build(want.shape, want.dtype, want.sharding, self._reader(path, want.dtype))
            keep(self.parameters[path].pieces[0].part, {path: built})
            del built
        whole = {path: stored for path, stored in others.items() if path not in pieces}
        for part, held in parts(whole).items():
            keep(part, read_part(self.folder / part, {path: wanted(path) for path in held}))
        return filled_with_arrays(self.abstract, arrays)

    def _file_reader(self, path: str, dtype: DTypeLike, pool: Executor) -> Callable[..., np.ndarray]:
        """Return a function that reads a part of an array in files of its own, with its axes in an order."""
        stored = self.parameters[path]
        sources = [
            (piece, array_files.source(self.folder / piece.part, path, stored.piece_shape(piece), stored.dtype))
            for piece in stored.pieces
        ]

        def read(part: tuple[slice, ...], order: tuple[int, ...] | None) -> np.ndarray:
            ranges = [range(size)[each] for size, each in zip(stored.shape, part, strict=True)]
            order = tuple(range(len(ranges))) if order is None else order
            value, target = aligned_in_order([len(each) for each in ranges], order, np.dtype(dtype))
            for piece, where in sources:
                start, stop = max(ranges[0].start, piece.start), min(ranges[0].stop, piece.stop)
                if start < stop:
                    rows = target[start - ranges[0].start : stop - ranges[0].start]
                    seen = [range(start - piece.start, stop - piece.start), *ranges[1:]]
                    if not array_files.fill(where, rows, seen, pool=pool):
                        raise _not_finite(self.folder / piece.part, path)
            return value

        return read

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


def _not_finite(part: Path, path: str) -> CheckpointError:
    return CheckpointError(f"{part}: {path} holds NaN or infinity: the file is damaged; convert the model again")
