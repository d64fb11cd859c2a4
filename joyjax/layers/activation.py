"""Activations between two linear maps."""

import jax
from jaxtyping import Array, Float

from joyjax.dtypes import FLOAT32
from joyjax.kernels.dispatch import on_cpu


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return GELU in its tanh approximation, rounded once to the dtype of `x`, as in torch.

    XLA merges the form in the dtype of `x` into the product before it on a GPU, where cuBLASLt computes in float32. On
    a CPU it would round after each of the operations, which takes 6 % of a step in bfloat16.
    """
    wide = x.astype(FLOAT32) if on_cpu() else x
    return jax.nn.gelu(wide, approximate=True).astype(x.dtype)


def swiglu(gate: Float[Array, "..."], up: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return the gate's SiLU times `up` (Shazeer, 2020); float32 inside."""
    return (jax.nn.silu(gate.astype(FLOAT32)) * up.astype(FLOAT32)).astype(up.dtype)
