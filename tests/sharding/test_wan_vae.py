"""The autoencoder with its rows split over devices gives the pictures that it gives on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import mesh_of

from joyjax.convert.wan_vae import VAE
from joyjax.errors import MeshError
from joyjax.layers.weights import Weights, leaves
from joyjax.models import wan_vae
from joyjax.models.wan_vae import WanVAEConfig
from joyjax.sampling.tiles import Mode, choose, patch_grid

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


def draw(batch: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return pixels and unrelated latents of that size."""
    rng = np.random.default_rng(0)
    pixels = rng.uniform(-1, 1, (batch, height, width, 3)).astype(np.float32)
    return pixels, rng.standard_normal((batch, height // 2, width // 2, 4)).astype(np.float32)


# Rows that no mesh divides, in latents and in pixels; a batch; what attends a block of queries at a time.
@pytest.mark.parametrize("sizes", [{"sequence": 4, "data": 2}, {"tensor": 3}, {"cfg": 2, "ring": 2, "tensor": 2}])
@pytest.mark.parametrize("size", [(1, 26, 20), (2, 64, 48), (3, 22, 70)])
def test_rows_over_devices(size, sizes, weights, error):
    pixels, latents = draw(*size)
    alone = encode(weights, pixels), decode(weights, latents)
    with jax.set_mesh(mesh_of(**sizes)):
        split = encode(weights, pixels), decode(weights, latents)
    for ours, expected in zip(split, alone, strict=True):
        assert error(ours, expected) < 1e-5  # measured: 4e-6


@pytest.mark.parametrize("latent_rows", [5, 8, 9, 13, 17])
def test_few_and_uneven_rows(latent_rows, weights, error):
    """Some devices of eight then have one row, or none."""
    pixels, latents = draw(1, 2 * latent_rows, 24)
    alone = encode(weights, pixels), decode(weights, latents)
    with jax.set_mesh(mesh_of(sequence=8)):
        split = encode(weights, pixels), decode(weights, latents)
    for ours, expected in zip(split, alone, strict=True):
        assert error(ours, expected) < 1e-5


def test_rows_are_really_split(weights):
    """A device computes its share: with eight, a little more than an eighth, since borders are computed twice."""
    _, latents = draw(1, 256, 64)

    def flops() -> float:
        return (
            jax.jit(lambda latents: weights.module().decode(latents)).lower(latents).compile().cost_analysis()["flops"]
        )

    alone = flops()
    with jax.set_mesh(mesh_of(sequence=8)):
        assert alone / 8 <= flops() < alone / 6


@pytest.mark.parametrize("mode", ["tiled", "patch"])
def test_tiles_and_patches_on_a_mesh(mode, weights, monkeypatch, error):
    monkeypatch.setattr(wan_vae, "TILE", 32)
    pixels, latents = draw(2, 72, 64)

    @functools.partial(jax.jit, static_argnames="mode")
    def both(weights: Weights, pixels: jax.Array, latents: jax.Array, mode: Mode) -> tuple[jax.Array, jax.Array]:
        return weights.module().encode(pixels, mode), weights.module().decode(latents, mode)

    if mode == "tiled":
        expected = both(weights, pixels, latents, mode)
    else:  # two rows and three columns, each by itself
        cut = [np.split(row, 4, axis=2) for row in np.split(latents, 2, axis=1)]
        decoded = [np.concatenate([decode(weights, part) for part in row], axis=2) for row in cut]
        cut = [np.split(row, 4, axis=2) for row in np.split(pixels, 2, axis=1)]
        encoded = [np.concatenate([encode(weights, part) for part in row], axis=2) for row in cut]
        expected = np.concatenate(encoded, axis=1), np.concatenate(decoded, axis=1)
    with jax.set_mesh(mesh_of(sequence=4, tensor=2)):
        found = both(weights, pixels, latents, mode)
    for ours, theirs in zip(found, expected, strict=True):
        assert error(ours, theirs) < 1e-5
    exact = encode(weights, pixels), decode(weights, latents)
    assert min(error(ours, whole) for ours, whole in zip(found, exact, strict=True)) > 1e-3  # they are approximations


@pytest.mark.parametrize(
    ("mode", "size", "devices", "chosen"),
    [
        ("exact", (128, 128), 8, "exact"),
        ("tiled", (33, 8), 1, "tiled"),
        ("tiled", (32, 32), 8, "exact"),
        ("auto", (32, 33), 8, "tiled"),
        ("auto", (32, 24), 8, "patch"),
        ("auto", (31, 24), 8, "exact"),
        ("patch", (32, 24), 6, "patch"),
    ],
)
def test_what_a_mode_means_for_a_size(mode, size, devices, chosen):
    assert choose(mode, size, (32, 256), devices) == chosen


def test_patch_grid():
    grids = {devices: patch_grid(devices) for devices in (1, 2, 4, 6, 7, 8)}
    assert grids == {1: (1, 1), 2: (1, 2), 4: (2, 2), 6: (2, 3), 7: (1, 7), 8: (2, 4)}


def test_patches_that_would_not_be_even():
    with pytest.raises(MeshError, match="32 rows and 30 columns .* 2 × 4, one for each of 8 devices; use `exact`"):
        choose("patch", (32, 30), (32, 256), 8)
    with pytest.raises(MeshError, match="104 rows"):  # 6.5 rows of latents each
        choose("patch", (104, 64), (256, 32), 8)
