"""The dtype policy, in one place.

Parameters and matrix products use one dtype, bfloat16 by default. Norm statistics, softmax, RoPE, the timestep
embedding, the schedule and the latents between steps are always float32, by explicit casts to `FLOAT32`. Nothing is
promoted implicitly; the tests run with JAX's strict promotion.
"""

import contextlib

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401 - registers bfloat16 with NumPy, which safetensors needs for bfloat16 arrays
import numpy as np

from joyjax.errors import RequestError
from joyjax.options import DTYPES

FLOAT32 = jnp.float32

NAMES = DTYPES  # of computation
STORED = ("bfloat16", "float16", "float32")  # of parameters in a file


def by_name(name: str) -> np.dtype:
    """Return the NumPy dtype called `name`, one of `NAMES`.

    Raises:
        RequestError: for any other name.
    """
    if name not in NAMES:
        raise RequestError(f"dtype {name!r} is not available; choose one of: {', '.join(NAMES)}")
    return np.dtype(name)


def full_products(name: str) -> contextlib.AbstractContextManager[object]:
    """Return a context in which the products of a network of this dtype keep the precision of their inputs.

    By default an NVIDIA GPU rounds the inputs of float32 products to TF32, which has ten bits of mantissa. Products of
    bfloat16 are exact before they are summed; for them nothing changes.
    """
    return jax.default_matmul_precision("highest") if name == "float32" else contextlib.nullcontext()
