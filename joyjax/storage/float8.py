"""A kernel in eight bits: float8_e4m3fn with a float32 scale for each output channel.

An approximation, used only on request. Inputs are quantized to the same format in the product, with one scale for each
row, so that no row depends on its neighbours in a batch or on padding. Both scales are applied after the product. XLA
then calls cuBLASLt's float8 product on GPUs from Ada and Hopper on; on other devices it multiplies the same values in
another dtype. With a scale for each channel inside the product, XLA would multiply in sixteen bits.
Format: Micikevicius et al., 2022, "FP8 Formats for Deep Learning".
"""

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from joyjax.dtypes import FLOAT32
from joyjax.errors import JoyJaxError
from joyjax.storage.product import contract_first, contract_last

FLOAT8 = jnp.float8_e4m3fn
LARGEST = 448.0  # finite value of the format
CAPABILITY = 8.9  # of the first NVIDIA GPUs that multiply it

Axes = tuple[str | None, ...]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["q", "scale"], meta_fields=["shape", "dtype"])
@dataclasses.dataclass(frozen=True)
class Float8:
    """A kernel as `q` `[*out, *in]` in float8 and `scale` `[*out]` in float32.

    `shape` is the kernel's own, `[*in, *out]`, and `dtype` that of the map's result.
    """

    q: Any
    scale: Any
    shape: tuple[int, ...]
    dtype: str

    name: ClassVar[str] = "float8"
    dtypes: ClassVar[tuple[str, ...]] = ("float8_e4m3fn", "float32")

    @property
    def size(self) -> int:
        """The number of parameters of the kernel."""
        return math.prod(self.shape)

    @classmethod
    def abstract(cls, shape: tuple[int, ...], inputs: int, dtype: DTypeLike) -> "Float8":
        """Return the leaf of a kernel whose first `inputs` axes are contracted, with shapes in place of arrays."""
        out = shape[inputs:]
        q = jax.ShapeDtypeStruct((*out, *shape[:inputs]), FLOAT8)
        return cls(q, jax.ShapeDtypeStruct(out, FLOAT32), tuple(shape), jnp.dtype(dtype).name)

    @classmethod
    def quantize(cls, rows: Float[Array, "..."], inputs: int) -> dict[str, Float[Array, "..."]]:
        """Return the arrays of a kernel `[*out, *in]`, or of some of its rows."""
        q, scale = quantize(rows, inputs)
        return {"q": q, "scale": scale.reshape(scale.shape[: rows.ndim - inputs])}

    @classmethod
    def array_axes(cls, axes: Axes, inputs: int) -> dict[str, Axes]:
        """Return the logical axes of each array, given the kernel's."""
        return {"q": (*axes[inputs:], *axes[:inputs]), "scale": axes[inputs:]}

    @staticmethod
    def check_device(device: Any, cause: str) -> None:
        """Raise JoyJaxError, beginning with `cause`, for a GPU that does not multiply eight-bit floats."""
        capability = getattr(device, "compute_capability", None)
        if device.platform == "gpu" and capability is not None and float(capability) < CAPABILITY:
            raise JoyJaxError(
                f"{cause}, but {device.device_kind} has compute capability {capability} and eight-bit floats need "
                f"{CAPABILITY}; load the model that is not quantized, without the option"
            )

    def contract(self, x: Float[Array, "..."], count: int, start: int, stop: int | None) -> Float[Array, "..."]:
        """Multiply with the outputs `start` to `stop` of the first output axis; see `forms.contract`."""
        return _contract(count, self.dtype, x, self.q[start:stop], self.scale[start:stop])


def quantize(x: Float[Array, "..."], count: int) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Return `x` / scale in float8, and the float32 scale of each row of its last `count` axes.

    The largest value of a row becomes the largest of the format; a row of zeros has the scale 1.
    """
    wide = x.astype(FLOAT32)
    largest = jnp.max(jnp.abs(wide), axis=tuple(range(x.ndim - count, x.ndim)), keepdims=True)
    scale = jnp.where(largest > 0, largest / LARGEST, jnp.ones_like(largest))
    # Division may round past the largest value; the format has no infinity, so the cast would return NaN.
    return jnp.clip(wide / scale, -LARGEST, LARGEST).astype(FLOAT8), scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _contract(
    count: int, dtype: str, x: Float[Array, "..."], q: Float[Array, "..."], scale: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Return `x` in float8 times `q`, scaled, in `dtype`.

    The gradient in `x` is straight-through: that of the product with the dequantized kernel. JAX's own gradient would
    cast cotangents to float8 without a scale, and small ones to zero.
    """
    rounded, row_scale = quantize(x, count)
    product = contract_last(rounded, q, count, dtype).astype(FLOAT32)
    product = product * row_scale.reshape(row_scale.shape[: x.ndim - count] + (1,) * scale.ndim) * scale
    return product.astype(dtype)


def _forward(
    count: int, dtype: str, x: Float[Array, "..."], q: Float[Array, "..."], scale: Float[Array, "..."]
) -> tuple[Float[Array, "..."], Any]:
    # The backward pass needs only the dtype of `x`; residuals must be arrays.
    return _contract(count, dtype, x, q, scale), (jnp.zeros((), x.dtype), q, scale)


def _backward(count: int, dtype: str, kept: Any, cotangent: Float[Array, "..."]) -> Any:
    like, q, scale = kept
    # The cotangent is scaled, not `q`: bfloat16 holds every float8 value exactly.
    scaled = (cotangent.astype(FLOAT32) * scale).astype(dtype)
    return contract_first(scaled, q.astype(dtype), scale.ndim).astype(like.dtype), None, None


_contract.defvjp(_forward, _backward)
