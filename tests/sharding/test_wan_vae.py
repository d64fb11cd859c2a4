"""The autoencoder with its rows split over devices gives the pictures that it gives on one."""

import functools

import jax
import numpy as np
import pytest
from meshes import mesh_of, name_of
from small_vae import decode, draw, encode, make_vae, pad_with_nan

from joyjax.errors import MeshError
from joyjax.families.joyimage_buckets import buckets
from joyjax.layers.weights import Weights
from joyjax.models.autoencoder import wan
from joyjax.models.autoencoder.buckets import bucket_placement, crop_from_bucket, pad_to_bucket
from joyjax.models.autoencoder.stages import decode_latents, encode_images
from joyjax.models.autoencoder.tiling import Mode, choose, patch_grid
from joyjax.sharding.place import replicate

pytestmark = pytest.mark.jax


@pytest.fixture(scope="module")
def weights() -> Weights:
    return make_vae()


def crossed(pictures: list[tuple[int, int, int]], meshes: list[dict[str, int]]) -> list:
    """Return every picture on every mesh; nightly but for the first picture on the first mesh, and so on."""
    return [
        pytest.param(size, sizes, id=f"{size} {name_of(sizes)}", marks=() if n == m else pytest.mark.nightly)
        for n, size in enumerate(pictures)
        for m, sizes in enumerate(meshes)
    ]


# Rows that no mesh divides, in latents and in pixels; a batch; what attends a block of queries at a time.
ROWS = crossed(
    [(1, 26, 20), (2, 64, 48), (3, 22, 70)],
    [{"tensor": 3}, {"sequence": 4, "data": 2}, {"cfg": 2, "ring": 2, "tensor": 2}],
)


@pytest.mark.parametrize(("size", "sizes"), ROWS)
def test_rows_over_devices(size, sizes, weights, error):
    pixels, latents = draw(*size)
    alone = encode(weights, pixels), decode(weights, latents)
    with jax.set_mesh(mesh_of(**sizes)):
        split = encode(weights, pixels), decode(weights, latents)
    for ours, expected in zip(split, alone, strict=True):
        assert error(ours, expected) < 1e-5  # measured: 4e-6


@pytest.mark.parametrize("latent_rows", [5, *(pytest.param(n, marks=pytest.mark.nightly) for n in (8, 9, 13)), 17])
def test_few_and_uneven_rows(latent_rows, weights, error):
    """Some devices of eight then have one row, or none."""
    pixels, latents = draw(1, 2 * latent_rows, 24)
    alone = encode(weights, pixels), decode(weights, latents)
    with jax.set_mesh(mesh_of(sequence=8)):
        split = encode(weights, pixels), decode(weights, latents)
    for ours, expected in zip(split, alone, strict=True):
        assert error(ours, expected) < 1e-5


# A batch; rows that no mesh divides; a picture that leaves some of eight devices nothing but padding.
ON_CANVAS = crossed(
    [(2, 26, 20), (1, 72, 34), (1, 12, 44)], [{"sequence": 4, "data": 2}, {"tensor": 3}, {"sequence": 8}]
)


@pytest.mark.parametrize(("size", "sizes"), ON_CANVAS)
def test_padding_over_devices_never_changes_the_result(size, sizes, weights, error):
    pixels, latents = draw(*size)
    alone = encode(weights, pixels), decode(weights, latents)
    valid = np.array(size[1:], np.int32)
    with jax.set_mesh(mesh_of(**sizes)):
        moments = encode(weights, pad_with_nan(pixels, 72, 44), valid)
        drawn = decode(weights, pad_with_nan(latents, 36, 22), valid // 2)
    for ours, expected in zip((moments, drawn), alone, strict=True):
        assert error(ours[:, : expected.shape[1], : expected.shape[2]], expected) < 1e-5


def test_the_stages_in_a_bucket_over_devices(weights, error):
    mesh, size = mesh_of(cfg=2, sequence=4), (48, 80)
    pixels = np.random.default_rng(0).integers(0, 256, (1, *size, 3), np.uint8)
    tokens = encode_images(weights, pixels, patch=(2, 2))
    drawn, _ = decode_latents(weights, tokens, patch=(2, 2), width=20)
    bucket, placement = bucket_placement(*size, buckets(64), (2, 2), 2)
    padded, placement = replicate((pad_to_bucket(pixels, bucket), placement), mesh)
    with jax.set_mesh(mesh):
        found = encode_images(weights, padded, placement, patch=(2, 2))
        assert error(found[:, : tokens.shape[1]], tokens) < 1e-5
        found, finite = decode_latents(weights, found, placement, patch=(2, 2), bucket=bucket)
    assert np.asarray(finite).all()
    off = crop_from_bucket(np.asarray(found), size) - np.asarray(drawn).astype(int)
    assert np.abs(off).max() <= 1


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
    monkeypatch.setattr(wan, "TILE", 32)
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
