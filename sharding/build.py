"""Build sharded arrays part by part from a reader, directly on their devices."""

import collections
import functools
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jax.typing import DTypeLike
from jaxtyping import Array

PIECE_BYTES = 2**28  # the most host memory that a piece takes on its way to a device with a memory of its own

AHEAD_BYTES = 2**29  # of arrays that may still be in host memory, on their way to a device
BUILDERS = 4  # arrays that are built side by side for a device with a memory of its own

Read = Callable[[tuple[slice, ...]], np.ndarray]
Tree = TypeVar("Tree")
Item = TypeVar("Item")
Built = TypeVar("Built")


def build(
    shape: tuple[int, ...],
    dtype: DTypeLike,
    sharding: Sharding,
    read: Read,
    axis: int = 0,
    order: tuple[int, ...] | None = None,
) -> Array:
    """Return an array with this sharding; `read` returns any part of it, in `dtype`, with its axes in `order`.

    Only the parts on this process's devices are read, each once, and a large one in pieces along `axis`. A part's axes
    are put back into their places on its device. On a CPU the array that `read` returns becomes JAX's own if it is
    contiguous and aligned to 64 bytes: `read` must not keep it. On another device the array may still be on its way.
    """
    parts: dict[tuple[tuple[int, int], ...], Array] = {}
    arrays = []
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        spans = tuple(part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True))
        if spans in parts:
            arrays.append(jax.device_put(parts[spans], device))
        else:
            back = None if order is None else tuple(int(n) for n in np.argsort(order))
            parts[spans] = _build_part(spans, np.dtype(dtype), device, read, axis, back)
            arrays.append(parts[spans])
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _build_part(
    spans: tuple[tuple[int, int], ...],
    dtype: np.dtype,
    device: jax.Device,
    read: Read,
    axis: int,
    back: tuple[int, ...] | None,
) -> Array:
    def put(*index: slice) -> Array:
        part = jax.device_put(read(index), device)
        return part if back is None else _transpose(part, back)

    shape = tuple(stop - start for start, stop in spans)
    size = int(np.prod(shape)) * dtype.itemsize
    if size <= PIECE_BYTES or shares_memory(device):
        return put(*(slice(*span) for span in spans))
    rows = max(1, PIECE_BYTES // (size // shape[axis]))
    with jax.default_device(device):
        whole = jnp.zeros(shape, dtype)
    start, stop = spans[axis]
    for first in range(start, stop, rows):
        piece = put(*(slice(first, min(first + rows, stop)) if n == axis else slice(*s) for n, s in enumerate(spans)))
        # Blocking keeps at most one piece in host memory.
        whole = jax.block_until_ready(_put(whole, piece, jnp.int32(first - start), axis))
    return whole


class Transfers:
    """Bounds the arrays whose transfer to a device has not ended. Any thread may add some."""

    def __init__(self) -> None:
        self.pending: collections.deque[tuple[Any, int]] = collections.deque()
        self.nbytes = 0
        self.lock = threading.Lock()

    def add(self, arrays: Tree) -> Tree:
        """Return `arrays`, a pytree, and wait for earlier ones while AHEAD_BYTES are exceeded."""
        size = sum(array.nbytes for array in jax.tree.leaves(arrays))
        with self.lock:
            self.pending.append((arrays, size))
            self.nbytes += size
            while self.nbytes > AHEAD_BYTES:
                earlier, size = self.pending.popleft()
                jax.block_until_ready(earlier)
                self.nbytes -= size
        return arrays


def build_each(
    build_one: Callable[[Item], Built], items: Iterable[Item], *, side_by_side: bool
) -> Generator[Built, None, None]:
    """Yield `build_one` of each item, in order; `side_by_side`: BUILDERS of them at a time, each in a thread.

    While one is read, others are transferred, and programs that transpose them are compiled.
    """
    if not side_by_side:
        yield from map(build_one, items)
        return
    with ThreadPoolExecutor(BUILDERS) as pool:
        yield from pool.map(build_one, items)  # closed early, it cancels those that have not begun


def have_own_memory(places: Iterable[Sharding]) -> bool:
    """Return whether all devices of these places have a memory of their own."""
    return not any(shares_memory(device) for place in places for device in place.addressable_devices)


def shares_memory(device: jax.Device) -> bool:
    """Return whether a device computes in host memory, where a piece is not on its way but in place."""
    return device.platform == "cpu"


@functools.partial(jax.jit, static_argnums=1)
def _transpose(part: Array, axes: tuple[int, ...]) -> Array:
    return jnp.transpose(part, axes)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _put(whole: Array, piece: Array, start: Array, axis: int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(whole, piece, start, axis)
