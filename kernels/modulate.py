"""Layer normalisation followed by a scale and shift that depend on the diffusion time.

The modulation of a diffusion transformer (Peebles and Xie, 2023): `LN(x)·(1 + scale) + shift`, with no parameters in
the norm itself. Everything between load and store is float32; results are rounded once, to the dtype of `x`.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from joyjax.dtypes import ISLAND

Implementation = Literal["reference"] | None


def layer_norm(x: Float[Array, "... D"], eps: float = 1e-6) -> Float[Array, "... D"]:
    """Return `(x - mean)/√(variance + eps)` over the last axis, in float32, from the variance about the mean."""
    centred = x.astype(ISLAND) - jnp.mean(x.astype(ISLAND), axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)


def layer_norm_scale_shift(
    x: Float[Array, "B L D"],
    scale: Float[Array, "B D"],
    shift: Float[Array, "B D"],
    *,
    eps: float = 1e-6,
    implementation: Implementation = None,
) -> Float[Array, "B L D"]:
    """Return `LN(x)·(1 + scale) + shift`, with one scale and shift for each row of the batch."""
    _check(implementation)
    return _modulated(x.astype(ISLAND), scale, shift, eps).astype(x.dtype)


def residual_gate_layer_norm_scale_shift(
    residual: Float[Array, "B L D"],
    x: Float[Array, "B L D"],
    gate: Float[Array, "B D"],
    scale: Float[Array, "B D"],
    shift: Float[Array, "B D"],
    *,
    eps: float = 1e-6,
    implementation: Implementation = None,
) -> tuple[Float[Array, "B L D"], Float[Array, "B L D"]]:
    """Return `r = residual + gate·x` and `LN(r)·(1 + scale) + shift`; the norm sees r before it is rounded."""
    _check(implementation)
    r = _gated(residual, x, gate)
    return r.astype(x.dtype), _modulated(r, scale, shift, eps).astype(x.dtype)


def residual_gate(
    residual: Float[Array, "B L D"],
    x: Float[Array, "B L D"],
    gate: Float[Array, "B D"],
    *,
    implementation: Implementation = None,
) -> Float[Array, "B L D"]:
    """Return `residual + gate·x`."""
    _check(implementation)
    return _gated(residual, x, gate).astype(x.dtype)


def _gated(
    residual: Float[Array, "B L D"], x: Float[Array, "B L D"], gate: Float[Array, "B D"]
) -> Float[Array, "B L D"]:
    return residual.astype(ISLAND) + gate[:, None].astype(ISLAND) * x.astype(ISLAND)


def _modulated(
    x: Float[Array, "B L D"], scale: Float[Array, "B D"], shift: Float[Array, "B D"], eps: float
) -> Float[Array, "B L D"]:
    return layer_norm(x, eps) * (1 + scale[:, None].astype(ISLAND)) + shift[:, None].astype(ISLAND)


def _check(implementation: Implementation) -> None:
    if implementation not in (None, "reference"):
        raise ValueError(f"modulation has no implementation {implementation!r}; there is: 'reference'")
