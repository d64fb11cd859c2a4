"""The buckets of a bucket table: where pictures lie on them, and that the stages give there what they give alone."""

import jax.numpy as jnp
import numpy as np
import pytest
from small_vae import decode, draw, encode, make_vae

from joyjax.families.joyimage_buckets import buckets
from joyjax.models.autoencoder.buckets import (
    bucket_placement,
    crop_from_bucket,
    pad_to_bucket,
    padded_sizes,
    transpose_kernels,
)
from joyjax.models.autoencoder.stages import decode_latents, encode_images

PATCH, FACTOR = (2, 2), 4
SIZES = [  # of the table for 64, on both buckets, upright and transpose_kernels
    (64, 64),
    (48, 80),
    (128, 32),
    pytest.param((80, 48), marks=pytest.mark.nightly),
    pytest.param((32, 128), marks=pytest.mark.nightly),
]


@pytest.fixture(scope="module")
def vae():
    return make_vae((1, 2, 2))


def numbered(height: int, width: int, side: int) -> np.ndarray:
    """A picture whose pixels say, in two bytes, which token they belong to, counted from 1."""
    tokens = np.arange(height // side)[:, None] * (width // side) + np.arange(width // side) + 1
    tokens = tokens.repeat(side, axis=0).repeat(side, axis=1)
    return np.stack([tokens // 256, tokens % 256, np.full_like(tokens, 7)], axis=-1).astype(np.uint8)[None]


@pytest.mark.parametrize("base_size", [256, 512, 768, 1024])
def test_every_placement_of_a_table(base_size):
    side = 16
    used, lengths = set(), set()
    assert len(buckets(base_size)) == 49
    for height, width in buckets(base_size):
        bucket, placement = bucket_placement(height, width, buckets(base_size), (2, 2), 8)
        used.add(bucket)
        picture = numbered(height, width, side)
        padded = pad_to_bucket(picture, bucket)
        assert padded.shape == (1, *bucket, 3)
        np.testing.assert_array_equal(crop_from_bucket(padded, (height, width)), picture)
        there = padded[0, ::side, ::side].astype(int)
        number = (there[..., 0] * 256 + there[..., 1]).reshape(-1)  # 0 beside the picture
        patches, tokens, count = np.asarray(placement.patches), np.asarray(placement.tokens), int(placement.count)
        lengths.add((len(patches), count))
        np.testing.assert_array_equal(tokens, np.maximum(number - 1, 0))
        np.testing.assert_array_equal(number[patches[:count]], np.arange(count) + 1)
        assert not patches[count:].any()
        rows, columns = placement.size
        inside = np.outer(np.arange(bucket[0]) < rows, np.arange(bucket[1]) < columns)
        np.testing.assert_array_equal(padded[0, :, :, 2], 7 * inside)
        assert bool(placement.flip) == (width > height)
        assert rows >= columns
    assert used == set(padded_sizes(buckets(base_size)))
    assert len(used) == 2
    assert all(height >= width for height, width in used)
    assert {length for length, _ in lengths} == {max(count for _, count in lengths)} == {(base_size // side) ** 2}


def test_the_cost_of_padding_to_buckets():
    """The figures of the module's docstring."""
    assert padded_sizes(buckets(1024)) == ((1280, 1024), (2048, 768))
    cost = {}
    for height, width in buckets(1024):
        bucket, _ = bucket_placement(height, width, buckets(1024), (2, 2), 8)
        cost[height, width] = bucket[0] * bucket[1] / (height * width)
    assert cost[1024, 1024] == 1.25
    assert cost[832, 1216] == cost[1216, 832] == pytest.approx(1.30, abs=0.005)
    assert max(cost.values()) == cost[1792, 512] == pytest.approx(1.71, abs=0.005)
    assert np.mean(list(cost.values())) == pytest.approx(1.50, abs=0.005)


@pytest.mark.parametrize("base_size", [32, 48, 64, 320])
def test_other_tables_have_two_padded_buckets(base_size):
    for height, width in buckets(base_size):
        bucket, _ = bucket_placement(height, width, buckets(base_size), (2, 2), 8)
        assert bucket in padded_sizes(buckets(base_size))
        assert bucket[0] >= max(height, width)
        assert bucket[1] >= min(height, width)
    assert len(padded_sizes(buckets(base_size))) == 2


@pytest.mark.parametrize(
    ("height", "width", "patch", "factor"),
    [(64, 80, (2, 2), 8), (64, 64, (1, 2), 8), (64, 64, (2, 2), 16), (1024, 1024, (2, 2), 8)],
    ids=["not in the table", "not square", "patches of 32 pixels", "of another table"],
)
def test_sizes_without_a_placement(height, width, patch, factor):
    assert bucket_placement(height, width, buckets(64), patch, factor) is None


def test_transposed_kernels_fit_transposed_pictures(vae, error):
    pixels, latents = draw(1, 32, 48, FACTOR)
    for run, x in ((encode, pixels), (decode, latents)):
        expected = run(vae, x)
        assert error(run(transpose_kernels(vae, jnp.asarray(True)), x.swapaxes(1, 2)).swapaxes(1, 2), expected) < 1e-5
        assert error(run(vae, x.swapaxes(1, 2)).swapaxes(1, 2), expected) > 0.1
        np.testing.assert_array_equal(run(transpose_kernels(vae, jnp.asarray(False)), x), expected)


@pytest.mark.parametrize("size", SIZES)
def test_encoding_in_a_bucket_equals_encoding_alone(size, vae, error):
    pixels = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
    bucket, placement = bucket_placement(*size, buckets(64), PATCH, FACTOR)
    expected = encode_images(vae, pixels, patch=PATCH)
    padded = pad_to_bucket(pixels, bucket)
    tokens = encode_images(vae, padded, placement, patch=PATCH)
    count = expected.shape[1]
    assert tokens.shape == (2, 64, 16)
    assert error(tokens[:, :count], expected) < 1e-5  # measured: 7e-7
    assert not np.asarray(tokens[:, count:]).any()
    padded[:, max(size) :] = 255
    padded[:, :, min(size) :] = 255
    np.testing.assert_array_equal(encode_images(vae, padded, placement, patch=PATCH), tokens)


@pytest.mark.parametrize("size", SIZES)
def test_decoding_in_a_bucket_equals_decoding_alone(size, vae):
    """Numbers that are not finite behind a picture's tokens are not seen, and those in it are."""
    bucket, placement = bucket_placement(*size, buckets(64), PATCH, FACTOR)
    count, width = int(placement.count), size[1] // 8
    tokens = np.full((2, 70, 16), np.nan, np.float32)
    tokens[:, :count] = np.random.default_rng(0).standard_normal((2, count, 16))
    expected, _ = decode_latents(vae, tokens[:, :count], patch=PATCH, width=width)
    expected = np.asarray(expected).astype(int)
    found, finite = decode_latents(vae, tokens, placement, patch=PATCH, bucket=bucket)
    assert found.shape == (2, *bucket, 3)
    assert (found[:, max(size) :] == 128).all()  # grey: zeros, which cannot make a picture count as not finite
    assert (found[:, :, min(size) :] == 128).all()
    off = np.abs(crop_from_bucket(np.asarray(found), size) - expected)
    assert off.max() <= 1
    assert np.mean(off) < 1e-3
    assert expected.std() > 10
    assert np.asarray(finite).all()
    tokens[1, count - 1, 0] = np.nan
    _, finite = decode_latents(vae, tokens, placement, patch=PATCH, bucket=bucket)
    assert np.asarray(finite).tolist() == [True, False]


def test_a_table_takes_two_programs_each_way(vae):
    encode_images.clear_cache()
    decode_latents.clear_cache()
    for size in buckets(64):
        bucket, placement = bucket_placement(*size, buckets(64), PATCH, FACTOR)
        tokens = encode_images(vae, pad_to_bucket(np.zeros((1, *size, 3), np.uint8), bucket), placement, patch=PATCH)
        pixels, _ = decode_latents(vae, tokens, placement, patch=PATCH, bucket=bucket)
        assert crop_from_bucket(np.asarray(pixels), size).shape == (1, *size, 3)
    assert (encode_images._cache_size(), decode_latents._cache_size()) == (2, 2)


def test_decoding_needs_a_placement_or_a_width(vae):
    bucket, placement = bucket_placement(64, 64, buckets(64), PATCH, FACTOR)
    tokens = jnp.zeros((1, 64, 16))
    for given in ({}, {"width": 8, "bucket": bucket}):
        with pytest.raises(ValueError, match="have a `placement` and its `bucket`, or else a `width`"):
            decode_latents(vae, tokens, patch=PATCH, **given)
    for given in ({}, {"width": 8}, {"width": 8, "bucket": bucket}):
        with pytest.raises(ValueError, match="have a `placement` and its `bucket`, or else a `width`"):
            decode_latents(vae, tokens, placement, patch=PATCH, **given)
    with pytest.raises(ValueError, match="mode 'auto' takes whole pictures"):
        decode_latents(vae, tokens, placement, patch=PATCH, bucket=bucket, mode="auto")
