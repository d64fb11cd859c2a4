"""Build sharded arrays part by part from a reader, directly on their devices."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jax.typing import DTypeLike
from jaxtyping import Array

PIECE_BYTES = 2**28  # the most host memory that a piece takes

Read = Callable[[tuple[slice, ...]], np.ndarray]


def build(shape: tuple[int, ...], dtype: DTypeLike, sharding: Sharding, read: Read, axis: int = 0) -> Array:
    """Return an array with this sharding; `read` returns any part of it, in `dtype`.

    Only the parts on this process's devices are read, each once, and a large one in pieces along `axis`.
    """
    parts: dict[tuple[tuple[int, int], ...], Array] = {}
    arrays = []
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        spans = tuple(part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True))
        if spans in parts:
            arrays.append(jax.device_put(parts[spans], device))
        else:
            parts[spans] = _build_part(spans, np.dtype(dtype), device, read, axis)
            arrays.append(parts[spans])
    return jax.block_until_ready(jax.make_array_from_single_device_arrays(shape, sharding, arrays))


def _build_part(
    spans: tuple[tuple[int, int], ...], dtype: np.dtype, device: jax.Device, read: Read, axis: int
) -> Array:
    shape = tuple(stop - start for start, stop in spans)
    size = int(np.prod(shape)) * dtype.itemsize
    if size <= PIECE_BYTES:
        return jax.block_until_ready(jax.device_put(read(tuple(slice(*span) for span in spans)), device))
    rows = max(1, PIECE_BYTES // (size // shape[axis]))
    with jax.default_device(device):
        whole = jnp.zeros(shape, dtype)
    start, stop = spans[axis]
    for first in range(start, stop, rows):
        piece = read(
            tuple(slice(first, min(first + rows, stop)) if n == axis else slice(*s) for n, s in enumerate(spans))
        )
        # Blocking keeps at most one piece in host memory.
        whole = jax.block_until_ready(_put(whole, jax.device_put(piece, device), jnp.int32(first - start), axis))
    return whole


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _put(whole: Array, piece: Array, start: Array, axis: int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(whole, piece, start, axis)
