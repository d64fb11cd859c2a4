"""The arrays of a written component: dtypes, parts, and reading them from the source's tensors."""

import functools
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from typing import Any

import numpy as np
from jax.sharding import SingleDeviceSharding

from joyjax.convert import array_files, manifest, stream
from joyjax.convert.blocks import Allocate
from joyjax.convert.manifest import Piece, Stored
from joyjax.convert.rules import Match, Shape
from joyjax.layers.stored import ArrayLeaf, array_leaves
from joyjax.sharding.devices import cpu_device
from joyjax.storage import forms


def layout(plan: stream.ReadPlan, keep: bool) -> dict[str, Stored]:
    """Return dtype and pieces of each array to store; `keep`: the tensor's own dtype, unless a form has another."""
    headers = plan.tensors.headers
    small: list[tuple[str, Shape, str]] = []
    large: list[tuple[str, Shape, str]] = []
    for found in plan.matches:
        parameter = plan.parameters[found.target]
        leaf = parameter.get_value()
        if isinstance(leaf, forms.Leaf):
            arrays = [
                (forms.array_path(found.target, name), tuple(array.shape), str(np.dtype(array.dtype)))
                for name, array in forms.arrays(leaf).items()
            ]
        else:
            arrays = [(found.target, found.shape, headers[found.source].dtype if keep else str(parameter.dtype))]
        # The arrays of a quantized kernel stay together: they are made together.
        sizes = [Stored(shape, dtype, ()).nbytes for _, shape, dtype in arrays]
        (large if max(sizes) >= array_files.LARGE else small).extend(arrays)
    parts = manifest.partition(small)
    return parts | manifest.partition(large, array_files.PREFIX, len(manifest.parts(parts)))


def forms_of(plan: stream.ReadPlan) -> dict[str, str]:
    """Return the form of each kernel that is not stored as an array, by path."""
    named = {path: forms.form_name(parameter.get_value()) for path, parameter in plan.parameters.items()}
    return {path: name for path, name in named.items() if name is not None}


def reader(
    plan: stream.ReadPlan, matches: Mapping[str, Match], pool: Executor, take: Allocate
) -> Callable[[str, Stored, Piece], np.ndarray]:
    """Return a function that reads a piece of an array, and quantizes it if it belongs to a quantized kernel.

    `take` allocates the memory of a piece that is not quantized.
    """
    own = array_leaves(plan.abstract.state)
    placed = dict.fromkeys(own, SingleDeviceSharding(cpu_device()))

    @functools.lru_cache(1)  # the arrays of a kernel follow each other
    def quantized(parameter: str) -> dict[str, Any]:
        leaf = plan.build_leaf(matches[parameter], placed, None, pool)
        return {forms.array_path(parameter, name): np.asarray(array) for name, array in forms.arrays(leaf).items()}

    def read(path: str, stored: Stored, piece: Piece) -> np.ndarray:
        parameter = own[path].parameter
        if parameter == path:
            return plan.read(matches[path], stored.dtype, stored.index(piece), pool=pool, take=take)
        return quantized(parameter)[path][piece.start : piece.stop]

    return read


def source_bytes(plan: stream.ReadPlan, found: Match, array: ArrayLeaf, path: str, piece: Piece) -> int:
    """Return the bytes of the source that a piece counts for; a quantized kernel counts with its first array."""
    first = next(iter(forms.arrays(plan.parameters[array.parameter].get_value())))
    if path != forms.array_path(array.parameter, first):
        return 0
    rows = array.value.shape[0] if array.value.shape else 1
    return plan.tensors.headers[found.source].nbytes * (piece.stop - piece.start) // max(1, rows)
