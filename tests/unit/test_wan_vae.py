"""The autoencoder's configuration and key table at the real sizes, without weights; a small one on a bucket."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_vae import decode, draw, encode, make_vae, pad_with_nan

from joyjax.convert.rules import match
from joyjax.convert.wan_vae import VAE
from joyjax.errors import CheckpointError, ConfigError
from joyjax.layers.weights import count_parameters, leaves
from joyjax.models.autoencoder.wan import WanVAEConfig
from joyjax.reading import read_json

REAL = {
    "_class_name": "AutoencoderKLWan",
    "_diffusers_version": "0.38.0.dev0",
    "attn_scales": [],
    "base_dim": 96,
    "decoder_base_dim": None,
    "dim_mult": [1, 2, 4, 4],
    "dropout": 0.0,
    "in_channels": 3,
    "is_residual": False,
    "latents_mean": [
        *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
        *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    ],
    "latents_std": [
        *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
        *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.916),
    ],
    "num_res_blocks": 2,
    "out_channels": 3,
    "patch_size": None,
    "scale_factor_spatial": 8,
    "scale_factor_temporal": 4,
    "temperal_downsample": [False, True, True],
    "z_dim": 16,
}


# Qwen-Image's class of the same network has fewer keys, and none for channels in what was published first.
QWEN_KEYS = {
    *("attn_scales", "base_dim", "dim_mult", "dropout", "latents_mean", "latents_std", "num_res_blocks"),
    *("temperal_downsample", "z_dim"),
}
QWEN = {"_class_name": "AutoencoderKLQwenImage", **{key: value for key, value in REAL.items() if key in QWEN_KEYS}}


def shapes(config: WanVAEConfig) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in leaves(VAE.abstract(config, jnp.bfloat16).state).items()}


def test_these_are_the_files_values(reference_files):
    assert read_json(reference_files / "vae" / "config.json") == REAL


def test_real_config():
    config = WanVAEConfig.from_diffusers(REAL)
    assert config.spatial_factor == 8
    assert config.widths == (96, 192, 384, 384)
    assert (config.latents_mean[7], config.latents_std[15]) == (1.5508, 1.916)
    assert hash(config) == hash(WanVAEConfig.from_diffusers(copy.deepcopy(REAL)))


@pytest.mark.parametrize("more", [{}, {"input_channels": 3}], ids=["first published", "later"])
def test_qwen_images_class_is_the_same_network(more):
    assert WanVAEConfig.from_diffusers(QWEN | more) == WanVAEConfig.from_diffusers(REAL)
    assert QWEN["_class_name"] in VAE.class_names


LAYERED = QWEN | {"input_channels": 4}


def test_channels_of_a_picture():
    assert WanVAEConfig.from_diffusers(LAYERED).input_channels == 4
    assert WanVAEConfig.from_diffusers(QWEN).input_channels == 3
    for more, message in (
        ({"input_channels": 1}, "input_channels is 1; this version of joyjax implements 3 and 4"),
        ({"input_channels": True}, "input_channels is True; expected int"),
        ({"input_channels": "4"}, "input_channels is '4'; expected int"),
        ({"input_channels": 4, "in_channels": 3}, "in_channels is 3; this version of joyjax implements 4"),
        ({"in_channels": 4}, "in_channels is 4; this version of joyjax implements 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            WanVAEConfig.from_diffusers(QWEN | more)


def test_a_channel_of_alpha_changes_two_convolutions():
    three, four = (shapes(WanVAEConfig.from_diffusers(raw)) for raw in (QWEN, LAYERED))
    assert {path: four[path] for path in four if four[path] != three[path]} == {
        "encoder.conv_in.kernel": (3, 3, 4, 96),
        "decoder.conv_out.kernel": (3, 3, 96, 4),
        "decoder.conv_out.bias": (4,),
    }


def test_real_size():
    weights = VAE.abstract(WanVAEConfig.from_diffusers(REAL), jnp.bfloat16)
    assert count_parameters(weights.state) == 44_599_603
    latents = jax.eval_shape(lambda w, x: w.module().encode(x), weights, jnp.zeros((2, 1024, 768, 3)))
    assert (latents.shape, latents.dtype) == ((2, 128, 96, 16), jnp.float32)
    pixels = jax.eval_shape(lambda w, z: w.module().decode(z), weights, latents)
    assert (pixels.shape, pixels.dtype) == ((2, 1024, 768, 3), jnp.float32)


@pytest.mark.parity
@pytest.mark.parametrize("given", [REAL, QWEN, LAYERED], ids=["Wan", "Qwen-Image", "with alpha"])
@pytest.mark.parametrize(
    ("changes", "tensors", "parameters"),
    [
        ({}, 194, 126_892_531),
        ({"dim_mult": [2, 1, 3], "num_res_blocks": 1, "temperal_downsample": [True, False]}, None, None),
    ],
)
def test_every_tensor_of_the_reference_is_matched(given, changes, tensors, parameters):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    raw = {**given, **changes}
    for name in ("scale_factor_spatial", "scale_factor_temporal") if changes else ():
        raw.pop(name, None)
    with torch.device("meta"):
        network = getattr(diffusers, raw["_class_name"])
        theirs = network(**{key: value for key, value in raw.items() if not key.startswith("_")})
    state = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    config = WanVAEConfig.from_diffusers(raw)
    found = match(VAE.rules(config), VAE.ignored, state, shapes(config), where="vae")
    assert {m.target for m in found} == shapes(config).keys()
    assert state.keys() - {m.source for m in found} == {name for name in state if ".time_conv." in name}
    if tensors:
        more = 2 * 27 * 96 + 1 if given is LAYERED else 0  # of the two outer convolutions
        assert (len(state), theirs.num_parameters()) == (tensors, parameters + more)
    with pytest.raises(CheckpointError, match=r"decoder\.up_blocks\.1\.resnets\.0\.conv1\.weight .* is missing"):
        match(
            VAE.rules(config),
            VAE.ignored,
            {name: shape for name, shape in state.items() if name != "decoder.up_blocks.1.resnets.0.conv1.weight"},
            shapes(config),
            where="vae",
        )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("is_residual", True, "is_residual is True"),  # the Wan 2.2 network
        ("patch_size", 2, "patch_size is 2"),
        ("attn_scales", [0.5], r"attn_scales is \[0.5\]"),
        ("decoder_base_dim", 256, "decoder_base_dim is 256; .* implements None or 96"),
        ("in_channels", 12, "in_channels is 12"),
        ("out_channels", 4, "out_channels is 4"),
        ("clip_output", False, "clip_output = False is not known"),
        ("z_dim", 16.5, "z_dim is 16.5; expected int"),
        ("z_dim", 8, "latents_mean has 16 values; expected z_dim, 8"),
        ("latents_std", [1.0] * 15, "latents_std has 15 values"),
        ("latents_std", [1.0] * 15 + [0.0], "expected positive"),
        ("latents_mean", None, "latents_mean is None"),
        ("num_res_blocks", 0, "must be positive"),
        ("dim_mult", [], "must be positive"),
        ("temperal_downsample", [False, True], "temperal_downsample has 2 values; .* the 4 levels"),
        ("scale_factor_spatial", 16, "scale_factor_spatial is 16; .* make it 8"),
        ("scale_factor_temporal", 8, "scale_factor_temporal is 8; .* make it 4"),
    ],
)
def test_refusals_name_the_value(key, value, message):
    with pytest.raises(ConfigError, match=message) as caught:
        WanVAEConfig.from_diffusers({**REAL, key: value}, where="there/config.json")
    assert "there/config.json" in str(caught.value)


@pytest.mark.parametrize("key", ["base_dim", "z_dim", "latents_mean", "temperal_downsample"])
def test_missing_keys_have_no_defaults(key):
    with pytest.raises(ConfigError, match=f"{key} is missing"):
        WanVAEConfig.from_diffusers({name: value for name, value in REAL.items() if name != key})


@pytest.fixture(scope="module")
def small():
    return make_vae((1, 2, 2))


@pytest.mark.parametrize(
    "size",
    [
        (48, 16),
        (4, 4),
        pytest.param((48, 48), marks=pytest.mark.nightly),
        pytest.param((8, 40), marks=pytest.mark.nightly),
    ],
)
def test_padding_never_changes_the_result(size, small, error):
    """Numbers that are not finite beside it change nothing."""
    pixels, latents = draw(2, *size, factor=4)
    valid = np.array(size, np.int32)
    expected = encode(small, pixels)
    found = encode(small, pad_with_nan(pixels, 64, 48), valid)
    assert error(found[:, : size[0] // 4, : size[1] // 4], expected) < 1e-5  # measured: 6e-7
    expected = decode(small, latents)
    assert np.mean(np.abs(expected) == 1) < 0.5
    found = decode(small, pad_with_nan(latents, 16, 12), valid // 4)
    assert error(found[:, : size[0], : size[1]], expected) < 1e-5  # measured: 3e-6


def test_padding_of_more_than_a_block_of_queries_never_changes_the_result(small, error):
    pixels, latents = draw(1, 112, 88, factor=4)
    valid = np.array((112, 88), np.int32)
    assert error(encode(small, pad_with_nan(pixels, 160, 128), valid)[:, :28, :22], encode(small, pixels)) < 1e-5
    found = decode(small, pad_with_nan(latents, 40, 32), valid // 4)
    assert error(found[:, :112, :88], decode(small, latents)) < 1e-5


def test_padding_never_changes_moments_and_unclamped_pixels(small, error):
    pixels, latents = draw(1, 16, 24, factor=4)
    size = np.array((16, 24), np.int32)
    moments = jax.jit(lambda weights, pixels, size=None: weights.module().moments(pixels, size=size))
    decode_raw = jax.jit(lambda weights, latents, size=None: weights.module().decode_raw(latents, size))
    found = moments(small, pad_with_nan(pixels, 32, 32), size)
    for ours, expected in zip(found, moments(small, pixels), strict=True):
        assert error(ours[:, :4, :6], expected) < 1e-5
    found = decode_raw(small, pad_with_nan(latents, 8, 8), size // 4)
    assert error(found[:, :16, :24], decode_raw(small, latents)) < 1e-5


def test_bfloat16_is_as_exact_with_padding(small):
    half = make_vae((1, 2, 2), jnp.bfloat16)
    pixels, latents = draw(4, 32, 48, factor=4)
    size = np.array((32, 48), np.int32)
    for run, x, bucket, valid in ((encode, pixels, (64, 80), size), (decode, latents, (16, 20), size // 4)):
        exact = np.asarray(run(small, x))
        alone, found = np.asarray(run(half, x)), np.asarray(run(half, pad_with_nan(x, *bucket), valid))
        found = found[:, : exact.shape[1], : exact.shape[2]]
        assert 0 < np.linalg.norm(found - exact) < 1.1 * np.linalg.norm(alone - exact)  # measured: 0.96 to 1.06


@pytest.mark.parametrize("mode", ["tiled", "patch", "auto"])
def test_other_modes_take_whole_pictures(mode, small):
    pixels, latents = draw(1, 16, 16, factor=4)
    with pytest.raises(ValueError, match=f"mode '{mode}' takes whole pictures"):
        small.module().encode(jnp.asarray(pixels), mode, jnp.asarray((8, 8)))
    with pytest.raises(ValueError, match="expected 'exact'"):
        small.module().decode(jnp.asarray(latents), mode, jnp.asarray((2, 2)))
