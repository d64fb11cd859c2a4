"""Layer normalisation followed by a scale and shift that depend on the diffusion time.

The modulation of a diffusion transformer (Peebles and Xie, 2023): `LN(x)·(1 + scale) + shift`, with no parameters in
the norm itself. Everything between load and store is float32; results are rounded once, to the dtype of `x`.

The `select01` forms (Qwen-Image-Edit-2511) have two of every vector, and `index` selects one for each token. Gates are
not expanded to tokens: the next residual selects by the same index.

`implementation`: "reference", left to XLA; "mosaic" or "triton", a kernel (modulate_pallas.py); None, by the rule in
dispatch.py. A kernel takes one device's arrays: under a mesh, call it inside `on_shards`.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from joyjax.dtypes import FLOAT32
from joyjax.kernels import modulate_pallas
from joyjax.kernels.dispatch import check_name, pallas, with_gradient_of

Implementation = Literal["reference", "mosaic", "triton"] | None


def layer_norm(x: Float[Array, "... D"], eps: float = 1e-6) -> Float[Array, "... D"]:
    """Return `(x - mean)/√(variance + eps)` over the last axis, in float32, from the variance about the mean."""
    centred = x.astype(FLOAT32) - jnp.mean(x.astype(FLOAT32), axis=-1, keepdims=True)
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

    def reference(x: Array, scale: Array, shift: Array) -> Array:
        return _modulated(x.astype(FLOAT32), scale[:, None], shift[:, None], eps).astype(x.dtype)

    def kernel(x: Array, scale: Array, shift: Array) -> Array:
        return modulate_pallas.modulate(x, scale[:, None], shift[:, None], backend=str(backend), eps=eps)[0]

    backend = pallas("layer_norm_scale_shift", implementation)
    return reference(x, scale, shift) if backend is None else with_gradient_of(reference, kernel)(x, scale, shift)


def layer_norm_scale_shift_select01(
    x: Float[Array, "B L D"],
    scale: Float[Array, "B 2 D"],
    shift: Float[Array, "B 2 D"],
    index: Int[Array, "B L"] | Bool[Array, "B L"],
    *,
    eps: float = 1e-6,
    implementation: Implementation = None,
) -> Float[Array, "B L D"]:
    """Return `LN(x)·(1 + scale) + shift`; token l of row b uses `scale[b, index[b, l]]`, and `shift` likewise."""

    def reference(x: Array, scale: Array, shift: Array, index: Array) -> Array:
        return _modulated(x.astype(FLOAT32), _pick(scale, index), _pick(shift, index), eps).astype(x.dtype)

    def kernel(x: Array, scale: Array, shift: Array, index: Array) -> Array:
        return modulate_pallas.modulate(x, scale, shift, None, None, index, backend=str(backend), eps=eps)[0]

    backend = pallas("layer_norm_scale_shift_select01", implementation)
    run = reference if backend is None else with_gradient_of(reference, kernel)
    return run(x, scale, shift, index)


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
    """Return `r = residual + gate·x` and `LN(r)·(1 + scale) + shift`; the norm takes the unrounded r."""

    def reference(residual: Array, x: Array, gate: Array, scale: Array, shift: Array) -> tuple[Array, Array]:
        r = _gated(residual, x, gate[:, None])
        return r.astype(x.dtype), _modulated(r, scale[:, None], shift[:, None], eps).astype(x.dtype)

    def kernel(residual: Array, x: Array, gate: Array, scale: Array, shift: Array) -> tuple[Array, Array]:
        gate, scale, shift = gate[:, None], scale[:, None], shift[:, None]
        y, r = modulate_pallas.modulate(x, scale, shift, residual, gate, backend=str(backend), eps=eps)
        return r, y

    backend = pallas("residual_gate_layer_norm_scale_shift", implementation)
    run = reference if backend is None else with_gradient_of(reference, kernel)
    return run(residual, x, gate, scale, shift)


def residual_gate_layer_norm_scale_shift_select01(
    residual: Float[Array, "B L D"],
    x: Float[Array, "B L D"],
    gate: Float[Array, "B 2 D"],
    scale: Float[Array, "B 2 D"],
    shift: Float[Array, "B 2 D"],
    index: Int[Array, "B L"] | Bool[Array, "B L"],
    *,
    eps: float = 1e-6,
    implementation: Implementation = None,
) -> tuple[Float[Array, "B L D"], Float[Array, "B L D"]]:
    """Return `r = residual + gate·x` and `LN(r)·(1 + scale) + shift`, with vectors selected by `index`."""

    def reference(
        residual: Array, x: Array, gate: Array, scale: Array, shift: Array, index: Array
    ) -> tuple[Array, Array]:
        r = _gated(residual, x, _pick(gate, index))
        return r.astype(x.dtype), _modulated(r, _pick(scale, index), _pick(shift, index), eps).astype(x.dtype)

    def kernel(residual: Array, x: Array, gate: Array, scale: Array, shift: Array, index: Array) -> tuple[Array, Array]:
        y, r = modulate_pallas.modulate(x, scale, shift, residual, gate, index, backend=str(backend), eps=eps)
        return r, y

    backend = pallas("residual_gate_layer_norm_scale_shift_select01", implementation)
    run = reference if backend is None else with_gradient_of(reference, kernel)
    return run(residual, x, gate, scale, shift, index)


def residual_gate(
    residual: Float[Array, "B L D"],
    x: Float[Array, "B L D"],
    gate: Float[Array, "B D"],
    *,
    implementation: Literal["reference"] | None = None,
) -> Float[Array, "B L D"]:
    """Return `residual + gate·x`. Elementwise, so XLA fuses it with its neighbours."""
    check_name("residual_gate", implementation, ("reference",))
    return _gated(residual, x, gate[:, None]).astype(x.dtype)


def residual_gate_select01(
    residual: Float[Array, "B L D"],
    x: Float[Array, "B L D"],
    gate: Float[Array, "B 2 D"],
    index: Int[Array, "B L"] | Bool[Array, "B L"],
    *,
    implementation: Literal["reference"] | None = None,
) -> Float[Array, "B L D"]:
    """Return `residual + gate·x`, with each token's gate selected by `index`."""
    check_name("residual_gate_select01", implementation, ("reference",))
    return _gated(residual, x, _pick(gate, index)).astype(x.dtype)


def _gated(
    residual: Float[Array, "B L D"], x: Float[Array, "B L D"], gate: Float[Array, "B _ D"]
) -> Float[Array, "B L D"]:
    return residual.astype(FLOAT32) + gate.astype(FLOAT32) * x.astype(FLOAT32)


def _modulated(
    x: Float[Array, "B L D"], scale: Float[Array, "B _ D"], shift: Float[Array, "B _ D"], eps: float
) -> Float[Array, "B L D"]:
    return layer_norm(x, eps) * (1 + scale.astype(FLOAT32)) + shift.astype(FLOAT32)


def _pick(pair: Float[Array, "B 2 D"], index: Int[Array, "B L"] | Bool[Array, "B L"]) -> Float[Array, "B L D"]:
    """Select with `where`: unlike a gather it can be fused, and its gradient is a plain sum."""
    return jnp.where(index.astype(bool)[:, :, None], pair[:, 1:], pair[:, :1])
