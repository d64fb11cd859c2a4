"""The whole edit against Diffusers' pipelines, live: same checkpoint, picture and noise; strong random weights."""

import json

import numpy as np
import pytest
from PIL import Image

import joyjax
from joyjax.families import joyimage
from joyjax.inputs.image import buckets

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")

LEVELS = 2  # of 255; measured: 0 or 1, where a value lies on the edge between two
SHARE = 0.003  # of all values may differ; measured: up to 0.08 %
LONG = (
    "please replace the small wooden table on the left by a larger round one made of dark marble, and keep the rest; "
)


@pytest.fixture(autouse=True)
def _posterior_mode(monkeypatch):
    """The reference draws the posterior at random whatever the seed; joyjax takes its mode."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """A picture with edges, gradients and grain."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    rng = np.random.default_rng(seed)
    base = np.stack([np.sin(9 * x + 5 * y * seed), np.cos(7 * y - 3 * x), (x * 6 % 1 > 0.5) * 1.0], axis=-1)
    grain = 0.2 * rng.standard_normal((height, width, 3))
    return Image.fromarray(np.uint8(np.clip(127 + 80 * (base + grain), 0, 255)))


def draw(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((1, height // 8, width // 8, 16)).astype(np.float32)


def their_edit(pipeline, monkeypatch, images, prompt, size, noise, sizes=None, **options) -> np.ndarray:
    from diffusers.pipelines.joyimage import image_processor

    monkeypatch.setitem(image_processor.BUCKETS, 1024, sizes or [size])
    plus = type(pipeline).__name__ == "JoyImageEditPlusPipeline"
    latents = torch.from_numpy(np.moveaxis(noise, -1, 1)[:, :, None])
    given = {"images": images or None} if plus else {"image": images[0] if images else None}
    options = {"num_inference_steps": 4, **options}
    result = pipeline(**given, prompt=prompt, latents=latents if plus else latents[:, None], **options)
    return np.asarray(result.images[0])


def our_edit(pipeline, images, prompt, size, noise, **options) -> np.ndarray:
    options = {"steps": 4, **options}
    result = joyjax.edit(
        pipeline, images, prompt, height=size[0], width=size[1], exact_size=True, noise=noise, **options
    )
    assert result.image.size == (size[1], size[0])
    return np.asarray(result.image)


def assert_same(ours: np.ndarray, theirs: np.ndarray) -> None:
    off = np.abs(ours.astype(int) - theirs.astype(int))
    print(f"largest difference {off.max()} of 255, {np.mean(off > 0):.2%} of values differ")
    assert theirs.std() > 10  # a picture, not a flat field that anything would match
    assert off.max() <= LEVELS
    assert np.mean(off > 0) <= SHARE


@pytest.mark.parametrize(
    ("size", "prompt", "options"),
    [
        ((64, 96), "make the sky red", {}),
        ((96, 64), "remove the dog", {"seed": 3}),
        ((64, 64), "", {}),
        ((64, 160), 12 * LONG, {}),
        ((96, 64), "ein Hügel in Öl 画 🎨\n\n  and more", {"negative_prompt": "blurry, low quality"}),
        ((64, 96), "make the sky red", {"guidance_scale": 1.0}),
        ((64, 96), "make the sky red", {"guidance_scale": 7.5, "seed": 5, "steps": 7}),
    ],
    ids=["landscape", "portrait", "empty", "long", "negative", "unguided", "seven-steps"],
)
def test_edit(reference, loaded, monkeypatch, size, prompt, options):
    image, noise = photo(70, 101, seed=options.get("seed", 0)), draw(*size, seed=options.pop("seed", 0))
    steps = options.pop("steps", 4)
    theirs = their_edit(reference, monkeypatch, [image], prompt, size, noise, num_inference_steps=steps, **options)
    assert_same(our_edit(loaded, [image], prompt, size, noise, steps=steps, **options), theirs)


def test_text_to_image(reference, loaded, monkeypatch):
    size, noise = (64, 96), draw(64, 96)
    theirs = their_edit(reference, monkeypatch, [], "a blue tree", size, noise, height=64, width=96)
    assert_same(our_edit(loaded, None, "a blue tree", size, noise), theirs)


def test_the_end_of_a_long_prompt_with_a_picture_is_kept(reference, loaded, monkeypatch):
    """As above 4096 hidden states, where the picture's are lost first."""
    monkeypatch.setattr(joyimage, "LONGEST_PROMPT", 24)
    size, image, noise = (64, 96), photo(70, 101), draw(64, 96)
    theirs = their_edit(reference, monkeypatch, [image], LONG, size, noise, max_sequence_length=24)
    assert_same(our_edit(loaded, [image], LONG, size, noise), theirs)


def test_the_longest_prompt_alone(reference, loaded, monkeypatch):
    """As at 2048 tokens, the most that the reference reads; beyond, it cuts the turn's end and joyjax refuses."""
    longest = len(joyimage.prompt_tokens(loaded.files.tokenizer, LONG, []))
    monkeypatch.setattr(joyimage, "LONGEST_TEXT", longest)
    monkeypatch.setattr(reference, "text_token_max_length", longest - joyimage.DROPPED)
    size, noise = (64, 96), draw(64, 96)
    theirs = their_edit(reference, monkeypatch, [], LONG, size, noise, height=64, width=96)
    assert_same(our_edit(loaded, None, LONG, size, noise), theirs)
    monkeypatch.setattr(joyimage, "LONGEST_TEXT", longest - 1)
    with pytest.raises(joyjax.RequestError, match="prompt is 1 tokens too long"):
        our_edit(loaded, None, LONG, size, noise)


def test_small_bucket_is_enlarged_for_the_text_encoder(monkeypatch, tmp_path):
    """A picture below the processor's smallest is resized for Qwen3-VL, bicubically, and not for the VAE."""
    import random_checkpoint

    pipeline = random_checkpoint.make_pipeline("tiny", shortest_edge=96 * 128)
    ours = joyjax.load(random_checkpoint.save(pipeline, tmp_path / "m"), dtype="float32")
    image, noise = photo(70, 101), draw(64, 96)
    theirs = their_edit(pipeline, monkeypatch, [image], "make it red", (64, 96), noise)
    assert_same(our_edit(ours, [image], "make it red", (64, 96), noise), theirs)


@pytest.mark.parametrize("rope_type", ["mrope"])
def test_rope_type(rope_type, monkeypatch, tmp_path):
    import random_checkpoint

    pipeline = random_checkpoint.make_pipeline("tiny", rope_type=rope_type, seed=1)
    ours = joyjax.load(random_checkpoint.save(pipeline, tmp_path / "m"), dtype="float32")
    image, noise = photo(70, 101), draw(64, 96)
    theirs = their_edit(pipeline, monkeypatch, [image], "make it red", (64, 96), noise)
    assert_same(our_edit(ours, [image], "make it red", (64, 96), noise), theirs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sharded_and_bfloat16_files(dtype, monkeypatch, tmp_path):
    """Weights stored in bfloat16, or in several files, computed in float32 on both sides."""
    import random_checkpoint

    pipeline = random_checkpoint.make_pipeline("tiny", seed=2)
    for part in (pipeline.transformer, pipeline.text_encoder, pipeline.vae):
        for p in part.parameters():
            p.data = p.data.to(getattr(torch, dtype)).float()
    folder = random_checkpoint.save(pipeline, tmp_path / "m", dtype=getattr(torch, dtype), shard_size="200KB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 2
    image, noise = photo(70, 101), draw(64, 96)
    theirs = their_edit(pipeline, monkeypatch, [image], "make it red", (64, 96), noise)
    assert_same(our_edit(joyjax.load(folder, dtype="float32"), [image], "make it red", (64, 96), noise), theirs)


def test_buckets_decide_the_size(reference, loaded, monkeypatch):
    """No size given: the picture's bucket of the smallest published table, scaled and cropped as the reference does."""
    image = photo(150, 211)
    result = joyjax.edit(loaded, image, "make it red", steps=2, base_size=256)
    height, width = result.image.height, result.image.width
    noise = draw(height, width)
    result = joyjax.edit(loaded, image, "make it red", steps=2, base_size=256, noise=noise)
    sizes = list(buckets(256))
    theirs = their_edit(reference, monkeypatch, [image], "make it red", None, noise, sizes=sizes, num_inference_steps=2)
    assert_same(np.asarray(result.image), theirs)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_edit_plus(count, monkeypatch, tmp_path):
    """References of unlike shapes, each at its own bucket; the last one gives the size."""
    import random_checkpoint

    pipeline = random_checkpoint.make_pipeline("tiny", plus=True, seed=4)
    ours = joyjax.load(random_checkpoint.save(pipeline, tmp_path / "m"), dtype="float32")
    assert ours.family.name == "JoyImage-Edit-Plus"
    assert json.loads((tmp_path / "m" / "model_index.json").read_text())["_class_name"] == ours.family.class_name
    images = [photo(120, 90, seed=1), photo(100, 180, seed=2)][:count]
    first = joyjax.edit(ours, images, "put the dog on the table", steps=1, base_size=256)
    noise = draw(first.image.height, first.image.width)
    result = joyjax.edit(ours, images, "put the dog on the table", steps=4, base_size=256, noise=noise)
    size = {"height": 256, "width": 256} if count == 0 else {}
    theirs = their_edit(
        pipeline, monkeypatch, images, "put the dog on the table", None, noise, sizes=list(buckets(256)), **size
    )
    assert_same(np.asarray(result.image), theirs)
