"""The training stream: chunks of encoded pictures, and batches of edits drawn from them.

Encoding dominates the cost, so each picture of a chunk serves several edits: from a scene to the results of a few
edits, and back where an instruction can describe that. A chunk is replaced after a few hundred steps. Chunks and
batches are functions of their number and the seed, so a killed run needs nothing else to continue.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, UInt8

from joyjax.families.family import Parts
from joyjax.families.joyimage_prompt import DROPPED, prompt_tokens
from joyjax.layers.weights import Weights
from joyjax.models.autoencoder.stages import encode_images
from joyjax.processors.text import control_token, image_token_indices, multimodal_positions, pad_rows
from joyjax.shapes.draw import render
from joyjax.shapes.edits import KINDS, Pair, held_out, propose, reverse
from joyjax.shapes.scene import Scene, random_scene
from joyjax.shapes.wording import sentence


@dataclasses.dataclass(frozen=True)
class StreamConfig:
    """How batches are drawn. `weights` are the relative frequencies of kinds of edits, 1 by default."""

    batch: int = 32
    steps_per_chunk: int = 200
    scenes: int = 500
    edits: int = 4  # of each scene
    dropped: float = 0.05  # share of prompts left empty, for guidance
    text: int = 80  # tokens of a padded prompt
    kept: int = 40  # of them, after the template's prefix
    weights: tuple[tuple[str, float], ...] = (
        ("background", 0.8),
        ("remove", 0.7),
        ("move", 1.3),
        ("resize", 1.8),
        ("swap", 3.5),
        ("shape", 1.5),
    )


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "ids",
        "positions",
        "image_token_index",
        "lengths",
        "pictures",
        "results",
        "sources",
        "targets",
        "dropped",
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Batch:
    """Edits, one per row: the prompt's tokens, pixels of source and target, latent tokens of both."""

    ids: Int32[Array, "B L"]
    positions: Int32[Array, "B L 3"]
    image_token_index: Int32[Array, "B L"]
    lengths: Int32[Array, " B"]  # of the prompt after the template's prefix
    pictures: UInt8[Array, "B h w 3"]
    results: UInt8[Array, "B h w 3"]
    sources: Float32[Array, "B T P"]
    targets: Float32[Array, "B T P"]
    dropped: Float32[Array, " B"]  # 1 where the prompt was left empty


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Pictures with their latent tokens, and by kind of edit the pairs (source index, target index, pair)."""

    pictures: UInt8[np.ndarray, "p h w 3"]
    tokens: Float32[np.ndarray, "p T P"]
    pairs: Mapping[str, list[tuple[int, int, Pair]]]


def make_chunk(config: StreamConfig, vae: Weights, patch: tuple[int, int], seed: int, number: int) -> Chunk:
    """Draw and encode one chunk, without held-out combinations."""
    rng = np.random.default_rng((seed, 0, number))
    weights = np.array([dict(config.weights).get(kind, 1.0) for kind in KINDS])
    scenes: list[Scene] = []
    found: dict[str, list[tuple[int, int, Pair]]] = {kind: [] for kind in KINDS}
    for _ in range(config.scenes):
        scene, source = random_scene(rng), len(scenes)
        scenes.append(scene)
        for kind in rng.choice(KINDS, config.edits, replace=False, p=weights / weights.sum()):
            drawn = (propose(rng, scene, str(kind)) for _ in range(10))
            pair = next((pair for pair in drawn if pair is not None and not held_out(pair)), None)
            if pair is None:
                continue
            found[pair.edit.kind].append((source, len(scenes), pair))
            back = reverse(pair)
            if back is not None and not held_out(back):
                found[back.edit.kind].append((len(scenes), source, back))
            scenes.append(pair.target)
    pictures = np.stack([render(scene) for scene in scenes])
    return Chunk(pictures, encode(vae, pictures, patch), found)


def encode(
    vae: Weights, pictures: UInt8[np.ndarray, "p h w 3"], patch: tuple[int, int]
) -> Float32[np.ndarray, "p T P"]:
    """Return the latent tokens of many pictures, a few at a time."""
    size, count = 50, len(pictures)
    padded = np.pad(pictures, ((0, -count % size), (0, 0), (0, 0), (0, 0)))
    parts = [np.asarray(encode_images(vae, part, patch=patch)) for part in np.split(padded, len(padded) // size)]
    return np.concatenate(parts)[:count]


def make_stream(config: StreamConfig, parts: Parts, vae: Weights, seed: int) -> Callable[[int], Batch]:
    """Return the function from a step's number to its batch."""
    patch = parts.configs["transformer"].patch
    weights = np.array([dict(config.weights).get(kind, 1.0) for kind in KINDS])
    chunk = functools.lru_cache(1)(lambda number: make_chunk(config, vae, patch, seed, number))

    def batch(step: int) -> Batch:
        pool = chunk(step // config.steps_per_chunk)
        rng = np.random.default_rng((seed, 1, step))
        found = weights * np.array([len(pool.pairs[kind]) > 0 for kind in KINDS])  # a small chunk may lack a kind
        kinds = rng.choice(KINDS, config.batch, p=found / found.sum())
        rows = [pool.pairs[kind][rng.integers(len(pool.pairs[kind]))] for kind in kinds]
        dropped = rng.random(config.batch) < config.dropped
        prompts = ["" if drop else sentence(rng, pair) for drop, (_, _, pair) in zip(dropped, rows, strict=True)]
        sources, targets = (np.array(column) for column in list(zip(*rows, strict=True))[:2])
        ids, positions, image_token_index, lengths = tokenize(parts, prompts, pool.pictures.shape[1:3], config.text)
        return Batch(
            ids=jnp.asarray(ids),
            positions=jnp.asarray(positions),
            image_token_index=jnp.asarray(image_token_index),
            lengths=jnp.asarray(lengths - DROPPED),
            pictures=jnp.asarray(pool.pictures[sources]),
            results=jnp.asarray(pool.pictures[targets]),
            sources=jnp.asarray(pool.tokens[sources]),
            targets=jnp.asarray(pool.tokens[targets]),
            dropped=jnp.asarray(dropped, jnp.float32),
        )

    return batch


def tokenize(
    parts: Parts, prompts: list[str], size: tuple[int, ...], length: int
) -> tuple[Int32[np.ndarray, "B L"], Int32[np.ndarray, "B L 3"], Int32[np.ndarray, "B L"], Int32[np.ndarray, " B"]]:
    """Return ids, positions, image token indices and lengths of prompts with one picture of `size` each."""
    side = parts.processor.patch_size * parts.processor.merge_size
    grid, image = (size[0] // side, size[1] // side), parts.configs["text_encoder"].image_token_id
    count = grid[0] * grid[1]
    rows = [prompt_tokens(parts.tokenizer, prompt, [count]) for prompt in prompts]
    ids, lengths = pad_rows(rows, control_token(parts.tokenizer, "<|endoftext|>"), length)
    positions, image_token_index = np.zeros((*ids.shape, 3), np.int32), np.full(ids.shape, -1, np.int32)
    for n, row in enumerate(rows):
        positions[n, : len(row)] = multimodal_positions(row, image, [grid])
        image_token_index[n, : len(row)] = image_token_indices(row, image, [grid], count, first=n)
    return ids, positions, image_token_index, lengths
