"""Linear maps whose input and output may have several axes, so that heads are axes of the kernel itself."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from joyjax.layers.parameter import fan_in, parameter


class Linear(nnx.Module):
    """`y = x · kernel + bias`, contracting the last axes of `x` with the first axes of the kernel.

    `features_in` and `features_out` are axis sizes, `axes_in` and `axes_out` their logical names: `(D,)` to
    `(3, N, H)` makes queries, keys and values of N heads at once, `(N, H)` to `(D,)` joins the heads again.
    """

    def __init__(
        self,
        features_in: Sequence[int],
        features_out: Sequence[int],
        *,
        axes_in: Sequence[str | None],
        axes_out: Sequence[str | None],
        bias: bool = True,
        dtype: DTypeLike,
        rngs: nnx.Rngs | None,
    ):
        shape = (*features_in, *features_out)
        self.kernel = parameter(rngs, shape, (*axes_in, *axes_out), dtype, init=fan_in(features_in))
        self.bias = parameter(rngs, tuple(features_out), tuple(axes_out), dtype, init="zeros") if bias else None
        self.contracted = len(features_in)

    def __call__(self, x: Float[Array, "..."], start: int = 0, stop: int | None = None) -> Float[Array, "..."]:
        """Map `[..., *features_in]` to `[..., *features_out]`, in the kernel's dtype.

        `start` and `stop` choose a part of the first output axis: keys and values without queries, say.
        """
        part = (slice(None),) * self.contracted + (slice(start, stop),)
        kernel = self.kernel[...][part]
        y = contract(x.astype(kernel.dtype), kernel, self.contracted)
        return y if self.bias is None else y + self.bias[...][start:stop]


def contract(x: Float[Array, "..."], kernel: Float[Array, "..."], count: int) -> Float[Array, "..."]:
    """Contract the last `count` axes of `x` with the first of the kernel.

    As a product of two matrices: on a CPU a training step of the demo then takes a tenth less time. On a mesh the axes
    stay, since one that is split cannot be merged with another without moving it.
    """
    if not jax.sharding.get_abstract_mesh().empty:
        return jnp.tensordot(x, kernel, axes=count)
    rows, columns = x.shape[: x.ndim - count], kernel.shape[count:]
    inner = math.prod(kernel.shape[:count])
    product = x.reshape(math.prod(rows), inner) @ kernel.reshape(inner, math.prod(columns))
    return product.reshape(*rows, *columns)


class Embedding(nnx.Module):
    """A table of rows, looked up by number."""

    def __init__(
        self, rows: int, features: int, *, axes: Sequence[str | None], dtype: DTypeLike, rngs: nnx.Rngs | None
    ):
        self.table = parameter(rngs, (rows, features), axes, dtype, init=1.0)

    def __call__(self, index: Array) -> Float[Array, "... D"]:
        """Return the rows of the table at `index`."""
        return jnp.take(self.table[...], index, axis=0)
