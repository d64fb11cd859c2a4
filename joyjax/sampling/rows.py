"""Rows of a batch: one for each pass of each edit, padded to a multiple of the devices.

A condition is a pytree whose arrays have rows on axis 0, all first passes (unconditional, where there is guidance)
before all second ones, and sequences on axis 1, padded at the end.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from joyjax.sharding.place import devices_along


@jax.jit
def stack_conditions(conditions: Sequence[Any]) -> Any:
    """Batch the conditions of several edits: rows are all first passes, then all second ones.

    Sequences are padded to the longest, so edits may have different numbers of references.
    """

    def stack(*parts: Array) -> Array:
        longest = max((part.shape[1] for part in parts if part.ndim > 1), default=0)
        rows = [
            jnp.pad(part, [(0, longest - part.shape[1] if axis == 1 else 0) for axis in range(part.ndim)])
            for part in parts
        ]
        joined = jnp.stack(rows, axis=1)  # every edit has one row of each pass
        return joined.reshape(joined.shape[0] * joined.shape[1], *joined.shape[2:])  # no -1: an axis may be empty

    return jax.tree.map(stack, *conditions)


@jax.jit
def conditional_only(condition: Any) -> Any:
    """Return the conditional rows of a condition for two passes."""
    return jax.tree.map(lambda rows: rows[rows.shape[0] // 2 :], condition)


def expand_for_cfg(latents: Float[Array, "b T P"], condition: Any) -> tuple[int, Float[Array, "B T P"], Any]:
    """Return the passes of each edit, 2 with guidance, and latents and condition for the network.

    The latents are repeated for each pass; rows are padded to a multiple of the devices.
    """
    passes = jax.tree.leaves(condition)[0].shape[0] // latents.shape[0]
    return passes, *pad_batch((jnp.tile(latents, (passes, 1, 1)), condition), passes)


def pad_batch(arrays: Any, passes: int) -> Any:
    """Repeat the last row of each pass until the devices that share a batch divide the number of rows."""
    devices = devices_along("batch")

    def fill(x: Array) -> Array:
        count = x.shape[0] // passes
        more = next(more for more in range(devices) if (count + more) * passes % devices == 0)
        if not more:
            return x
        rows = x.reshape(passes, count, *x.shape[1:])
        rows = jnp.concatenate([rows, jnp.repeat(rows[:, -1:], more, axis=1)], axis=1)
        return rows.reshape(passes * (count + more), *x.shape[1:])

    return jax.tree.map(fill, arrays)
