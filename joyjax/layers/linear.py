"""Linear maps whose input and output may have several axes, so that heads are axes of the kernel itself."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from joyjax.layers.parameter import fan_in, parameter
from joyjax.storage.forms import contract


class Linear(nnx.Module):
    """`y = x · kernel + bias`, contracting the last axes of `x` with the first axes of the kernel.

    `features_in` and `features_out` are axis sizes, `axes_in` and `axes_out` their logical names: `(D,)` to
    `(3, N, H)` makes queries, keys and values of N heads at once, `(N, H)` to `(D,)` joins the heads again.
    The kernel is an array or, where it is `storable`, one of the forms in joyjax/storage/forms.py.
    """

    def __init__(
        self,
        features_in: Sequence[int],
        features_out: Sequence[int],
        *,
        axes_in: Sequence[str | None],
        axes_out: Sequence[str | None],
        bias: bool = True,
        storable: bool = False,
        dtype: DTypeLike,
        rngs: nnx.Rngs | None,
    ):
        shape = (*features_in, *features_out)
        self.contracted = len(features_in)
        self.kernel = parameter(
            rngs,
            shape,
            (*axes_in, *axes_out),
            dtype,
            init=fan_in(features_in),
            inputs=self.contracted,
            storable=storable,
        )
        self.bias = parameter(rngs, tuple(features_out), tuple(axes_out), dtype, init="zeros") if bias else None

    def __call__(self, x: Float[Array, "..."], start: int = 0, stop: int | None = None) -> Float[Array, "..."]:
        """Map `[..., *features_in]` to `[..., *features_out]`, in the kernel's dtype.

        `start` and `stop` select a part of the first output axis, such as keys and values without queries.
        """
        y = contract(x, self.kernel.get_value(), self.contracted, start, stop)
        return y if self.bias is None else y + self.bias[...][start:stop]


class Embedding(nnx.Module):
    """A table of rows, looked up by index."""

    def __init__(
        self, rows: int, features: int, *, axes: Sequence[str | None], dtype: DTypeLike, rngs: nnx.Rngs | None
    ):
        self.table = parameter(rngs, (rows, features), axes, dtype, init=1.0)

    def __call__(self, index: Array) -> Float[Array, "... D"]:
        """Return the rows of the table at `index`."""
        return jnp.take(self.table[...], index, axis=0)
