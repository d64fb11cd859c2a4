"""The canvases of a bucket table: where pictures lie on them, and that the stages give there what they give alone."""

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
SIZES = [  # of the table for 64, on both canvases, upright and transpose_kernels
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
def test_every_place_of_a_table(base_size):
    side = 16
    used, lengths = set(), set()
    assert len(buckets(base_size)) == 49
    for height, width in buckets(base_size):
        canvas, place = bucket_placement(height, width, buckets(base_size), (2, 2), 8)
        used.add(canvas)
        picture = numbered(height, width, side)
        laid = pad_to_bucket(picture, canvas)
        assert laid.shape == (1, *canvas, 3)
        np.testing.assert_array_equal(crop_from_bucket(laid, (height, width)), picture)
        there = laid[0, ::side, ::side].astype(int)
        number = (there[..., 0] * 256 + there[..., 1]).reshape(-1)  # 0 beside the picture
        patches, tokens, count = np.asarray(place.patches), np.asarray(place.tokens), int(place.count)
        lengths.add((len(patches), count))
        np.testing.assert_array_equal(tokens, np.maximum(number - 1, 0))
        np.testing.assert_array_equal(number[patches[:count]], np.arange(count) + 1)
        assert not patches[count:].any()
        rows, columns = place.size
        inside = np.outer(np.arange(canvas[0]) < rows, np.arange(canvas[1]) < columns)
        np.testing.assert_array_equal(laid[0, :, :, 2], 7 * inside)
        assert bool(place.flip) == (width > height)
        assert rows >= columns
    assert used == set(padded_sizes(buckets(base_size)))
    assert len(used) == 2
    assert all(height >= width for height, width in used)
    assert {length for length, _ in lengths} == {max(count for _, count in lengths)} == {(base_size // side) ** 2}


def test_what_the_canvases_cost():
    """The figures of the module's docstring."""
    assert padded_sizes(buckets(1024)) == ((1280, 1024), (2048, 768))
    cost = {}
    for height, width in buckets(1024):
        canvas, _ = bucket_placement(height, width, buckets(1024), (2, 2), 8)
        cost[height, width] = canvas[0] * canvas[1] / (height * width)
    assert cost[1024, 1024] == 1.25
    assert cost[832, 1216] == cost[1216, 832] == pytest.approx(1.30, abs=0.005)
    assert max(cost.values()) == cost[1792, 512] == pytest.approx(1.71, abs=0.005)
    assert np.mean(list(cost.values())) == pytest.approx(1.50, abs=0.005)


@pytest.mark.parametrize("base_size", [32, 48, 64, 320])
def test_other_tables_have_two_canvases_at_most(base_size):
    for height, width in buckets(base_size):
        canvas, _ = bucket_placement(height, width, buckets(base_size), (2, 2), 8)
        assert canvas in padded_sizes(buckets(base_size))
        assert canvas[0] >= max(height, width)
        assert canvas[1] >= min(height, width)
    assert len(padded_sizes(buckets(base_size))) == 2


@pytest.mark.parametrize(
    ("height", "width", "patch", "factor"),
    [(64, 80, (2, 2), 8), (64, 64, (1, 2), 8), (64, 64, (2, 2), 16), (1024, 1024, (2, 2), 8)],
    ids=["not in the table", "not square", "patches of 32 pixels", "of another table"],
)
def test_what_has_no_place(height, width, patch, factor):
    assert bucket_placement(height, width, buckets(64), patch, factor) is None


def test_a_turned_network_is_for_turned_pictures(vae, error):
    pixels, latents = draw(1, 32, 48, FACTOR)
    for run, x in ((encode, pixels), (decode, latents)):
        expected = run(vae, x)
        assert error(run(transpose_kernels(vae, jnp.asarray(True)), x.swapaxes(1, 2)).swapaxes(1, 2), expected) < 1e-5
        assert error(run(vae, x.swapaxes(1, 2)).swapaxes(1, 2), expected) > 0.1
        np.testing.assert_array_equal(run(transpose_kernels(vae, jnp.asarray(False)), x), expected)


@pytest.mark.parametrize("size", SIZES)
def test_encoding_on_a_canvas_is_encoding_alone(size, vae, error):
    pixels = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
    canvas, place = bucket_placement(*size, buckets(64), PATCH, FACTOR)
    expected = encode_images(vae, pixels, patch=PATCH)
    laid = pad_to_bucket(pixels, canvas)
    tokens = encode_images(vae, laid, place, patch=PATCH)
    count = expected.shape[1]
    assert tokens.shape == (2, 64, 16)
    assert error(tokens[:, :count], expected) < 1e-5  # measured: 7e-7
    assert not np.asarray(tokens[:, count:]).any()
    laid[:, max(size) :] = 255
    laid[:, :, min(size) :] = 255
    np.testing.assert_array_equal(encode_images(vae, laid, place, patch=PATCH), tokens)


@pytest.mark.parametrize("size", SIZES)
def test_decoding_on_a_canvas_is_decoding_alone(size, vae):
    """Numbers that are not finite behind a picture's tokens are not seen, and those in it are."""
    canvas, place = bucket_placement(*size, buckets(64), PATCH, FACTOR)
    count, width = int(place.count), size[1] // 8
    tokens = np.full((2, 70, 16), np.nan, np.float32)
    tokens[:, :count] = np.random.default_rng(0).standard_normal((2, count, 16))
    expected, _ = decode_latents(vae, tokens[:, :count], patch=PATCH, width=width)
    expected = np.asarray(expected).astype(int)
    found, finite = decode_latents(vae, tokens, place, patch=PATCH, bucket=canvas)
    assert found.shape == (2, *canvas, 3)
    assert (found[:, max(size) :] == 128).all()  # grey: zeros, which cannot make a picture count as not finite
    assert (found[:, :, min(size) :] == 128).all()
    off = np.abs(crop_from_bucket(np.asarray(found), size) - expected)
    assert off.max() <= 1
    assert np.mean(off) < 1e-3
    assert expected.std() > 10
    assert np.asarray(finite).all()
    tokens[1, count - 1, 0] = np.nan
    _, finite = decode_latents(vae, tokens, place, patch=PATCH, bucket=canvas)
    assert np.asarray(finite).tolist() == [True, False]


def test_a_table_takes_two_programs_each_way(vae):
    encode_images.clear_cache()
    decode_latents.clear_cache()
    for size in buckets(64):
        canvas, place = bucket_placement(*size, buckets(64), PATCH, FACTOR)
        tokens = encode_images(vae, pad_to_bucket(np.zeros((1, *size, 3), np.uint8), canvas), place, patch=PATCH)
        pixels, _ = decode_latents(vae, tokens, place, patch=PATCH, bucket=canvas)
        assert crop_from_bucket(np.asarray(pixels), size).shape == (1, *size, 3)
    assert (encode_images._cache_size(), decode_latents._cache_size()) == (2, 2)


def test_what_decoding_must_be_told(vae):
    canvas, place = bucket_placement(64, 64, buckets(64), PATCH, FACTOR)
    tokens = jnp.zeros((1, 64, 16))
    for given in ({}, {"width": 8, "bucket": canvas}):
        with pytest.raises(ValueError, match="have a `placement` and its `bucket`, or else a `width`"):
            decode_latents(vae, tokens, patch=PATCH, **given)
    for given in ({}, {"width": 8}, {"width": 8, "bucket": canvas}):
        with pytest.raises(ValueError, match="have a `placement` and its `bucket`, or else a `width`"):
            decode_latents(vae, tokens, place, patch=PATCH, **given)
    with pytest.raises(ValueError, match="mode 'auto' takes whole pictures"):
        decode_latents(vae, tokens, place, patch=PATCH, bucket=canvas, mode="auto")
