"""The bundled checkpoint in Diffusers: it loads without a word, and gives the same pictures."""

import numpy as np
import pytest
from PIL import Image

import joyjax
from joyjax.convert.source.model import DEMO
from joyjax.media.image import to_pixels
from joyjax.sampling.noise import initial_noise
from joyjax.score import tasks
from joyjax.shapes.draw import render

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def theirs():
    import random_checkpoint

    return random_checkpoint.load(DEMO)


def test_no_tensor_is_missing_or_left_over():
    from diffusers import AutoencoderKLWan, JoyImageEditTransformer3DModel
    from transformers import Qwen3VLForConditionalGeneration

    for kind, name in (
        (JoyImageEditTransformer3DModel, "transformer"),
        (AutoencoderKLWan, "vae"),
        (Qwen3VLForConditionalGeneration, "text_encoder"),
    ):
        _, found = kind.from_pretrained(DEMO / name, output_loading_info=True)
        assert not any(found.values()), (name, found)


@pytest.mark.parametrize("count", [2, pytest.param(8, marks=pytest.mark.nightly)])
def test_the_same_pictures(count, theirs, monkeypatch):
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from diffusers.pipelines.joyimage import image_processor

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    monkeypatch.setitem(image_processor.BUCKETS, 1024, [(128, 128)])
    ours = joyjax.load(dtype="float32")
    for _, task in tasks(count, seed=7):
        source = Image.fromarray(render(task.pair.source))
        noise = initial_noise(task.seed, (to_pixels(source)[None],), (1, 16, 16, 16))
        latents = torch.from_numpy(np.moveaxis(noise, -1, 1)[:, :, None])[:, None]
        settings = {
            "num_inference_steps": ours.generation_defaults.steps,
            "guidance_scale": ours.generation_defaults.guidance_scale,
        }
        expected = np.asarray(theirs(image=source, prompt=task.prompt, latents=latents, **settings).images[0])
        result = np.asarray(joyjax.edit(ours, source, task.prompt, seed=task.seed).image)
        off = np.abs(result.astype(int) - expected.astype(int))
        print(f"{task.prompt}: largest difference {off.max()} of 255, {np.mean(off > 0):.2%} of values")
        assert result.shape == (128, 128, 3)
        assert off.max() <= 2
