"""The sinusoidal embedding of the diffusion time."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from joyjax.dtypes import FLOAT32


def timestep_embedding(timestep: Float[Array, " B"], channels: int, scale: float = 1.0) -> Float[Array, "B C"]:
    """Return [cos, sin] of `scale` times the time at `channels`/2 frequencies from 1 towards 1/10000, in float32.

    Source: Timesteps in Diffusers' embeddings.py with flip_sin_to_cos and no frequency shift.
    """
    half = channels // 2
    exponent = -np.log(np.float32(10000)) * np.arange(half, dtype=np.float32) / np.float32(half)
    angle = timestep.astype(FLOAT32)[:, None] * np.exp(exponent) * np.float32(scale)
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
