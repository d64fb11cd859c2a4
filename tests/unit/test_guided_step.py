"""The compiled stages: how often they compile, what they take away, that they compose, and what a callback sees."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from stagewise import Stages

import joyjax
from joyjax.layers.weights import leaves
from joyjax.models.autoencoder.stages import decode_latents, encode_images
from joyjax.models.text_encoding import encode_prompt
from joyjax.runtime.request import check_request
from joyjax.sampling.guided_step import advance, predict

pytestmark = [pytest.mark.jax, pytest.mark.parity]  # the checkpoint is the reference's

STAGES = (encode_prompt, encode_images, predict, advance, decode_latents)
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8))
PROMPT = "make the sky red"
SIZE = {"height": 32, "width": 48, "exact_size": True}


def edit(pipeline: joyjax.Pipeline, prompt: str = PROMPT, **options) -> joyjax.Result:
    return joyjax.edit(pipeline, PICTURE, prompt, **{"steps": 2, **SIZE, **options})


def compiled() -> list[int]:
    return [stage._cache_size() for stage in STAGES]


@pytest.fixture(scope="module")
def first(loaded) -> joyjax.Result:
    """An edit after which these sizes are compiled, and nothing else is."""
    for stage in STAGES:
        stage.clear_cache()
    result = edit(loaded)
    assert compiled() == [1, 1, 1, 1, 1]
    return result


def prepared(pipeline: joyjax.Pipeline, **options) -> Stages:
    arguments = dict.fromkeys(("negative_prompt", "steps", "height", "width", "base_size", "noise"))
    arguments |= {"guidance_scale": 4.0, "seed": 0, "exact_size": False, **SIZE, "steps": 2, **options}
    request = check_request(pipeline, PICTURE, PROMPT, **arguments)
    return Stages(pipeline, request)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prompt": "remove the small dog"},
        {"prompt": ""},
        {"negative_prompt": "blurry"},
        {"seed": 2**64 - 1},
        {"guidance_scale": 7.0},
        {"guidance_scale": np.float64(1.5)},
        {"steps": 3},
        {"noise": np.random.default_rng(3).standard_normal((1, 4, 6, 16))},
        {"callback": lambda event: event.preview()},
    ],
    ids=lambda options: "-".join(options) or "again",
)
def test_a_second_edit_compiles_nothing(options, loaded, first):
    before = compiled()
    edit(loaded, **options)
    assert compiled() == before


def test_a_size_with_as_many_tokens_shares_the_denoising_step(loaded, first):
    before = compiled()
    edit(loaded, height=48, width=32)
    assert np.subtract(compiled(), before).tolist() == [0, 1, 0, 0, 1]  # the autoencoder's stages alone


def test_another_checkpoint_of_the_same_configuration_shares_every_program(checkpoint, first):
    before = compiled()
    again = joyjax.load(checkpoint, dtype="float32")
    np.testing.assert_array_equal(np.asarray(edit(again).image), np.asarray(first.image))
    assert compiled() == before


def test_without_guidance_there_is_one_pass(loaded, first):
    before = compiled()
    without, below = edit(loaded, guidance_scale=1.0), edit(loaded, guidance_scale=0.0)
    assert np.subtract(compiled(), before).tolist() == [1, 0, 1, 1, 0]
    np.testing.assert_array_equal(np.asarray(without.image), np.asarray(below.image))


def test_a_step_donates_its_latents(loaded, first):
    run = prepared(loaded)
    latents, condition = jnp.asarray(run.noise), run.condition
    levels = loaded.parts.solver.levels(2, None, None).step(0)
    velocity = predict(loaded.weights["transformer"], latents, levels.time, condition)
    how = {"passes": 2, "solver": loaded.parts.solver, "guidance": loaded.family.guidance(loaded.parts, run.request)}
    after = advance(latents, velocity, levels, np.float32([4]), **how)
    assert latents.is_deleted()
    assert not any(array.is_deleted() for array in (after, *jax.tree.leaves((condition, loaded.weights))))


def test_all_stages_compose_into_one_program(loaded, first):
    run = prepared(loaded)
    solver, own = loaded.parts.solver, run.plan.own.geometry
    levels = solver.levels(run.request.steps, None, None)
    how = {"passes": 2, "solver": solver, "guidance": loaded.family.guidance(loaded.parts, run.request)}

    @jax.jit
    def whole(weights, latents, scale):
        condition = Stages(dataclasses.replace(loaded, weights=weights), run.request).condition
        for n in range(run.request.steps):
            level = jax.tree.map(jnp.asarray, levels.step(n))
            velocity = predict(weights["transformer"], latents, level.time, condition)
            latents = advance(latents, velocity, level, scale, **how)
        width = run.plan.size[2] // own.sides[1]
        return decode_latents(weights["vae"], latents, patch=own.patch, width=width)

    pixels, finite = whole(dict(loaded.weights), jnp.asarray(run.noise), jnp.full(1, 4.0))
    off = np.abs(np.asarray(first.image).astype(int) - np.asarray(pixels[0]))
    assert finite.all()
    assert off.max() <= 1
    assert np.asarray(first.image).std() > 10


@pytest.mark.parametrize("name", ["text_encoder", "transformer", "vae"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_never_give_a_picture(name, value, loaded, first):
    before = compiled()
    with pytest.raises(joyjax.JoyJaxError, match=r"not finite in float32: the weights .* `joyjax info`"):
        edit(damaged(loaded, name, value))
    assert compiled() == before


def test_a_decoder_that_overflows_never_gives_a_black_picture(loaded, first):
    with pytest.raises(joyjax.JoyJaxError, match="the decoded pixels are not finite"):
        edit(damaged(loaded, "vae", np.nan, only="decoder.conv_out.bias"))


def damaged(pipeline: joyjax.Pipeline, name: str, value: float, only: str = "") -> joyjax.Pipeline:
    """The pipeline with one number of each of a network's parameters replaced."""
    weights = pipeline.weights[name]
    arrays = {
        path: leaf[...].at[(0,) * leaf.ndim].set(value) if only in path else leaf[...]
        for path, leaf in leaves(weights.state).items()
    }
    return dataclasses.replace(pipeline, weights={**pipeline.weights, name: weights.filled(arrays)})


def test_the_callback_gets_every_step(loaded, first):
    events, previews = [], []

    def callback(event: joyjax.StepEvent) -> None:
        events.append(event)
        previews.append(event.preview())

    result = edit(loaded, steps=3, callback=callback)
    assert [(event.step, event.steps) for event in events] == [(1, 3), (2, 3), (3, 3)]
    assert all(0 < event.seconds < result.timings["denoise"] for event in events)
    assert all(picture.size == (48, 32) for picture in previews)
    # Latents stay readable after the next step has taken its own away.
    assert all(event.latents.shape == (1, 6, 64) and np.isfinite(event.latents).all() for event in events)
    assert len({np.asarray(event.latents).tobytes() for event in events}) == 3
    # A step's preview shows where it points; the last one's is the result, and all can be decoded later.
    assert np.abs(np.asarray(previews[-1]).astype(int) - np.asarray(result.image)).max() <= 1
    assert events[0].preview().tobytes() == previews[0].tobytes() != previews[-1].tobytes()


def test_a_callback_changes_nothing(loaded, first):
    np.testing.assert_array_equal(np.asarray(edit(loaded, callback=lambda event: None).image), np.asarray(first.image))


@pytest.mark.parametrize("error", [joyjax.Cancelled, KeyboardInterrupt, ZeroDivisionError])
def test_what_a_callback_raises_stops_the_edit_within_a_step(error, loaded, first):
    seen = []

    def callback(event: joyjax.StepEvent) -> None:
        seen.append(event.step)
        if event.step == 2:
            raise error

    with pytest.raises(error):
        edit(loaded, steps=5, callback=callback)
    assert seen == [1, 2]
    np.testing.assert_array_equal(np.asarray(edit(loaded).image), np.asarray(first.image))


def test_a_result_says_what_it_depends_on(loaded, first):
    assert first.settings == {
        "model": loaded.source,
        "family": "JoyImage-Edit",
        "dtype": "float32",
        "linear": "exact",
        "kernels": "xla",
        "prompt": PROMPT,
        "negative_prompt": "",
        "steps": 2,
        "sigmas": None,
        "guidance_scale": 4.0,
        "seed": 0,
        "height": 32,
        "width": 48,
        "exact_size": True,
        "base_size": 1024,
        "fit": "crop",
        "paste_back": False,
        "noise": "rule 1",
        "vae_encode": "exact",
        "vae_decode": "exact",
        "guidance_until": 1.0,
        "cache": None,
    }
    assert first.image.size == (48, 32)
    assert first.crop.source == (40, 50)
    stages_and_total = ["prepare", "prompt", "references", "denoise", "decode", "total"]
    assert list(first.timings) == stages_and_total
    assert first.timings["total"] == pytest.approx(sum(first.timings[name] for name in stages_and_total[:-1]))


def test_a_batch_of_pictures_from_words(loaded):
    """No edit has a reference: their axis is empty."""
    rows = [{"image": None, "prompt": prompt, "steps": 1, **SIZE} for prompt in ("a tree", "a dog")]
    for row, result in zip(rows, joyjax.edit_batch(loaded, rows), strict=True):
        alone = np.asarray(joyjax.edit(loaded, **row).image, int)
        assert np.abs(np.asarray(result.image, int) - alone).max() <= 1
