"""Fine-tuning of the decoder on the transformer's results.

The errors of the transformer's latents are structured, unlike noise: an edge between two positions, a hole that is half
closed. Here text encoder, transformer and encoder are frozen, edits are sampled as in inference, and the decoder is
trained to decode the results to the expected pictures.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float32, UInt8

from joyjax.convert.wan_vae import VAE
from joyjax.families.family import Parts
from joyjax.layers.patch import pixels_to_unit, unpatchify
from joyjax.layers.weights import Weights
from joyjax.models.autoencoder.wan import WanVAE
from joyjax.sampling.euler import euler_step
from joyjax.training.autoencoder import compare
from joyjax.training.dataset import Batch
from joyjax.training.flow import TIMESTEPS, make_condition
from joyjax.training.optimizer import Parameters
from joyjax.training.run import Loss, cast


@dataclasses.dataclass(frozen=True)
class RefineConfig:
    """The recipe. Every `clean`-th picture is decoded from its own noisy latents, as in the first training."""

    steps: int = 900
    batch: int = 16
    clean: int = 4
    noise: float = 0.35  # largest standard deviation, relative to that of the latent channel
    muon_rate: float = 0.006
    adam_rate: float = 1e-3


@dataclasses.dataclass(frozen=True)
class Samples:
    """Latent tokens and the pictures to decode them to."""

    tokens: Float32[Array, "B T P"]
    pictures: UInt8[Array, "B h w 3"]


jax.tree_util.register_dataclass(Samples, data_fields=["tokens", "pictures"], meta_fields=[])


def make_results(
    config: RefineConfig,
    parts: Parts,
    networks: Mapping[str, Weights],
    stream: Callable[[int], Batch],
    *,
    text: int,
    steps: int,
    seed: int,
) -> Callable[[int], Samples]:
    """Return the function from a step's number to results of the networks, in `steps` steps without guidance."""
    table = parts.solver.levels(steps, None, None)
    levels = jnp.asarray(table.sigma[:, 0]), jnp.asarray(table.sigma_next[:, 0])

    @jax.jit
    def sample(text_encoder: Weights, transformer: Weights, batch: Batch, key: Array) -> Samples:
        condition = make_condition(text_encoder.module(), parts, batch, text)
        network, keys = transformer.module(), jax.random.split(key, 3)
        noise = jax.random.normal(keys[0], batch.targets.shape)

        def step(latents: Array, level: tuple[Array, Array]) -> tuple[Array, None]:
            velocity = network(latents, jnp.full((len(latents),), TIMESTEPS * level[0]), condition)
            return euler_step(latents, velocity, *level), None

        tokens, _ = jax.lax.scan(step, noise, levels)
        rows = jnp.arange(len(tokens))[:, None, None]
        strength = config.noise * jax.random.uniform(keys[1], (len(tokens), 1, 1))
        near = batch.targets + strength * jax.random.normal(keys[2], tokens.shape)
        return Samples(jnp.where(rows % config.clean == 0, near, tokens), batch.results)

    def batch(number: int) -> Samples:
        key = jax.random.fold_in(jax.random.key(seed), number)
        return sample(networks["text_encoder"], networks["transformer"], stream(number), key)

    return batch


def make_loss(parts: Parts, dtype: DTypeLike) -> Loss:
    """Return the loss of samples."""
    config = parts.configs["vae"]
    patch, abstract = parts.configs["transformer"].patch, VAE.abstract(config, dtype)
    mean, std = jnp.asarray(config.latents_mean), jnp.asarray(config.latents_std)

    def loss(parameters: Parameters, batch: Samples, key: Array) -> tuple[Array, dict[str, Array]]:
        vae: WanVAE = cast(parameters, abstract).module()
        width = round(batch.tokens.shape[1] ** 0.5)
        decoded = vae.decode_raw(unpatchify(batch.tokens, patch, width) * std + mean)
        total, psnr = compare(decoded, pixels_to_unit(batch.pictures))
        return total, {"loss": total, "psnr": psnr}

    return loss
