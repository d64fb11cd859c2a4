"""Pictures padded to a common size, so that many sizes share one compiled program."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class ValidRegion:
    """The valid `size` at the top left of `padded` rows and columns; the rest is padding.

    `size` is traced. One region serves every resolution: at half of the padded rows and columns, half of `size` is
    valid. Padding may have any values, NaN too; operations over neighbours mask it first.
    """

    size: Int[Array, " 2"]
    padded: tuple[int, int]

    def valid_size(self, x: Float[Array, "b h w c"]) -> tuple[Int[Array, ""], Int[Array, ""]]:
        """Return how many rows and columns of `x` are valid."""
        rows, columns = (self.size[n] * x.shape[1 + n] // self.padded[n] for n in range(2))
        return rows, columns

    def mask_padding(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Set the padding to zero."""
        rows, columns = self.valid_size(x)
        inside = (jnp.arange(x.shape[1])[:, None] < rows) & (jnp.arange(x.shape[2]) < columns)
        return jnp.where(inside[:, :, None], x, 0)

    def compact(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Move the valid pixels to the front, row by row, and pad by repeating the last pixel."""
        rows, columns = self.valid_size(x)
        pixel = jnp.minimum(jnp.arange(x.shape[1] * x.shape[2]), rows * columns - 1)
        return _take(x, pixel // columns * x.shape[2] + pixel % columns)

    def expand(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Undo `compact`."""
        rows, columns = self.valid_size(x)
        pixel = jnp.arange(x.shape[1])[:, None] * columns + jnp.arange(x.shape[2])
        return _take(x, jnp.minimum(pixel, rows * columns - 1).reshape(-1))


def _take(x: Float[Array, "b h w c"], index: Int[Array, " hw"]) -> Float[Array, "b h w c"]:
    b, h, w, c = x.shape
    return jnp.take(x.reshape(b, h * w, c), index, axis=1, mode="clip").reshape(x.shape)
