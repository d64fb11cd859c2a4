"""Training the autoencoder on pictures: L1 and squared error, and a small Kullback-Leibler term.

At the end the encoder is frozen and the decoder trains on noisy latents, so that small errors of the transformer do not
appear as blotches on flat colours.
"""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from joyjax.convert.wan_vae import VAE
from joyjax.layers.patch import pixels_to_unit
from joyjax.models.autoencoder.wan import WanVAE, WanVAEConfig
from joyjax.shapes.draw import render
from joyjax.shapes.scene import SIDE, random_scene
from joyjax.training.optimizer import Parameters
from joyjax.training.run import Loss, cast

DECODER = ("decoder.", "post_quant.")  # prefixes of the decoder's parameters


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """The recipe: `steps` on square crops, the last of them on whole pictures; then `decoder_steps` of the decoder."""

    steps: int = 2000
    batch: int = 16
    crop: int = 64  # side of the squares
    whole_from: float = 0.8  # of the steps: from here whole pictures
    whole_batch: int = 4
    kl: float = 1e-4
    decoder_steps: int = 700
    noise: float = 0.35  # largest standard deviation, relative to that of the latent channel


def make_loss(config: WanVAEConfig, dtype: DTypeLike, *, kl: float, noise: float | None) -> Loss:
    """Return the loss of uint8 pictures `[b, h, w, 3]`; with `noise`, that of the decoder only."""
    abstract = VAE.abstract(config, dtype)

    def loss(parameters: Parameters, pictures: UInt8[Array, "b h w 3"], key: Array) -> tuple[Array, dict[str, Array]]:
        vae: WanVAE = cast(parameters, abstract).module()
        pixels = pixels_to_unit(pictures)
        mean, log_variance = vae.moments(pixels)
        keys = jax.random.split(key)
        if noise is None:
            latents = mean + jnp.exp(log_variance / 2) * jax.random.normal(keys[0], mean.shape)
        else:
            mean = jax.lax.stop_gradient(mean)
            strength = noise * jnp.std(mean, axis=(0, 1, 2)) * jax.random.uniform(keys[1], (len(mean), 1, 1, 1))
            latents = mean + strength * jax.random.normal(keys[0], mean.shape)
        difference, psnr = compare(vae.decode_raw(latents), pixels)
        divergence = jnp.mean(mean**2 + jnp.exp(log_variance) - 1 - log_variance) / 2
        total = difference + (kl * divergence if noise is None else 0)
        return total, {"loss": total, "psnr": psnr, "kl": divergence}

    return loss


def compare(decoded: Float[Array, "b h w 3"], pixels: Float[Array, "b h w 3"]) -> tuple[Array, Array]:
    """Return the mean of absolute and squared differences, and the PSNR in dB, of pixels from -1 to 1."""
    error = decoded - pixels
    absolute, squared = jnp.mean(jnp.abs(error)), jnp.mean(error**2)
    return absolute + squared, -10 * jnp.log10(squared / 4)


def make_batches(config: AutoencoderConfig, seed: int, *, whole: bool) -> Callable[[int], UInt8[np.ndarray, "b h w 3"]]:
    """Return the function from a step's number to its pictures."""

    def batch(step: int) -> UInt8[np.ndarray, "b h w 3"]:
        rng = np.random.default_rng((seed, step))
        if whole or step >= config.whole_from * config.steps:
            return np.stack([render(random_scene(rng)) for _ in range(config.whole_batch)])
        crops = []
        for _ in range(config.batch):
            y, x = rng.integers(0, SIDE - config.crop + 1, 2)
            crops.append(render(random_scene(rng))[y : y + config.crop, x : x + config.crop])
        return np.stack(crops)

    return batch


def latent_statistics(
    vae: WanVAE, pictures: Iterator[UInt8[np.ndarray, "b h w 3"]]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each latent channel over batches of pictures."""
    moments = jax.jit(lambda pixels: vae.moments(pixels_to_unit(pixels))[0])
    latents = np.concatenate([np.asarray(moments(batch)).reshape(-1, vae.config.z_dim) for batch in pictures])
    return tuple(latents.mean(axis=0).tolist()), tuple(latents.std(axis=0).tolist())
