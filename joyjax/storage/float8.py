"""Linear maps in eight bits: weights stored as float8_e4m3fn, inputs brought to it on the way.

An approximation that is asked for when a model is loaded. Each output channel of a weight has a scale, and each row of
the inputs one that is found as it comes, so that none depends on its neighbours in a batch or on padding. Both scales
are applied to the product, after it. XLA then calls cuBLASLt's product of eight-bit numbers on GPUs from Ada and Hopper
on, and elsewhere multiplies the same numbers in another way; a scale for each channel inside the product would have it
multiply in sixteen bits.
Format: Micikevicius et al., 2022, "FP8 Formats for Deep Learning".
"""

import fnmatch
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from joyjax.dtypes import FLOAT32
from joyjax.errors import JoyJaxError, RequestError
from joyjax.layers.linear import Linear
from joyjax.layers.weights import Weights
from joyjax.sharding.place import parameter_sharding

LINEARS = ("exact", "float8")
FLOAT8 = jnp.float8_e4m3fn
LARGEST = 448.0  # of its finite numbers
CAPABILITY = 8.9  # the first NVIDIA GPUs that multiply it


class Float8Linear(nnx.Module):
    """`Linear` with an eight-bit kernel, its output axes first, and a float32 scale for each output channel."""

    def __init__(self, linear: Linear, mesh: Mesh | None, path: str):
        """Take the place of a linear map; its kernel may be freed as soon as this one is there."""
        kernel, count = linear.kernel, linear.contracted
        axes = (*kernel.axes[count:], *kernel.axes[:count])
        shape = (*kernel.shape[count:], *kernel.shape[:count])
        places = [
            parameter_sharding(f"{path}.{name}", size, names, mesh)
            for name, size, names in (
                ("kernel", shape, axes),
                ("scale", shape[: len(shape) - count], axes[: len(shape) - count]),
            )
        ]
        numbers, scale = jax.jit(
            _quantize_kernel, static_argnums=1, out_shardings=None if mesh is None else tuple(places)
        )(kernel[...], count)
        self.kernel = nnx.Param(numbers, axes=axes)
        self.scale = nnx.Param(scale, axes=axes[: len(shape) - count])
        self.bias = linear.bias
        self.contracted = count
        self.dtype = jnp.dtype(kernel.dtype).name

    def __call__(self, x: Float[Array, "..."], start: int = 0, stop: int | None = None) -> Float[Array, "..."]:
        """Map `[..., *features_in]` to `[..., *features_out]`, as `Linear` does, in its dtype."""
        kernel, scale = self.kernel[...][start:stop], self.scale[...][start:stop]
        numbers, row_scale = quantize(x, self.contracted)
        product = contract_last(numbers, kernel, self.contracted, self.dtype).astype(FLOAT32)
        product = product * row_scale.reshape(row_scale.shape[: x.ndim - self.contracted] + (1,) * scale.ndim) * scale
        y = product.astype(self.dtype)
        return y if self.bias is None else y + self.bias[...][start:stop]


def quantize(x: Float[Array, "..."], count: int) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Return eight-bit numbers and the float32 scale that gives `x` back, one for each row of its last `count` axes.

    The largest number of a row becomes the largest of the format; a row of zeros has the scale 1.
    """
    wide = x.astype(FLOAT32)
    largest = jnp.max(jnp.abs(wide), axis=tuple(range(x.ndim - count, x.ndim)), keepdims=True)
    scale = jnp.where(largest > 0, largest / LARGEST, jnp.ones_like(largest))
    # rounding may go past the largest, which has no infinity behind it but NaN
    return jnp.clip(wide / scale, -LARGEST, LARGEST).astype(FLOAT8), scale


def contract_last(
    x: Float[Array, "..."], kernel: Float[Array, "..."], count: int, dtype: DTypeLike
) -> Float[Array, "..."]:
    """Contract the last `count` axes of both; as matrices where no mesh wants the axes kept (see `Linear`)."""
    if not jax.sharding.get_abstract_mesh().empty:
        ours, theirs = (range(array.ndim - count, array.ndim) for array in (x, kernel))
        return jax.lax.dot_general(x, kernel, ((ours, theirs), ((), ())), preferred_element_type=jnp.dtype(dtype))
    rows, columns = x.shape[: x.ndim - count], kernel.shape[: kernel.ndim - count]
    inner = math.prod(x.shape[x.ndim - count :])
    product = jax.lax.dot_general(
        x.reshape(math.prod(rows), inner),
        kernel.reshape(math.prod(columns), inner),
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.dtype(dtype),
    )
    return product.reshape(*rows, *columns)


def quantize_linears(weights: Weights, paths: Sequence[str], mesh: Mesh | None) -> Weights:
    """Return a network whose linear maps at `paths`, where `*` is a number, are in eight bits; one after the other."""
    module = weights.module()
    for path, found in list(nnx.iter_modules(module)):
        for name, linear in list(vars(found).items()):
            whole = ".".join(map(str, (*path, name)))
            if isinstance(linear, Linear) and any(fnmatch.fnmatchcase(whole, pattern) for pattern in paths):
                setattr(found, name, Float8Linear(linear, mesh, whole))
    return Weights.of(module)


def check_linear(linear: str, paths: Sequence[str], family: str, device: Any) -> bool:
    """Say whether linear maps are to be in eight bits.

    Raises:
        RequestError: for an unknown form, or one that the family does not have.
        JoyJaxError: for a GPU that does not multiply eight-bit floats.
    """
    if not isinstance(linear, str) or linear not in LINEARS:
        raise RequestError(f"linear is {linear!r}; choose one of: {', '.join(LINEARS)}")
    if linear == "exact":
        return False
    if not paths:
        raise RequestError(f"linear is {linear!r}, but {family} has no such form; leave it out")
    capability = getattr(device, "compute_capability", None)
    if device.platform == "gpu" and capability is not None and float(capability) < CAPABILITY:
        raise JoyJaxError(
            f"linear is {linear!r}, but {device.device_kind} has compute capability {capability} and eight-bit floats "
            f"need {CAPABILITY}; leave it out"
        )
    return True


def _quantize_kernel(kernel: Float[Array, "..."], count: int) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Return the kernel with its output axes first, and its scales, one for each output channel."""
    order = (*range(count, kernel.ndim), *range(count))
    numbers, scale = quantize(jnp.transpose(kernel, order), count)
    return numbers, scale.reshape(scale.shape[: kernel.ndim - count])
