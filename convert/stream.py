"""Reading the tensors of a Diffusers folder as the parameters of a network, slice by slice."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any

import numpy as np
from jax.sharding import Mesh, Sharding
from jax.typing import DTypeLike
from jaxtyping import Array

from joyjax.convert.blocks import Allocate, aligned, aligned_in_order, reading_threads
from joyjax.convert.component import Component
from joyjax.convert.host_memory import freeing
from joyjax.convert.rules import Match, match, raise_faults
from joyjax.convert.safetensors import Tensors
from joyjax.dtypes import STORED
from joyjax.errors import CheckpointError
from joyjax.layers.stored import Storage, own_places, places
from joyjax.layers.weights import Weights, leaves
from joyjax.sharding.build import Transfers, build, build_each, have_own_memory, shares_memory
from joyjax.sharding.place import parameter_sharding
from joyjax.storage import forms
from joyjax.storage.quantize import quantize_kernel

Progress = Callable[[int, int], None]  # called with the bytes done and the total


@dataclasses.dataclass(frozen=True)
class ReadPlan:
    """The tensor of every parameter of the network `abstract`. Shapes are checked; nothing is read."""

    tensors: Tensors
    abstract: Weights
    matches: tuple[Match, ...]

    @functools.cached_property
    def parameters(self) -> Mapping[str, Any]:
        """The parameters of the network by path, with shapes in place of arrays."""
        return leaves(self.abstract.state)

    @property
    def nbytes(self) -> int:
        """The bytes to read."""
        return sum(self.tensors.headers[found.source].nbytes for found in self.matches)

    def read(
        self,
        found: Match,
        dtype: DTypeLike,
        part: tuple[slice, ...] | None = None,
        *,
        order: Sequence[int] | None = None,
        pool: Executor | None = None,
        take: Allocate = aligned,
    ) -> np.ndarray:
        """Return one parameter in `dtype`, or a slice of it, with its axes in `order`.

        It is contiguous and aligned, unless the tensor's axes are merged. `take` allocates its memory.

        Raises:
            CheckpointError: if the tensor cannot be read, or holds NaN or infinity.
        """
        shape, transform, dtype = found.shape, found.transform, np.dtype(dtype)
        view, axes = transform.view(shape), transform.axes(shape)
        part = tuple(slice(0, size) for size in shape) if part is None else part
        order = tuple(range(len(shape))) if order is None else order
        seen = transform.part(shape, part)
        if seen is None:  # axes are merged: the whole tensor is read
            whole = take(shape, dtype)
            value, target = whole[part].transpose(order), whole.reshape([view[axis] for axis in axes])
            seen = tuple(slice(0 if axis in axes else size - 1, size) for axis, size in enumerate(view))
        else:
            lengths = [len(range(size)[each]) for size, each in zip(shape, part, strict=True)]
            value, target = aligned_in_order(lengths, order, dtype, take)
        ranges = [range(size)[each] for size, each in zip(view, seen, strict=True)]
        if not self.tensors.fill(found.source, view, ranges, transform.spread(target, shape), pool=pool):
            place = f"{self.tensors.headers[found.source].file}: tensor {found.source}"
            raise CheckpointError(f"{place} holds NaN or infinity: the file is damaged; fetch it again")
        return value

    def fill(self, mesh: Mesh | None = None, progress: Progress | None = None) -> Weights:
        """Read the network: see the function `fill`."""
        placed = places(self.abstract.state, mesh)
        found_leaves, done, total = {}, 0, self.nbytes
        quantizes = any(isinstance(parameter.get_value(), forms.Leaf) for parameter in self.parameters.values())
        with freeing() if quantizes else contextlib.nullcontext(), reading_threads() as pool:
            transfers = Transfers()

            def build_one(found: Match) -> Any:
                return transfers.add(self.build_leaf(found, placed, mesh, pool))

            # To quantize a kernel takes memory of the device beside it: one at a time.
            side_by_side = not quantizes and have_own_memory(placed.values())
            with contextlib.closing(build_each(build_one, self.matches, side_by_side=side_by_side)) as each:
                for found, leaf in zip(self.matches, each, strict=True):
                    found_leaves[found.target] = leaf
                    done += self.tensors.headers[found.source].nbytes
                    if progress:
                        progress(done, total)
        return self.abstract.filled(found_leaves)

    def build_leaf(
        self, found: Match, placed: Mapping[str, Sharding], mesh: Mesh | None, pool: Executor | None = None
    ) -> Any:
        """Read one parameter in its form in the network; `placed` has the shardings of all arrays by path."""
        parameter = self.parameters[found.target]
        dtype = np.dtype(parameter.dtype)

        def read(part: tuple[slice, ...], order: tuple[int, ...] | None) -> np.ndarray:
            return self.read(found, dtype, part, order=order, pool=pool)

        return build_leaf(found.target, parameter, placed, mesh, read, found.rows, found.file_order)


def build_leaf(
    path: str,
    parameter: Any,
    placed: Mapping[str, Sharding],
    mesh: Mesh | None,
    read: Callable[[tuple[slice, ...], tuple[int, ...] | None], np.ndarray],
    rows: int = 0,
    stored_order: tuple[int, ...] | None = None,
) -> Any:
    """Return the value of a parameter in its form; `placed` has the shardings of all arrays by path.

    `read` returns any part of the array, in its dtype, with its axes in an order, None for their own. They are stored
    in `stored_order`, so that parts along `rows` are contiguous.
    """
    leaf, dtype = parameter.get_value(), np.dtype(parameter.dtype)
    whole = tuple(leaf.shape)
    if not isinstance(leaf, forms.Leaf):
        place = placed[path]
        # A CPU transposes while a block is in cache; any other device does it in less time than the transfer.
        order = None if shares_memory(next(iter(place.addressable_devices))) else stored_order
        return build(whole, dtype, place, lambda part: read(part, order), rows, order)
    inputs, outputs = parameter.inputs, len(whole) - parameter.inputs
    turned = (*range(inputs, len(whole)), *range(inputs))
    shape, axes = (tuple(each[axis] for axis in turned) for each in (whole, parameter.axes))
    own = own_places(path, leaf, placed)
    place = parameter_sharding(path, shape, axes, mesh) or next(iter(own.values()))

    def read_rows(axis: int, start: int, stop: int) -> Array:
        """Return entries of an output axis, as an array with the output axes first."""
        size = tuple(stop - start if n == axis else each for n, each in enumerate(shape))

        def rows_of(part: tuple[slice, ...]) -> np.ndarray:
            part = tuple(
                slice(each.start + start, each.stop + start) if n == axis else each for n, each in enumerate(part)
            )
            return read((*part[outputs:], *part[:outputs]), turned)

        return build(size, dtype, place, rows_of, axis)

    return quantize_kernel(leaf, inputs, dtype.itemsize, own, read_rows)


def plan(component: Component, config: Any, tensors: Tensors, dtype: DTypeLike, storage: Storage = None) -> ReadPlan:
    """Find the tensor of every parameter; `storage` as in `Component.abstract`.

    Raises:
        CheckpointError: listing all tensors that are missing, left over, of another shape or not of floating point.
    """
    abstract = component.abstract(config, dtype, storage)
    shapes = {path: leaf.shape for path, leaf in leaves(abstract.state).items()}
    found = match(component.rules(config), component.ignored, tensors.shapes, shapes, where=tensors.where)
    stored = {m.source: tensors.headers[m.source].dtype for m in found}
    raise_faults(
        f"{tensors.where}: parameters are stored as {', '.join(STORED)}",
        [f"tensor {name} is {kind}" for name, kind in stored.items() if kind not in STORED],
    )
    return ReadPlan(tensors, abstract, tuple(found))


def fill(
    component: Component,
    config: Any,
    tensors: Tensors,
    dtype: DTypeLike,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
    storage: Storage = None,
) -> Weights:
    """Read a network, each parameter in its dtype, form and sharding.

    Raises:
        CheckpointError: if tensors and network do not fit; nothing is read then.
        MeshError: if a parameter cannot be split over the mesh.
    """
    return plan(component, config, tensors, dtype, storage).fill(mesh, progress)
