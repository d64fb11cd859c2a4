"""Helpers of the kernels in Pallas's Triton backend, which is deprecated and kept for GPUs before Hopper."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas
from jaxtyping import Array

from joyjax.kernels.dispatch import interpreted

WARPS = 4


def call(body: Any, out_shape: Any, grid: tuple[int, ...], *arguments: Any) -> Any:
    """Run a body over a grid, on refs of the whole arguments and results."""
    from jax.experimental.pallas import triton

    parameters = triton.CompilerParams(num_warps=WARPS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the backend itself; see above
        run = pallas.pallas_call(
            body, out_shape=out_shape, grid=grid, interpret=interpreted(), compiler_params=parameters
        )
        return run(*arguments)


def program(axis: int) -> Array:
    """Return this program's index on an axis of the grid."""
    return pallas.program_id(axis)


def masked(size: int) -> tuple[Array, Array]:
    """Return the indices of a block that covers `size` elements, and their mask. Block sizes are powers of two."""
    indices = jnp.arange(1 << (size - 1).bit_length())
    return indices, indices < size


def load(ref: Any, index: tuple[Any, ...], mask: Array) -> Array:
    """Load where the mask is set, zeros elsewhere."""
    from jax.experimental.pallas import triton

    return triton.load(ref.at[index], mask=mask, other=0)


def store(ref: Any, index: tuple[Any, ...], mask: Array, value: jax.Array) -> None:
    """Store where the mask is set."""
    from jax.experimental.pallas import triton

    triton.store(ref.at[index], value, mask=mask)
