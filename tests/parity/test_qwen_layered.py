"""Qwen-Image-Layered against Diffusers' pipeline, live: same checkpoint and noise, strong random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pairs import assert_same, photo

pytest.importorskip("torch")
import torch
from layered_pairs import PROMPT, STEPS, cutout, draw, our_layers, their_layers, their_stages
from parity.test_qwen_edit import LATENTS_TOLERANCE
from parity.test_qwen_image import VELOCITY_TOLERANCE
from parity.test_wan_vae import DECODE_TOLERANCE, ENCODE_TOLERANCE, reference_decode, reference_encode
from parity.test_wan_vae import decode as decode_pixels
from parity.test_wan_vae import encode as encode_pixels
from parity.test_wan_vae import load as load_vae
from stagewise import Stages

import joyjax
from joyjax.runtime.request import check_request
from joyjax.sampling.guided_step import predict

pytestmark = [pytest.mark.jax, pytest.mark.parity]
nightly = pytest.mark.nightly

PICTURE = cutout(41, 60)  # 4 × 4 tokens at base size 64, 4 × 8 at 96


def test_stages(layered_reference, layered_loaded, monkeypatch, error):
    """Two layers of a picture with alpha: the condition, the first velocity, each step, and the pixels."""
    noise, negative = draw(PICTURE, 2, seed=1), "blurry, low quality"
    theirs = their_stages(layered_reference, monkeypatch, PICTURE, noise, negative=negative)
    ours = {}

    def keep(event):
        ours[f"latents after step {event.step}"] = np.asarray(event.latents)

    ours["layers"] = np.stack(our_layers(layered_loaded, PICTURE, noise, negative_prompt=negative, callback=keep))
    request = check_request(
        layered_loaded, PICTURE, PROMPT, layers=2, noise=noise, steps=STEPS, negative_prompt=negative
    )
    run = Stages(layered_loaded, request)
    velocity = predict(layered_loaded.weights["transformer"], run.noise, jnp.ones(1), run.condition)
    target, frame = run.plan.lengths.target[0], run.plan.lengths.references[0]
    ours["first velocity"] = np.asarray(velocity)[1:, :target]  # the reference predicts with the prompt first
    ours["condition"] = np.asarray(run.references)[:, :frame]
    assert set(ours) == set(theirs)
    tolerances = {"condition": 1e-5, "first velocity": VELOCITY_TOLERANCE, "latents": LATENTS_TOLERANCE}
    for name, expected in theirs.items():
        for kind, tolerance in tolerances.items():
            if name.startswith(kind):
                found = error(ours[name], expected)
                print(f"{name}: {found:.2g}")
                assert found <= tolerance, name
    assert_same(ours["layers"], theirs["layers"])
    assert theirs["layers"][..., 3].std() > 10  # alpha is not uniform


@pytest.mark.parametrize(
    ("picture", "layers", "theirs", "ours"),
    [
        pytest.param(PICTURE, 1, {"cfg_normalize": True}, {"cfg_normalize": True}, id="normalised, one layer"),
        pytest.param(PICTURE, 2, {"base_size": 64}, {"base_size": 64}, id="small", marks=nightly),
        pytest.param(
            PICTURE,
            3,
            {"base_size": 64, "cfg_normalize": True},
            {"base_size": 64, "cfg_normalize": True},
            id="small, normalised, three layers",
            marks=nightly,
        ),
        pytest.param(cutout(90, 31), 2, {}, {}, id="portrait", marks=nightly),
        pytest.param(
            PICTURE, 2, {"negative": None, "scale": 1.0}, {"guidance_scale": 1.0}, id="one pass", marks=nightly
        ),
        pytest.param(
            PICTURE,
            1,
            {"base_size": 32, "negative": None, "scale": 1.0, "steps": 2, "prompt": 40 * f"{PROMPT}; "},
            {"base_size": 32, "guidance_scale": 1.0, "steps": 2, "prompt": 40 * f"{PROMPT}; "},
            id="more layers than half the side, long prompt",
            marks=nightly,
        ),
    ],
)
def test_whole_pictures(picture, layers, theirs, ours, layered_reference, layered_loaded, monkeypatch):
    base_size = theirs.get("base_size", 96)
    noise = draw(picture, layers, base_size, seed=layers)
    expected = their_layers(layered_reference, monkeypatch, picture, noise, **theirs)
    found = our_layers(layered_loaded, picture, noise, **ours)
    assert_same(np.stack(found), np.stack(expected))


@nightly
def test_an_opaque_picture_is_given_an_alpha_channel(layered_reference, layered_loaded, monkeypatch):
    """The reference takes RGBA alone."""
    picture, noise = photo(41, 60), draw(PICTURE, 1)
    expected = their_layers(layered_reference, monkeypatch, picture.convert("RGBA"), noise, steps=2)
    assert_same(np.stack(our_layers(layered_loaded, picture, noise, steps=2)), np.stack(expected))


@nightly
def test_sharded_bfloat16_files(qwen_reference, tmp_path, monkeypatch):
    """Weights stored in bfloat16 in several files, computed in float32 on both sides."""
    import copy

    import layered_checkpoint

    pipeline = layered_checkpoint.make_pipeline(copy.deepcopy(qwen_reference), seed=3)
    for part in (pipeline.transformer, pipeline.text_encoder, pipeline.vae):
        for parameter in part.parameters():
            parameter.data = parameter.data.to(torch.bfloat16).float()
    folder = layered_checkpoint.save_layered(pipeline, tmp_path / "m", dtype=torch.bfloat16, shard_size="200KB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 2
    noise = draw(PICTURE, 1)
    expected = their_layers(pipeline, monkeypatch, PICTURE, noise, steps=2)
    found = our_layers(joyjax.load(folder, dtype="float32"), PICTURE, noise, steps=2)
    assert_same(np.stack(found), np.stack(expected))


def test_the_autoencoder_with_alpha(layered_reference, layered_folder, error):
    weights, rng = load_vae(layered_folder / "vae"), np.random.default_rng(0)
    pixels = rng.uniform(-1, 1, (1, 24, 40, 4)).astype(np.float32)
    latents = rng.standard_normal((1, 3, 5, 16)).astype(np.float32)
    assert error(encode_pixels(weights, pixels), reference_encode(layered_reference.vae, pixels)) < ENCODE_TOLERANCE
    expected = reference_decode(layered_reference.vae, latents)
    assert expected.shape == (1, 24, 40, 4)
    assert error(decode_pixels(weights, latents), expected) < DECODE_TOLERANCE


@nightly
def test_tiles_of_the_autoencoder_with_alpha(layered_reference, layered_folder, error):
    import copy

    weights, rng = load_vae(layered_folder / "vae"), np.random.default_rng(0)
    pixels = rng.uniform(-1, 1, (1, 328, 264, 4)).astype(np.float32)
    theirs = copy.deepcopy(layered_reference.vae)
    theirs.enable_tiling()
    ours = jax.jit(lambda weights, pixels: weights.module().encode(pixels, "tiled"))(weights, pixels)
    assert error(ours, reference_encode(theirs, pixels)) < ENCODE_TOLERANCE


def test_the_published_names_and_time(layered_reference, layered_loaded, error):
    """The first row of the embedding is added after the MLP."""
    time = np.float32([1.0, 0.74337, 0.02])
    theirs = layered_reference.transformer.time_text_embed(
        torch.from_numpy(time), torch.zeros(1), torch.zeros(3, dtype=torch.long)
    )
    network = layered_loaded.weights["transformer"].module()
    assert error(network._embed_time(jnp.asarray(time)), theirs) < 2e-5
