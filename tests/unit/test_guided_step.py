"""The compiled stages: how often they compile, what they take away, that they compose, and what a callback sees."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import joyjax
from joyjax.families.family import Inputs
from joyjax.families.request import Request
from joyjax.layers.patch import patchify
from joyjax.layers.weights import leaves
from joyjax.runtime import engine
from joyjax.runtime.request import check_request
from joyjax.sampling import guided_step as stages
from joyjax.sampling.euler import sigmas, timesteps

pytestmark = [pytest.mark.jax, pytest.mark.parity]  # the checkpoint is the reference's

STAGES = (stages.encode_prompt, stages.encode_images, stages.denoise_step, stages.decode_latents)
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
    assert compiled() == [1, 1, 1, 1]
    return result


def prepared(pipeline: joyjax.Pipeline, **options) -> tuple[Request, Inputs]:
    arguments = dict.fromkeys(("negative_prompt", "steps", "height", "width", "base_size", "noise"))
    arguments |= {"guidance_scale": 4.0, "seed": 0, "exact_size": False, **SIZE, "steps": 2, **options}
    request = check_request(pipeline, PICTURE, PROMPT, **arguments)
    return request, pipeline.family.prepare(request, pipeline.parts)


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
    encode_prompt, encode_images, denoise_step, decode_latents = np.subtract(compiled(), before)
    assert (encode_prompt, denoise_step) == (0, 0)
    assert (encode_images, decode_latents) == (1, 1)


def test_another_checkpoint_of_the_same_configuration_shares_every_program(checkpoint, first):
    before = compiled()
    again = joyjax.load(checkpoint, dtype="float32")
    np.testing.assert_array_equal(np.asarray(edit(again).image), np.asarray(first.image))
    assert compiled() == before


def test_without_guidance_there_is_one_pass(loaded, first):
    before = compiled()
    without, below = edit(loaded, guidance_scale=1.0), edit(loaded, guidance_scale=0.0)
    assert np.subtract(compiled(), before).tolist() == [1, 0, 1, 0]
    np.testing.assert_array_equal(np.asarray(without.image), np.asarray(below.image))


def test_a_step_takes_its_latents_away(loaded, first):
    request, inputs = prepared(loaded)
    config = loaded.parts.configs["transformer"]
    txt, references = engine.encode_prompt(loaded, inputs), engine.encode_references(loaded, inputs)
    condition = loaded.family.condition(inputs, txt, references)
    latents = patchify(jnp.asarray(inputs.noise), config.patch)
    level, scale = np.float32(1), np.float32(request.guidance_scale)
    after = stages.denoise_step(
        loaded.weights["transformer"], latents, condition, level, level, level, scale, channels=config.in_channels
    )
    assert latents.is_deleted()
    assert not any(array.is_deleted() for array in (after, *jax.tree.leaves((condition, loaded.weights))))


def test_all_stages_compose_into_one_program(loaded, first):
    request, inputs = prepared(loaded)
    config, schedule = loaded.parts.configs["transformer"], loaded.parts.schedule
    levels = sigmas(request.steps, schedule)
    times = timesteps(levels, schedule)

    @jax.jit
    def whole(weights, noise, guidance_scale):
        pipeline = dataclasses.replace(loaded, weights=weights)
        txt, references = engine.encode_prompt(pipeline, inputs), engine.encode_references(pipeline, inputs)
        condition = pipeline.family.condition(inputs, txt, references)
        latents = patchify(noise, config.patch)
        for n in range(request.steps):
            now, then, time = (jnp.float32(x) for x in (levels[n], levels[n + 1], times[n]))
            latents = stages.denoise_step(
                weights["transformer"], latents, condition, now, then, time, guidance_scale, channels=config.in_channels
            )
        width = inputs.noise.shape[2] // config.patch[1]
        return stages.decode_latents(weights["vae"], latents, patch=config.patch, width=width)

    pixels, finite = whole(dict(loaded.weights), jnp.asarray(inputs.noise), jnp.float32(4))
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


def test_the_callback_is_told_every_step(loaded, first):
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
