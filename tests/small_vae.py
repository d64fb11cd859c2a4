"""A small autoencoder with strong random weights, biases too, and arrays to run it on."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from joyjax.convert.wan_vae import VAE
from joyjax.layers.weights import Weights, leaves
from joyjax.models.autoencoder.wan import WanVAEConfig

encode = jax.jit(lambda weights, pixels, size=None: weights.module().encode(pixels, size=size))
decode = jax.jit(lambda weights, latents, size=None: weights.module().decode(latents, size=size))


def make_vae(dim_mult: tuple[int, ...] = (1, 2), dtype: DTypeLike = jnp.float32) -> Weights:
    """Return the network; each step between the levels of `dim_mult` halves the sides."""
    config = WanVAEConfig(
        base_dim=8,
        z_dim=4,
        dim_mult=dim_mult,
        num_res_blocks=1,
        temperal_downsample=(True,) * (len(dim_mult) - 1),
        latents_mean=(0.5, -1.0, 0.0, 0.25),
        latents_std=(0.5, 2.0, 1.0, 1.5),
    )
    abstract = VAE.abstract(config, dtype)
    rng = np.random.default_rng(1)
    return abstract.filled(
        {
            path: jnp.asarray(1.5 * rng.standard_normal(leaf.shape) / np.prod(leaf.shape[:-1]) ** 0.5, dtype)
            for path, leaf in leaves(abstract.state).items()
        }
    )


def draw(batch: int, height: int, width: int, factor: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Return pixels in [-1, 1] of this size, and unrelated latents for it, each `factor` pixels wide."""
    rng = np.random.default_rng(0)
    pixels = rng.uniform(-1, 1, (batch, height, width, 3)).astype(np.float32)
    return pixels, rng.standard_normal((batch, height // factor, width // factor, 4)).astype(np.float32)


def pad_with_nan(x: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return pictures at the top left of this size, padded with NaN."""
    padded = np.full((len(x), height, width, x.shape[-1]), np.nan, x.dtype)
    padded[:, : x.shape[1], : x.shape[2]] = x
    return padded
