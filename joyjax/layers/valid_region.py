"""Pictures that fill only a part of a canvas, so that many sizes share one compiled program."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class ValidRegion:
    """The picture is the top left `size` of a canvas of so many rows and columns; the rest of it is padding.

    `size` is traced. One extent holds at every resolution: of an array with half of the canvas's rows and columns, half
    of `size` is picture. Padding may have any values, not finite ones too: what looks at neighbours cuts it off first.
    """

    size: Int[Array, " 2"]
    canvas: tuple[int, int]

    def within(self, x: Float[Array, "b h w c"]) -> tuple[Int[Array, ""], Int[Array, ""]]:
        """Return how many rows and columns of `x` are picture."""
        rows, columns = (self.size[n] * x.shape[1 + n] // self.canvas[n] for n in range(2))
        return rows, columns

    def cut(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Return `x` with zeros for the padding."""
        rows, columns = self.within(x)
        inside = (jnp.arange(x.shape[1])[:, None] < rows) & (jnp.arange(x.shape[2]) < columns)
        return jnp.where(inside[:, :, None], x, 0)

    def pack(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Move the picture's pixels to the front, row by row; behind them, its last one again and again."""
        rows, columns = self.within(x)
        pixel = jnp.minimum(jnp.arange(x.shape[1] * x.shape[2]), rows * columns - 1)
        return _take(x, pixel // columns * x.shape[2] + pixel % columns)

    def unpack(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Undo `pack`."""
        rows, columns = self.within(x)
        pixel = jnp.arange(x.shape[1])[:, None] * columns + jnp.arange(x.shape[2])
        return _take(x, jnp.minimum(pixel, rows * columns - 1).reshape(-1))


def _take(x: Float[Array, "b h w c"], index: Int[Array, " hw"]) -> Float[Array, "b h w c"]:
    b, h, w, c = x.shape
    return jnp.take(x.reshape(b, h * w, c), index, axis=1, mode="clip").reshape(x.shape)
