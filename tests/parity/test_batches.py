"""Levels, guidance by step, several results and batches against Diffusers' pipelines, live."""

import numpy as np
import pytest
from pairs import BUCKETS, LEVELS, assert_same, draw, our_edit, photo, their_edit

import joyjax
from joyjax.families import joyimage_buckets

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")

SIZE = (64, 96)
SIGMAS = [1.0, 0.85, 0.4, 0.1]
SCALES = [4.0, 2.5, 1.0, 6.0]


@pytest.fixture(autouse=True)
def _posterior_mode(monkeypatch):
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())


@pytest.fixture(scope="module")
def their_plus():
    import random_checkpoint

    return random_checkpoint.make_pipeline("tiny", plus=True, seed=4)


@pytest.fixture(scope="module")
def plus(their_plus, tmp_path_factory):
    import random_checkpoint

    return joyjax.load(random_checkpoint.save(their_plus, tmp_path_factory.mktemp("plus")), dtype="float32")


def by_step(pipeline, step, time, given):
    """Change the scale for the next step, as the reference lets a callback do."""
    pipeline._guidance_scale = SCALES[min(step + 1, len(SCALES) - 1)]
    return given


def far(one, other) -> int:
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other)).max())


@pytest.mark.nightly
def test_given_levels(reference, loaded, monkeypatch):
    image, noise = photo(70, 101), draw(*SIZE)
    theirs = their_edit(reference, monkeypatch, [image], "make it red", SIZE, noise, sigmas=SIGMAS)
    ours = our_edit(loaded, [image], "make it red", SIZE, noise, steps=None, sigmas=SIGMAS)
    assert_same(ours, theirs)
    assert far(ours, our_edit(loaded, [image], "make it red", SIZE, noise)) > LEVELS  # others than the schedule's


@pytest.mark.nightly
def test_guidance_by_step(reference, loaded, monkeypatch):
    """One step, whose scale is 1, has no unconditional pass, on both sides."""
    image, noise = photo(70, 101), draw(*SIZE)
    options = {"guidance_scale": SCALES[0], "callback_on_step_end": by_step}
    theirs = their_edit(reference, monkeypatch, [image], "make it red", SIZE, noise, **options)
    ours = our_edit(loaded, [image], "make it red", SIZE, noise, guidance_scale=SCALES)
    assert_same(ours, theirs)
    assert far(ours, our_edit(loaded, [image], "make it red", SIZE, noise, guidance_scale=SCALES[0])) > LEVELS


@pytest.mark.nightly
def test_several_results_of_one_request(reference, loaded, monkeypatch):
    from diffusers.pipelines.joyimage import image_processor

    monkeypatch.setitem(image_processor.BUCKETS, 1024, [SIZE])
    image, noise = photo(70, 101), [draw(*SIZE, seed) for seed in (1, 2)]
    latents = torch.from_numpy(np.moveaxis(np.concatenate(noise), -1, 1)[:, None, :, None])
    theirs = reference(
        image=image, prompt="make it red", latents=latents, num_inference_steps=4, num_images_per_prompt=2
    ).images
    row = {"image": image, "prompt": "make it red", "height": 64, "width": 96, "exact_size": True, "steps": 4}
    ours = joyjax.edit_batch(loaded, [{**row, "noise": each} for each in noise])
    for mine, other in zip(ours, theirs, strict=True):
        assert_same(np.asarray(mine.image), np.asarray(other))
    assert far(ours[0].image, ours[1].image) > LEVELS


@pytest.mark.nightly
def test_a_batch_of_edit_is_not_the_references(reference, loaded, monkeypatch):
    """Edit of Diffusers attends to the padding of a batch's shorter prompts; ours give what they give alone."""
    from diffusers.pipelines.joyimage import image_processor

    monkeypatch.setitem(image_processor.BUCKETS, 1024, [SIZE])
    images, noise = [photo(70, 101), photo(60, 90, 2)], [draw(*SIZE, seed) for seed in (1, 2)]
    prompts = ["red", "put a large wooden table with a round top between the two windows on the left"]
    alone = [
        their_edit(reference, monkeypatch, [image], prompt, SIZE, each)
        for image, prompt, each in zip(images, prompts, noise, strict=True)
    ]
    latents = torch.from_numpy(np.moveaxis(np.concatenate(noise), -1, 1)[:, None, :, None])
    together = reference(image=images, prompt=prompts, latents=latents, num_inference_steps=4).images
    assert far(together[0], alone[0]) > 10 * LEVELS  # contaminated
    rows = [
        {"image": image, "prompt": prompt, "noise": each, "height": 64, "width": 96, "exact_size": True, "steps": 4}
        for image, prompt, each in zip(images, prompts, noise, strict=True)
    ]
    for mine, other in zip(joyjax.edit_batch(loaded, rows), alone, strict=True):
        assert_same(np.asarray(mine.image), other)


def test_a_ragged_batch_of_edit_plus(their_plus, plus, monkeypatch):
    """Rows with one, three and two references of unlike aspects, and prompts of unlike lengths."""
    from diffusers.pipelines.joyimage import image_processor

    monkeypatch.setattr(joyimage_buckets, "buckets", lambda base_size: BUCKETS)
    monkeypatch.setitem(image_processor.BUCKETS, 1024, list(BUCKETS))
    pictures = [photo(120, 90, 1), photo(100, 180, 2), photo(130, 128, 3)]
    images = [pictures[:1], pictures, pictures[1:]]
    prompts = ["red", "put the first dog on the second table in the room of the third", "swap both"]
    height, width = 64, 96
    noise = [draw(height, width, seed) for seed in range(3)]
    latents = torch.from_numpy(np.moveaxis(np.concatenate(noise), -1, 1)[:, :, None])
    theirs = their_plus(
        images=images, prompt=prompts, latents=latents, num_inference_steps=2, height=height, width=width
    ).images
    rows = [
        {"image": several, "prompt": prompt, "noise": each, "height": height, "width": width, "steps": 2}
        for several, prompt, each in zip(images, prompts, noise, strict=True)
    ]
    for mine, other in zip(joyjax.edit_batch(plus, [{**row, "base_size": 256} for row in rows]), theirs, strict=True):
        assert_same(np.asarray(mine.image), np.asarray(other))
