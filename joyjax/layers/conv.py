"""Two-dimensional convolution, channels last."""

from collections.abc import Sequence

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from joyjax.layers.parameter import fan_in, parameter
from joyjax.layers.valid_region import ValidRegion

Padding = tuple[tuple[int, int], tuple[int, int]]


class Conv(nnx.Module):
    """Convolution of `[b h w c]` with a kernel `[height, width, c_in, c_out]`, plus bias."""

    def __init__(
        self,
        features_in: int,
        features_out: int,
        size: int,
        *,
        stride: int = 1,
        padding: Padding | None = None,
        axes: Sequence[str | None] = ("conv_in", "conv_out"),
        dtype: DTypeLike,
        rngs: nnx.Rngs | None,
    ):
        shape = (size, size, features_in, features_out)
        self.kernel = parameter(rngs, shape, (None, None, *axes), dtype, init=fan_in(shape[:3]))
        self.bias = parameter(rngs, (features_out,), (axes[1],), dtype, init="zeros")
        self.stride = (stride, stride)
        self.padding = padding or (((size - 1) // 2, size // 2),) * 2

    def __call__(self, x: Float[Array, "b h w c"], region: ValidRegion | None = None) -> Float[Array, "b y x d"]:
        """Convolve; by default the output of stride 1 is as large as the input.

        With a region, the padding of a picture never changes the result on its valid pixels.
        """
        if region is not None and self.kernel.shape[:2] != (1, 1):
            x = region.mask_padding(x)  # zeros, as beyond the edges
        y = jax.lax.conv_general_dilated(
            x, self.kernel[...], self.stride, self.padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y + self.bias[...]
