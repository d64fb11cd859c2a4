"""Checks that weights are finite, used by every reader of weights."""

import jax
import jax.numpy as jnp
import numpy as np

# For each dtype, the bits that are all set in infinity and NaN, and in no other value. float8_e4m3fn has no infinity.
NOT_FINITE = {
    "bfloat16": (np.uint16, 0x7F80),
    "float16": (np.uint16, 0x7C00),
    "float32": (np.uint32, 0x7F800000),
    "float8_e4m3fn": (np.uint8, 0x7F),
}
CHECKED_AT_ONCE = 2**18  # entries, few enough for a cache


def all_finite(array: np.ndarray) -> bool:
    """Return whether a host array has no infinity and no NaN; True for integers."""
    if array.dtype.name.startswith(("int", "uint")):
        return True
    kind, mask = NOT_FINITE[str(array.dtype)]
    bits = np.ascontiguousarray(array).reshape(-1).view(kind)
    blocks = (bits[n : n + CHECKED_AT_ONCE] for n in range(0, bits.size, CHECKED_AT_ONCE))
    return not any(np.any((block & mask) == mask) for block in blocks)


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
