"""Quantizing a kernel on its devices, a few rows at a time, so that only these rows are in memory in both forms."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array

from joyjax.storage.forms import FORMS, arrays, with_arrays

PIECE_BYTES = 2**24  # bytes quantized at a time; XLA allocates several times as much for it

Read = Callable[[int, int, int], Array]  # output axis, start, stop


def quantize_kernel(leaf: Any, inputs: int, itemsize: int, places: Mapping[str, Sharding], read: Read) -> Any:
    """Return `leaf`, which has shapes in place of arrays, with arrays; `places` are their shardings by name.

    `read` returns the entries `start` to `stop` along an output axis of the kernel, of `itemsize` bytes each, on the
    devices and with the output axes first. The caller must keep no reference to that array.
    """
    shape = (*leaf.shape[inputs:], *leaf.shape[:inputs])
    quantize = jax.jit(_quantize, static_argnums=(0, 1), out_shardings=dict(places))

    def quantized(axis: int, start: int, stop: int) -> dict[str, Array]:
        # Wait, so that the rows and the temporary buffers are freed before the next rows are read.
        return jax.block_until_ready(quantize(leaf.name, inputs, read(axis, start, stop)))

    count = -(-math.prod(shape) * itemsize // PIECE_BYTES)
    axis = _whole_axis(leaf, len(shape) - inputs, places)
    if count <= 1 or axis is None:
        return with_arrays(leaf, quantized(0, 0, shape[0]))
    step = -(-shape[axis] // count)
    shapes = {name: (tuple(array.shape), jnp.dtype(array.dtype)) for name, array in arrays(leaf).items()}
    whole = jax.jit(lambda: {name: jnp.zeros(*each) for name, each in shapes.items()}, out_shardings=dict(places))()
    for start in range(0, shape[axis], step):
        rows = quantized(axis, start, min(start + step, shape[axis]))
        whole = jax.block_until_ready(_put(whole, rows, np.int32(start), axis))
    return with_arrays(leaf, whole)


def quantize_array(leaf: Any, inputs: int, places: Mapping[str, Sharding], kernel: Array | np.ndarray) -> Any:
    """Return `leaf` with the arrays of a kernel `[*in, *out]`, which is on its devices, or on the host for one device.

    A host array is cast to the leaf's dtype first.
    """

    def read(axis: int, start: int, stop: int) -> Array:
        if not isinstance(kernel, np.ndarray):
            return _take(kernel, np.int32(start), stop - start, axis, inputs)
        part = kernel[(slice(None),) * (inputs + axis) + (slice(start, stop),)].astype(leaf.dtype, copy=False)
        rows = part.transpose(*range(inputs, part.ndim), *range(inputs))
        return jax.device_put(rows, next(iter(places.values())))

    return quantize_kernel(leaf, inputs, kernel.dtype.itemsize, places, read)


def _whole_axis(leaf: Any, outputs: int, places: Mapping[str, Sharding]) -> int | None:
    """Return the first output axis that can be sliced: longer than one, and not sharded; None if there is none."""
    shapes = {name: tuple(array.shape) for name, array in arrays(leaf).items()}
    for axis in range(outputs):
        whole = all(places[name].shard_shape(shape)[axis] == shape[axis] > 1 for name, shape in shapes.items())
        if whole:
            return axis
    return None


def _quantize(name: str, inputs: int, rows: Array) -> dict[str, Array]:
    return FORMS[name].quantize(rows, inputs)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _take(kernel: Array, start: Array, size: int, axis: int, inputs: int) -> Array:
    """Return a part of a kernel `[*in, *out]` along an output axis, with its output axes first."""
    rows = jnp.transpose(kernel, (*range(inputs, kernel.ndim), *range(inputs)))
    return rows if size == rows.shape[axis] else jax.lax.dynamic_slice_in_dim(rows, start, size, axis)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _put(whole: dict[str, Array], rows: dict[str, Array], start: Array, axis: int) -> dict[str, Array]:
    def put(array: Array, part: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(array, part, start, axis)

    return {name: _as_bits(put, array, rows[name]) for name, array in whole.items()}


def _as_bits(move: Callable[..., Array], *given: Array) -> Array:
    """Copy eight-bit floats as integers: XLA's CPU backend converts float8 to copy it, which is 30 times as slow."""
    dtype = given[0].dtype
    if dtype.itemsize > 1 or not jnp.issubdtype(dtype, jnp.floating):
        return move(*given)
    bits = (jax.lax.bitcast_convert_type(array, jnp.uint8) for array in given)
    return jax.lax.bitcast_convert_type(move(*bits), dtype)
