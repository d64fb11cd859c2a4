"""Several edits at once: each has the result that it has alone, whatever else runs with it."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageDraw
from stagewise import inputs_of

import joyjax
from joyjax import api
from joyjax.families import encoding
from joyjax.families.joyimage import EDIT_PLUS
from joyjax.layers.patch import unpatchify
from joyjax.runtime import engine

pytestmark = pytest.mark.filterwarnings("ignore::joyjax.AdviceWarning")  # the demo is given noise to edit


def photo(height: int, width: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8))


@pytest.fixture(scope="module")
def demo():
    return joyjax.load(dtype="float32")


@pytest.fixture(scope="module")
def plus(demo):
    """The demo as Edit-Plus: one network serves both."""
    return dataclasses.replace(demo, family=EDIT_PLUS)


def off(one: Image.Image, other: Image.Image) -> int:
    assert one.size == other.size
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other)).max())


def spy(monkeypatch) -> list[int]:
    """Note how many edits are denoised together."""
    seen, right = [], engine.Engine._denoise
    monkeypatch.setattr(
        engine.Engine, "_denoise", lambda self, jobs, *rest: seen.append(len(jobs)) or right(self, jobs, *rest)
    )
    return seen


def test_rows_that_differ_give_what_they_give_alone(demo, monkeypatch):
    """Other sizes of one table, prompts, seeds, scales of guidance and no picture; only the steps set one apart."""
    rows = [
        {"image": photo(90, 140, 1), "prompt": "make it red", "seed": 7, "guidance_scale": 2.0, "negative_prompt": "x"},
        {"image": photo(128, 128, 2), "prompt": "remove the large blue circle from the left", "guidance_scale": 3.5},
        {"image": None, "prompt": "a green square", "guidance_scale": 2.0},
        {"image": photo(200, 90, 3), "prompt": "", "guidance_scale": 5.0, "steps": 3},
        {"image": photo(90, 140, 1), "prompt": "make it red", "seed": 8, "guidance_scale": 2.0, "fit": "pad"},
    ]
    alone = [joyjax.edit(demo, row["image"], **{k: v for k, v in row.items() if k != "image"}) for row in rows]
    assert len({np.asarray(result.image).tobytes() for result in alone}) == len(rows)
    seen = spy(monkeypatch)
    together = joyjax.edit_batch(demo, rows)
    assert sorted(seen) == [1, 4]
    assert [off(a.image, b.image) <= 1 for a, b in zip(alone, together, strict=True)] == [True] * 5
    assert [result.seed for result in together] == [7, 0, 0, 0, 8]
    assert [result.settings for result in together] == [result.settings for result in alone]
    assert [result.crop for result in together] == [result.crop for result in alone]
    seen.clear()
    joyjax.edit_batch(demo, rows[:3], batch_size=2)
    assert seen == [2, 1]


def test_rows_with_other_numbers_of_references(plus, monkeypatch):
    pictures = [photo(128, 128, 4), photo(90, 140, 5), photo(150, 80, 6)]
    rows = [
        {
            "image": pictures[:count] or None,
            "prompt": f"put {count} things together",
            "steps": 2,
            "height": 128,
            "width": 128,
        }
        for count in (1, 3, 0, 2)
    ]
    alone = [joyjax.edit(plus, row["image"], **{k: v for k, v in row.items() if k != "image"}) for row in rows]
    seen = spy(monkeypatch)
    together = joyjax.edit_batch(plus, rows)
    assert seen == [4]
    assert [off(a.image, b.image) <= 1 for a, b in zip(alone, together, strict=True)] == [True] * 4
    assert [len(result.crops) for result in together] == [1, 3, 0, 2]


def test_seeds_of_one_request_are_encoded_once(demo, monkeypatch):
    calls, right = [], encoding.encode_prompt
    monkeypatch.setattr(encoding, "encode_prompt", lambda *inputs, **how: calls.append(1) or right(*inputs, **how))
    row = {"image": photo(128, 128, 1), "prompt": "make it red", "steps": 1}
    results = joyjax.edit_batch(demo, [{**row, "seed": seed} for seed in range(3)], batch_size=1)
    assert len(calls) == 1
    assert len({np.asarray(result.image).tobytes() for result in results}) == 3
    joyjax.edit_batch(demo, [row, {**row, "prompt": "make it blue"}, {**row, "image": photo(128, 128, 2)}])
    assert len(calls) == 4


def test_the_noise_of_a_seed_is_that_of_the_row_alone(demo):
    """Whatever runs beside it; and what is made with a seed is not edited with the same noise."""
    row = {"prompt": "a red circle", "steps": 1, "height": 128, "width": 128}
    made = joyjax.edit(demo, None, **row)
    noise = {}
    for name, image in (("made", None), ("edited", made.image)):
        request = api.check_options(demo, {**row, "image": image})
        tokens = inputs_of(demo, request).noise
        noise[name] = np.asarray(unpatchify(jnp.asarray(tokens), (2, 2), 8))
    assert noise["made"].shape == noise["edited"].shape
    assert np.abs(np.corrcoef(noise["made"].ravel(), noise["edited"].ravel())[0, 1]) < 0.1
    edited = joyjax.edit(demo, made.image, **row)
    given = joyjax.edit(demo, made.image, noise=noise["edited"], **row)
    assert off(edited.image, given.image) == 0


def test_callbacks_are_those_of_the_rows(demo):
    events = {0: [], 2: []}
    row = {"image": photo(90, 140, 1), "prompt": "make it red", "steps": 3}
    rows = [{**row, "seed": n} for n in range(3)]
    for n, kept in events.items():
        rows[n]["callback"] = kept.append
    results = joyjax.edit_batch(demo, rows)
    for n, kept in events.items():
        assert [(event.step, event.steps) for event in kept] == [(1, 3), (2, 3), (3, 3)]
        assert all(event.latents.shape == (1, 54, 64) for event in kept)  # without padding
        assert off(kept[-1].preview(), results[n].image) <= 1


def test_cancelling_ends_all(demo):
    seen = []

    def stop(event):
        seen.append(event.step)
        raise joyjax.Cancelled

    row = {"image": photo(90, 140, 1), "prompt": "make it red", "steps": 3}
    with pytest.raises(joyjax.Cancelled):
        joyjax.edit_batch(demo, [row, {**row, "callback": stop}])
    assert seen == [1]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "x"}, {"image": None}], "request 1: prompt is missing"),
        (
            [{"prompt": "x", "num_inference_steps": 3}, {"prompt": "y"}],
            "request 0: 'num_inference_steps' is not an arg.*steps",
        ),
        ([{"prompt": "x", "steps": 0}, {"prompt": "x"}], "request 0: steps is 0"),
        ([{"prompt": "x", "mask": photo(8, 8, 0)}], "mask is given without a picture"),
        ([{"prompt": "x", "paste_back": True}], "paste_back is given without a picture"),
        ([{"prompt": "x", "fit": "pad"}], "fit is 'pad', but there is no picture to fit"),
    ],
)
def test_a_bad_request_is_named_and_nothing_runs(rows, message, demo, monkeypatch):
    monkeypatch.setattr(encoding, "encode_prompt", lambda *_, **__: pytest.fail("something ran"))
    with pytest.raises(joyjax.RequestError, match=message):
        joyjax.edit_batch(demo, rows)


@pytest.mark.parametrize("size", [0, -1, True])
def test_a_bad_batch_size(size, demo):
    with pytest.raises(joyjax.RequestError, match="batch_size is .*; expected a whole number from 1"):
        joyjax.edit_batch(demo, [], batch_size=size)


def test_no_requests(demo):
    assert joyjax.edit_batch(demo, []) == []


def test_the_picture_is_given_back(demo):
    """Fits, mask and paste-back through an edit: sizes, and pixels that must not change."""
    original = photo(301, 455, 3).convert("RGBA")
    original.putalpha(200)
    drawn = Image.new("L", original.size)
    ImageDraw.Draw(drawn).rectangle((100, 50, 300, 200), fill=255)
    options = {"prompt": "make it red", "steps": 1}
    cropped = joyjax.edit(demo, original, **options)
    padded = joyjax.edit(demo, original, fit="pad", **options)
    assert cropped.image.size == (cropped.settings["width"], cropped.settings["height"]) == (144, 96)
    assert padded.image.size == tuple(np.subtract(padded.crop.inner[2:], padded.crop.inner[:2]))
    assert (cropped.crop.fit, padded.crop.fit, padded.crop.lost) == ("crop", "pad", 0)
    back = joyjax.edit(demo, original, paste_back=True, **options).image
    masked = joyjax.edit(demo, original, mask=drawn, **options).image
    assert back.size == masked.size == original.size
    assert back.mode == masked.mode == "RGBA"
    keep = np.asarray(drawn) == 0
    np.testing.assert_array_equal(np.asarray(masked)[keep], np.asarray(original)[keep])
    assert (np.asarray(masked)[~keep] != np.asarray(original)[~keep]).any(axis=-1).mean() > 0.9
    chained = original
    for round_ in range(5):
        chained = joyjax.edit(demo, chained, mask=drawn, seed=round_, **options).image
    np.testing.assert_array_equal(np.asarray(chained)[keep], np.asarray(original)[keep])


def test_what_cannot_be_given_back_is_refused_first(demo, plus, monkeypatch):
    monkeypatch.setattr(encoding, "encode_prompt", lambda *_, **__: pytest.fail("something ran"))
    picture = photo(128, 128, 1)
    with pytest.raises(
        joyjax.RequestError, match="paste_back needs a result of the last reference's own size, 128 × 128"
    ):
        joyjax.edit(plus, [picture], "x", paste_back=True, height=96, width=144)
    with pytest.raises(joyjax.RequestError, match="the mask is 127 × 128 and the picture 128 × 128"):
        joyjax.edit(demo, picture, "x", mask=Image.new("L", (127, 128), 255))
    corner = Image.new("L", (128, 1024))
    corner.putpixel((64, 3), 255)
    with pytest.raises(joyjax.PictureError, match="white only where the crop cuts the picture off"):
        joyjax.edit(demo, photo(1024, 128, 1), "x", mask=corner)


def test_options_without_effect_are_refused(demo):
    picture = photo(128, 128, 1)
    for options, message in (
        ({"guidance_until": 0.5}, "guidance_until is 0.5, but guidance_scale is 1.0: there is no guidance"),
        ({"negative_prompt": "blurry"}, "negative_prompt is given, but guidance_scale is 1.0"),
        ({"negative_prompt": "blurry", "guidance_scale": [1.0, 0.5], "steps": 2}, "negative_prompt is given"),
    ):
        with pytest.raises(joyjax.RequestError, match=message):
            joyjax.edit(demo, picture, "make it red", **options)
    assert joyjax.edit(demo, picture, "make it red", negative_prompt="", steps=1).settings["negative_prompt"] == ""
