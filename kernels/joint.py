"""Two token sequences in one buffer, without gaps: every row's valid tokens come first.

Attention then needs one length per row and no mask. It is invariant to the order of keys once RoPE is applied.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped


def join(
    first: Shaped[Array, "B T *rest"], second: Shaped[Array, "B S *rest"], lengths: Int[Array, " B"] | None
) -> Shaped[Array, "B T+S *rest"]:
    """Write `second` behind the first `lengths` tokens of `first`; None: `first` has no padding."""
    joint = jnp.concatenate([first, second], axis=1)
    if lengths is None:
        return joint
    return jax.vmap(lambda row, part, start: jax.lax.dynamic_update_slice_in_dim(row, part, start, axis=0))(
        joint, second, lengths
    )


def split(
    joint: Shaped[Array, "B L *rest"], size: int, lengths: Int[Array, " B"] | None
) -> tuple[Shaped[Array, "B T *rest"], Shaped[Array, "B S *rest"]]:
    """Undo `join`, where `first` had `size` tokens in all. The padding of `first` is undefined."""
    first = joint[:, :size]
    if lengths is None:
        return first, joint[:, size:]
    count = joint.shape[1] - size
    second = jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, count, axis=0))(joint, lengths)
    return first, second
