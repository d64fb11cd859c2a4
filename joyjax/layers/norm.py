"""Normalisations. Statistics and scaling are float32; the result is rounded once, to the dtype of the input."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from joyjax.dtypes import FLOAT32
from joyjax.kernels.modulate import layer_norm
from joyjax.layers.parameter import parameter


def rms_norm(x: Float[Array, "... H"], scale: Float[Array, " H"], eps: float) -> Float[Array, "... H"]:
    """Divide by the root mean square of the last axis, then scale. Returns float32."""
    x = x.astype(FLOAT32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * scale.astype(FLOAT32)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation of the last axis (Zhang and Sennrich, 2019)."""

    def __init__(self, features: int, *, eps: float, axis: str | None, dtype: DTypeLike, rngs: nnx.Rngs | None):
        self.scale = parameter(rngs, (features,), (axis,), dtype, init="ones")
        self.eps = eps

    @jax.named_scope("norm")
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalise the last axis."""
        return rms_norm(x, self.scale[...], self.eps).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer normalisation with scale and bias (Ba et al., 2016)."""

    def __init__(self, features: int, *, eps: float, axis: str | None, dtype: DTypeLike, rngs: nnx.Rngs | None):
        self.scale = parameter(rngs, (features,), (axis,), dtype, init="ones")
        self.bias = parameter(rngs, (features,), (axis,), dtype, init="zeros")
        self.eps = eps

    @jax.named_scope("norm")
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalise the last axis."""
        y = layer_norm(x, self.eps)
        return (y * self.scale[...].astype(FLOAT32) + self.bias[...].astype(FLOAT32)).astype(x.dtype)


class ChannelNorm(nnx.Module):
    """L2 normalisation of the channels, times √C and a scale: the norm of the Wan VAE.

    Not an RMS norm with an epsilon under the root: the norm itself is bounded below by 1e-12.
    Source: WanRMS_norm in Diffusers' autoencoder_kl_wan.py.
    """

    def __init__(self, features: int, *, axis: str | None, dtype: DTypeLike, rngs: nnx.Rngs | None):
        self.scale = parameter(rngs, (features,), (axis,), dtype, init="ones")
        self.features = features

    @jax.named_scope("norm")
    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
        """Normalise the last axis."""
        y = x.astype(FLOAT32)
        norm = jnp.sqrt(jnp.sum(y * y, axis=-1, keepdims=True))
        y = y / jnp.maximum(norm, 1e-12) * self.features**0.5 * self.scale[...].astype(FLOAT32)
        return y.astype(x.dtype)
