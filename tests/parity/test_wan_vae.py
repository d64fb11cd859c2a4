"""The autoencoder against the reference, live, on strong random weights."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from joyjax.convert.safetensors import Tensors
from joyjax.convert.stream import fill
from joyjax.convert.wan_vae import VAE
from joyjax.layers.norm import ChannelNorm
from joyjax.reading import read_json

pytestmark = [pytest.mark.jax, pytest.mark.parity]
torch = pytest.importorskip("torch")

ENCODE_TOLERANCE = 3e-6  # measured: 7e-7
NORM_TOLERANCE = 1e-5  # measured: 1.5e-6
DECODE_TOLERANCE = 2e-5  # measured: 4.4e-6; on these weights the decoder amplifies more

encode = jax.jit(lambda weights, pixels: weights.module().encode(pixels))
decode = jax.jit(lambda weights, latents: weights.module().decode(latents))


def load(folder, dtype=jnp.float32):
    return fill(VAE, VAE.configure(read_json(folder / "config.json")), Tensors.open(folder), dtype)


@pytest.fixture(scope="module")
def weights(checkpoint):
    return load(checkpoint / "vae")


def draw(seed: int, batch: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return pixels in [-1, 1] and unrelated latents of that size."""
    rng = np.random.default_rng(seed)
    pixels = rng.uniform(-1, 1, (batch, height, width, 3)).astype(np.float32)
    return pixels, rng.standard_normal((batch, height // 8, width // 8, 16)).astype(np.float32)


def to_torch(x: np.ndarray):
    """`[b h w c]` to `[b c f h w]` with one frame."""
    return torch.from_numpy(np.moveaxis(x, -1, 1)[:, :, None].copy())


def to_numpy(x) -> np.ndarray:
    return np.moveaxis(x.float()[:, :, 0].numpy(), 1, -1)


def statistics(vae):
    return (torch.tensor(numbers).view(1, -1, 1, 1, 1) for numbers in (vae.config.latents_mean, vae.config.latents_std))


def reference_encode(vae, pixels: np.ndarray) -> np.ndarray:
    mean, std = statistics(vae)
    return to_numpy((vae.encode(to_torch(pixels).to(vae.dtype)).latent_dist.mode().float() - mean) / std)


def reference_decode(vae, latents: np.ndarray) -> np.ndarray:
    mean, std = statistics(vae)
    return to_numpy(vae.decode((to_torch(latents) * std + mean).to(vae.dtype)).sample)


# The last is more than one block of queries in the middle attention, with a part of a block left over.
@pytest.mark.parametrize("size", [(1, 32, 48), (2, 64, 40), (1, 24, 200), (1, 264, 280)])
def test_both_directions(size, reference, weights, error):
    pixels, latents = draw(0, *size)
    assert error(encode(weights, pixels), reference_encode(reference.vae, pixels)) < ENCODE_TOLERANCE
    expected = reference_decode(reference.vae, latents)
    assert 0.01 < np.mean(np.abs(expected) == 1) < 0.5  # the clamp is at work, and is not all there is to see
    assert error(decode(weights, latents), expected) < DECODE_TOLERANCE


@pytest.mark.parametrize("size", [(2, 32, 48), (1, 24, 200)])
def test_both_directions_of_qwen_images_class(size, qwen_reference, qwen_folder, error):
    weights, (pixels, latents) = load(qwen_folder / "vae"), draw(1, *size)
    assert error(encode(weights, pixels), reference_encode(qwen_reference.vae, pixels)) < ENCODE_TOLERANCE
    expected = reference_decode(qwen_reference.vae, latents)
    assert error(decode(weights, latents), expected) < DECODE_TOLERANCE


def test_one_frame_reads_neither_earlier_slices_nor_time_convolutions(reference, weights, tmp_path):
    filled = copy.deepcopy(reference.vae)
    for name, p in filled.named_parameters():
        if "time_conv" in name:
            p.data.fill_(float("nan"))
        elif p.ndim == 5 and p.shape[2] == 3:
            p.data[:, :, :-1] = 1e3
    filled.save_pretrained(tmp_path)
    pixels, latents = draw(1, 1, 24, 40)
    np.testing.assert_array_equal(reference_encode(filled, pixels), reference_encode(reference.vae, pixels))
    np.testing.assert_array_equal(reference_decode(filled, latents), reference_decode(reference.vae, latents))
    np.testing.assert_array_equal(encode(load(tmp_path), pixels), encode(weights, pixels))
    np.testing.assert_array_equal(decode(load(tmp_path), latents), decode(weights, latents))


@pytest.mark.parametrize("size", [1.0, 1e-5, 1e-13, 0.0])
def test_norm_of_small_numbers(size, error):
    """An epsilon beside the mean square would show here; what bounds the norm is 1e-12, and only below it."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm

    theirs = WanRMS_norm(24, images=False)
    theirs.gamma.data = torch.linspace(-1, 2, 24).view(24, 1, 1, 1)
    ours = ChannelNorm(24, axis=None, dtype=jnp.float32, rngs=nnx.Rngs(0))
    ours.scale.set_value(jnp.linspace(-1, 2, 24, dtype=jnp.float32))
    x = np.float32(size) * np.random.default_rng(2).standard_normal((2, 3, 5, 24)).astype(np.float32)
    np.testing.assert_allclose(ours(jnp.asarray(x)), to_numpy(theirs(to_torch(x))), rtol=NORM_TOLERANCE)


def test_bfloat16_is_as_exact_as_the_reference(reference, checkpoint):
    """Our error against float32 is at most 1.1 times the reference's own."""
    half = load(checkpoint / "vae", jnp.bfloat16)
    theirs = type(reference.vae).from_pretrained(checkpoint / "vae", torch_dtype=torch.bfloat16)
    pixels, latents = draw(3, 8, 48, 40)
    for ours, reference_function, x in ((encode, reference_encode, pixels), (decode, reference_decode, latents)):
        exact = reference_function(reference.vae, x)
        result = ours(half, x)
        assert result.dtype == jnp.float32
        error, reference_error = (np.linalg.norm(y - exact) for y in (result, reference_function(theirs, x)))
        print(f"{error / reference_error:.3f} times the reference's error")
        assert error < 1.1 * reference_error


def test_tiles_are_those_of_the_reference(reference, weights, error):
    """Sizes with whole tiles and cut ones, at the right and at the bottom."""
    pixels, latents = draw(8, 1, 480, 328)
    theirs = copy.deepcopy(reference.vae)
    theirs.enable_tiling()
    ours = jax.jit(lambda weights, pixels: weights.module().encode(pixels, "tiled"))(weights, pixels)
    assert error(ours, reference_encode(theirs, pixels)) < ENCODE_TOLERANCE
    assert error(ours, encode(weights, pixels)) > 1e-2
    ours = jax.jit(lambda weights, latents: weights.module().decode(latents, "tiled"))(weights, latents)
    assert error(ours, reference_decode(theirs, latents)) < DECODE_TOLERANCE
    assert error(ours, decode(weights, latents)) > 1e-2
