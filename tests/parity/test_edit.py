"""The whole edit against Diffusers' pipelines, live: same checkpoint, picture and noise; strong random weights."""

import json

import numpy as np
import pytest
from pairs import BUCKETS, assert_same, draw, our_edit, photo, their_edit

import joyjax
from joyjax.families import joyimage_buckets, joyimage_prompt
from joyjax.families.joyimage_buckets import buckets

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")

nightly = pytest.mark.nightly  # three edits run daily, besides test_batches.py and test_stages.py

LONG = (
    "please replace the small wooden table on the left by a larger round one made of dark marble, and keep the rest; "
)


@pytest.fixture(autouse=True)
def _posterior_mode(monkeypatch):
    """The reference draws the posterior at random whatever the seed; joyjax takes its mode."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())


@pytest.mark.parametrize(
    ("size", "prompt", "options"),
    [
        pytest.param((64, 96), "make the sky red", {}, marks=nightly, id="landscape"),
        pytest.param((96, 64), "remove the dog", {"seed": 3}, marks=nightly, id="portrait"),
        pytest.param((64, 64), "", {}, marks=nightly, id="empty"),
        pytest.param((64, 160), 12 * LONG, {}, marks=nightly, id="long"),
        pytest.param(
            (96, 64), "ein Hügel in Öl 画 🎨\n\n  and more", {"negative_prompt": "blurry, low quality"}, id="negative"
        ),
        pytest.param((64, 96), "make the sky red", {"guidance_scale": 1.0}, marks=nightly, id="unguided"),
        pytest.param(
            (64, 96),
            "make the sky red",
            {"guidance_scale": 7.5, "seed": 5, "steps": 7},
            marks=nightly,
            id="seven-steps",
        ),
    ],
)
def test_edit(reference, loaded, monkeypatch, size, prompt, options):
    image, noise = photo(70, 101, seed=options.get("seed", 0)), draw(*size, seed=options.pop("seed", 0))
    steps = options.pop("steps", 4)
    theirs = their_edit(reference, monkeypatch, [image], prompt, size, noise, num_inference_steps=steps, **options)
    assert_same(our_edit(loaded, [image], prompt, size, noise, steps=steps, **options), theirs)


@nightly
def test_text_to_image(reference, loaded, monkeypatch):
    size, noise = (64, 96), draw(64, 96)
    theirs = their_edit(reference, monkeypatch, [], "a blue tree", size, noise, height=64, width=96)
    assert_same(our_edit(loaded, None, "a blue tree", size, noise), theirs)


@nightly
def test_the_end_of_a_long_prompt_with_a_picture_is_kept(reference, loaded, monkeypatch):
    """As above 4096 hidden states, where the picture's are lost first."""
    monkeypatch.setattr(joyimage_prompt, "LONGEST_PROMPT", 24)
    size, image, noise = (64, 96), photo(70, 101), draw(64, 96)
    theirs = their_edit(reference, monkeypatch, [image], LONG, size, noise, max_sequence_length=24)
    assert_same(our_edit(loaded, [image], LONG, size, noise), theirs)


@nightly
def test_the_longest_prompt_alone(reference, loaded, monkeypatch):
    """As at 2048 tokens, the most that the reference reads; beyond, it cuts the turn's end and joyjax refuses."""
    longest = len(joyimage_prompt.prompt_tokens(loaded.parts.tokenizer, LONG, []))
    monkeypatch.setattr(joyimage_prompt, "LONGEST_TEXT", longest)
    monkeypatch.setattr(reference, "text_token_max_length", longest - joyimage_prompt.DROPPED)
    size, noise = (64, 96), draw(64, 96)
    theirs = their_edit(reference, monkeypatch, [], LONG, size, noise, height=64, width=96)
    assert_same(our_edit(loaded, None, LONG, size, noise), theirs)
    monkeypatch.setattr(joyimage_prompt, "LONGEST_TEXT", longest - 1)
    with pytest.raises(joyjax.RequestError, match="prompt is 1 tokens too long"):
        our_edit(loaded, None, LONG, size, noise)


@nightly
def test_small_bucket_is_enlarged_for_the_text_encoder(monkeypatch, tmp_path):
    """A picture below the processor's smallest is resized for Qwen3-VL, bicubically, and not for the VAE."""
    import random_checkpoint

    pipeline = random_checkpoint.make_pipeline("tiny", shortest_edge=96 * 128)
    ours = joyjax.load(random_checkpoint.save(pipeline, tmp_path / "m"), dtype="float32")
    image, noise = photo(70, 101), draw(64, 96)
    theirs = their_edit(pipeline, monkeypatch, [image], "make it red", (64, 96), noise)
    assert_same(our_edit(ours, [image], "make it red", (64, 96), noise), theirs)


@nightly
@pytest.mark.parametrize("rope_type", ["mrope"])
def test_rope_type(rope_type, monkeypatch, tmp_path):
    import random_checkpoint

    pipeline = random_checkpoint.make_pipeline("tiny", rope_type=rope_type, seed=1)
    ours = joyjax.load(random_checkpoint.save(pipeline, tmp_path / "m"), dtype="float32")
    image, noise = photo(70, 101), draw(64, 96)
    theirs = their_edit(pipeline, monkeypatch, [image], "make it red", (64, 96), noise)
    assert_same(our_edit(ours, [image], "make it red", (64, 96), noise), theirs)


@nightly
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


@pytest.mark.parametrize("count", [pytest.param(0, marks=nightly), pytest.param(1, marks=nightly), 2])
def test_edit_plus(count, monkeypatch, tmp_path):
    """References of unlike shapes, each at its own bucket; the last one gives the size."""
    import random_checkpoint

    monkeypatch.setattr(joyimage_buckets, "buckets", lambda base_size: BUCKETS)
    pipeline = random_checkpoint.make_pipeline("tiny", plus=True, seed=4)
    ours = joyjax.load(random_checkpoint.save(pipeline, tmp_path / "m"), dtype="float32")
    assert ours.family.name == "JoyImage-Edit-Plus"
    assert json.loads((tmp_path / "m" / "model_index.json").read_text())["_class_name"] == ours.family.class_names[0]
    images = [photo(120, 90, seed=1), photo(100, 180, seed=2)][:count]
    first = joyjax.edit(ours, images or None, "put the dog on the table", steps=1, base_size=256)
    noise = draw(first.image.height, first.image.width)
    result = joyjax.edit(ours, images or None, "put the dog on the table", steps=4, base_size=256, noise=noise)
    size = {"height": first.image.height, "width": first.image.width} if count == 0 else {}
    theirs = their_edit(
        pipeline, monkeypatch, images, "put the dog on the table", None, noise, sizes=list(BUCKETS), **size
    )
    assert_same(np.asarray(result.image), theirs)
