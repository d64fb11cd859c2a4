"""Classifier-free guidance (Ho and Salimans, 2022), with the norm of the conditional prediction restored."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def guide(velocity: Float[Array, "2 b T P"], scale: Float[Array, "..."], channels: int) -> Float[Array, "b T P"]:
    """Extrapolate from the unconditional velocity, the first, to the conditional one, then rescale each latent pixel.

    `scale` is each edit's own, or one number for all.

    A token holds whole latent pixels, `channels` numbers each, and the norm is taken over one pixel: JoyImage's rule.
    All that is needed of both is one weighted sum, so that where they lie on two devices one all-reduce brings it.
    Source: the denoising loop of JoyImageEditPipeline in Diffusers.
    """
    pixels = velocity.reshape(*velocity.shape[:3], -1, channels)
    squares = jnp.sum(pixels**2, axis=-1, keepdims=True)
    scale = scale.reshape(-1)  # [1] or [b]
    of_pixels = jnp.broadcast_to(jnp.stack([1 - scale, scale])[..., None], (2, scale.size, channels))
    of_squares = jnp.broadcast_to(jnp.array([0, 1], squares.dtype)[:, None, None], (2, scale.size, 1))
    weights = jnp.concatenate([of_pixels, of_squares], axis=-1)[:, :, None, None]  # squares: of the conditional alone
    total = jnp.sum(jnp.concatenate([pixels, squares], axis=-1) * weights, axis=0)
    combined, wanted = total[..., :-1], jnp.sqrt(total[..., -1:])
    norm = jnp.linalg.norm(combined, axis=-1, keepdims=True)
    return (combined * (wanted / jnp.maximum(norm, 1e-6))).reshape(velocity.shape[1:])
