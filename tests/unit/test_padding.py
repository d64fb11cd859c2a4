"""Padding to sizes that many requests share: it changes no result, and few programs are ever compiled."""

import jax
import numpy as np
import pytest
from compilations import counting
from meshes import CONFIG, make_weights
from PIL import Image

import joyjax
from joyjax.families.joyimage_buckets import buckets
from joyjax.families.joyimage_stages import item_positions
from joyjax.layers.condition import Condition

pytestmark = pytest.mark.jax

WORDS = "make the red circle a little larger and the blue square behind it much darker than before please now"


def token_counts(base_size: int) -> list[tuple[int, int]]:
    """Return one size of the table, in tokens, for each of its numbers of tokens."""
    sizes = {}
    for height, width in buckets(base_size):
        sizes.setdefault((height // 16) * (width // 16), (height // 16, width // 16))
    return list(sizes.values())


@pytest.fixture(scope="module")
def demo():
    return joyjax.load(dtype="float32")


# The nightly run takes every size of a table, the default one every fourth.
EVERY = pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.nightly)])


@EVERY
def test_every_number_of_tokens_of_the_table_gives_the_same_padded(every):
    """The transformer, one pass: 18 sizes, each with a reference as large and a shorter text."""
    network, weights = jax.jit(lambda weights, *inputs: weights.module()(*inputs)), make_weights()
    rng = np.random.default_rng(0)
    sizes = token_counts(256)
    most, room = max(rows * columns for rows, columns in sizes), 64
    assert len(sizes) == 18
    sizes = sizes[::every]

    def draw(*shape):
        return rng.standard_normal(shape, np.float32)

    def pad(x, size):
        return np.pad(x, ((0, 0), (0, size - x.shape[1]), (0, 0)), constant_values=1000)  # never zeros by luck

    worst = 0.0
    for n, (rows, columns) in enumerate(sizes):
        tokens, text = rows * columns, 17 + n
        target, references, txt = draw(1, tokens, 16), draw(1, tokens, 16), draw(1, text, CONFIG.text_dim)
        places = [item_positions(item, rows, columns)[None] for item in (0, 1)]
        count = np.array([tokens], np.int32)
        alone = txt, np.array([text], np.int32), references, np.concatenate(places, axis=1)
        whole = np.concatenate([pad(place, most) for place in places], axis=1)
        padded = pad(txt, room), np.array([text], np.int32), pad(references, most), whole, count, count
        ours, theirs = (
            network(weights, *jax.device_put((latents, np.array([700], np.float32))), condition)
            for latents, condition in (
                (pad(target, most), Condition(*jax.device_put(padded))),
                (target, Condition(*jax.device_put(alone))),
            )
        )
        off, whole = (float(np.linalg.norm(x)) for x in (ours[:, :tokens] - theirs, theirs))
        worst = max(worst, off / whole)
    print(f"largest relative difference {worst:.1e}")
    assert worst < 1e-6  # in the root mean square
    assert network._cache_size() == len(sizes) + 1  # all padded ones are one program


@pytest.mark.filterwarnings("ignore::joyjax.AdviceWarning")
@EVERY
def test_all_sizes_and_many_prompts_run_on_a_handful_of_programs(demo, every):
    """49 buckets, each as a picture of another size, with prompts of 20 lengths."""
    jax.clear_caches()
    sizes = buckets(256)[::every]
    lengths, seen = set(), set()
    with counting() as counts:
        for n, (height, width) in enumerate(sizes):
            words = (WORDS.split() * 12)[: 1 + 5 * (n % 20)]
            lengths.add(len(words))
            picture = Image.new("RGB", (width + n, height + n), (n, 255 - n, 99))
            result = joyjax.edit(
                demo, picture, " ".join(words), steps=1, height=height, width=width, base_size=256, guidance_scale=2.0
            )
            seen.add(result.image.size)
    print(dict(counts))
    assert (len(seen), len(lengths)) == {1: (49, 20), 4: (13, 13)}[every]
    stages = {"encode_prompt": 2, "encode_images": 2, "predict": 2, "advance": 1, "decode_latents": 2}
    assert {name: counts[name] for name in stages} == stages
    assert counts.total() <= 12  # and what puts arrays together, of no account
