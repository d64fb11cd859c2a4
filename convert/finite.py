"""Checks that weights are finite, used by every reader of weights."""

import jax
import jax.numpy as jnp
import numpy as np

# For each dtype, the bits of infinity: without the sign, those of NaN are as many or more, those of other values less.
# float8_e4m3fn has no infinity, and one NaN.
NOT_FINITE: dict[str, tuple[type[np.unsignedinteger], int]] = {
    "bfloat16": (np.uint16, 0x7F80),
    "float16": (np.uint16, 0x7C00),
    "float32": (np.uint32, 0x7F800000),
    "float8_e4m3fn": (np.uint8, 0x7F),
}
CHECKED_AT_ONCE = 2**16  # entries, few enough for a cache


def all_finite(array: np.ndarray) -> bool:
    """Return whether a host array has no infinity and no NaN; True for integers."""
    if array.dtype.name.startswith(("int", "uint")):
        return True
    kind, infinity = NOT_FINITE[str(array.dtype)]
    bits = array.view(kind)
    return _all_below(bits.reshape(-1) if bits.flags.c_contiguous else bits, infinity, kind(np.iinfo(kind).max >> 1))


def _all_below(bits: np.ndarray, limit: int, mask: np.unsignedinteger) -> bool:
    """Return whether all entries are below the limit, by their bits in the mask."""
    if not bits.ndim:
        return bool(bits & mask < limit)
    inner = bits[:1].size
    if inner > CHECKED_AT_ONCE:
        return all(_all_below(part, limit, mask) for part in bits)
    step = max(1, CHECKED_AT_ONCE // max(1, inner))
    parts = (bits[n : n + step] for n in range(0, len(bits), step))
    return all(not part.size or bool(np.bitwise_and(part, mask).max() < limit) for part in parts)


def all_finite_on_device(array: jax.Array) -> bool:
    """Return whether an array on devices has no infinity and no NaN.

    On a CPU each shard is checked in place: a program for every shape takes longer to compile than to run, and keeps
    0.4 GB of memory.
    """
    if next(iter(array.devices())).platform != "cpu":
        return bool(_finite(array))
    parts = {str(shard.index): shard.data for shard in array.addressable_shards}
    return all(all_finite(np.asarray(part)) for part in parts.values())


@jax.jit
def _finite(array: jax.Array) -> jax.Array:
    return jnp.isfinite(array).all()
