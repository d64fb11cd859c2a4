"""The autoencoder with its rows split over devices gives the pictures that it gives on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from joyjax.convert.wan_vae import VAE
from joyjax.layers.weights import Weights, leaves
from joyjax.models.wan_vae import WanVAEConfig

encode = jax.jit(lambda weights, pixels: weights.module().encode(pixels))
decode = jax.jit(lambda weights, latents: weights.module().decode(latents))


@pytest.fixture(scope="module")
def weights() -> Weights:
    config = WanVAEConfig(
        base_dim=8,
        z_dim=4,
        dim_mult=(1, 2),
        num_res_blocks=1,
        temperal_downsample=(True,),
        latents_mean=(0.5, -1.0, 0.0, 0.25),
        latents_std=(0.5, 2.0, 1.0, 1.5),
    )
    abstract = VAE.abstract(config, jnp.float32)
    rng = np.random.default_rng(1)
    return abstract.filled(
        {
            path: jnp.asarray(1.5 * rng.standard_normal(leaf.shape) / np.prod(leaf.shape[:-1]) ** 0.5, jnp.float32)
            for path, leaf in leaves(abstract.state).items()
        }
    )


# The first has a batch and latent rows that the mesh does not divide; the second attends a block of queries at a time.
@pytest.mark.parametrize("size", [(1, 12, 20), (2, 64, 48)])
def test_rows_over_devices(size, weights, error):
    batch, height, width = size
    rng = np.random.default_rng(0)
    pixels = rng.uniform(-1, 1, (*size, 3)).astype(np.float32)
    latents = rng.standard_normal((batch, height // 2, width // 2, 4)).astype(np.float32)
    alone = encode(weights, pixels), decode(weights, latents)
    with jax.set_mesh(Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "sequence"))):
        split = encode(weights, pixels), decode(weights, latents)
    for ours, expected in zip(split, alone, strict=True):
        assert error(ours, expected) < 1e-5  # measured: 4e-6
    assert len(split[1].sharding.device_set) == 8
