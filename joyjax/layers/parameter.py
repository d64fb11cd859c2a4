"""How a parameter is declared: shape, dtype, initial values and logical axes on one line."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike


def parameter(
    rngs: nnx.Rngs | None,
    shape: Sequence[int],
    axes: Sequence[str | None],
    dtype: DTypeLike,
    *,
    init: str | float = "ones",
    inputs: int = 0,
    storable: bool = False,
) -> nnx.Param:
    """Declare a parameter whose every dimension has a logical axis name (or None where it is never split).

    `init` is "ones", "zeros", or the standard deviation of a normal distribution. Without `rngs` the parameter is
    abstract, to be filled from a checkpoint; that takes no memory and no tracing. `inputs` is the number of leading
    axes of a kernel that a map contracts. `storable`: it may be stored in another form than an array
    (joyjax/storage/forms.py).
    """
    if len(shape) != len(axes):
        raise ValueError(f"shape {tuple(shape)} and axes {tuple(axes)} differ in length")
    value: jax.Array | jax.ShapeDtypeStruct
    if rngs is None:
        value = jax.ShapeDtypeStruct(tuple(shape), dtype)
    elif init == "ones":
        value = jnp.ones(shape, dtype)
    elif init == "zeros":
        value = jnp.zeros(shape, dtype)
    else:
        value = float(init) * jax.random.normal(rngs.params(), shape, dtype)
    return nnx.Param(value, axes=tuple(axes), inputs=inputs, storable=storable)


def fan_in(shape: Sequence[int]) -> float:
    """Return the standard deviation that keeps the variance of a sum over `shape` at one."""
    return 1 / math.sqrt(math.prod(shape))
