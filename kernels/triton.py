"""What the kernels in Pallas's Triton backend share; it is deprecated, and kept for GPUs before Hopper alone."""

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
    """Return this program's place on an axis of the grid."""
    return pallas.program_id(axis)


def masked(size: int) -> tuple[Array, Array]:
    """Return the places of a block that holds `size` numbers, and which are there: blocks are powers of two."""
    places = jnp.arange(1 << (size - 1).bit_length())
    return places, places < size


def load(ref: Any, place: tuple[Any, ...], there: Array) -> Array:
    """Read what is there, and zeros elsewhere."""
    from jax.experimental.pallas import triton

    return triton.load(ref.at[place], mask=there, other=0)


def store(ref: Any, place: tuple[Any, ...], there: Array, value: jax.Array) -> None:
    """Write what is there."""
    from jax.experimental.pallas import triton

    triton.store(ref.at[place], value, mask=there)
