"""Classifier-free guidance (Ho and Salimans, 2022), with the norm of the conditional prediction restored."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def guide(
    conditional: Float[Array, "b T P"],
    unconditional: Float[Array, "b T P"],
    scale: Float[Array, ""],
    channels: int,
) -> Float[Array, "b T P"]:
    """Extrapolate from the unconditional to the conditional velocity, then rescale each latent pixel.

    A token holds whole latent pixels, `channels` numbers each, and the norm is taken over one pixel: JoyImage's rule.
    Source: the denoising loop of JoyImageEditPipeline in Diffusers.
    """
    shape = conditional.shape
    conditional = conditional.reshape(*shape[:2], -1, channels)
    unconditional = unconditional.reshape(*shape[:2], -1, channels)
    combined = unconditional + scale * (conditional - unconditional)
    wanted = jnp.linalg.norm(conditional, axis=-1, keepdims=True)
    norm = jnp.linalg.norm(combined, axis=-1, keepdims=True)
    return (combined * (wanted / jnp.maximum(norm, 1e-6))).reshape(shape)
