"""What a compiled step makes devices say to each other: counted, by block and in all."""

import collections
import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import count_collectives, gathered_shapes
from meshes import CONFIG, draw, make_condition, make_weights, mesh_of
from whole_step import denoise_step

from joyjax.convert.qwen3_vl import TEXT_ENCODER
from joyjax.convert.wan_vae import VAE
from joyjax.layers.decoder import TextInputs
from joyjax.layers.weights import leaves
from joyjax.models.autoencoder.wan import WanVAEConfig
from joyjax.models.qwen3_vl_vision import VisionInputs, patch_positions
from joyjax.reading import read_json
from joyjax.sharding.place import parameter_sharding

pytestmark = pytest.mark.jax


def compiled_step(layers: int, sizes: dict[str, int], tokens: tuple[int, int, int]) -> str:
    config, mesh = dataclasses.replace(CONFIG, num_layers=layers), mesh_of(**sizes)
    with jax.set_mesh(mesh):
        weights = make_weights(config, mesh)
        numbers = (np.float32(number) for number in (0.8, 0.5, 800, 3))
        condition = make_condition(2, 2, tokens, ragged=False)
        flat, tree = jax.tree.flatten((weights, draw(4, 2, tokens[1], 16), condition, *numbers))
        program = jax.jit(lambda *flat: denoise_step(*tree.unflatten(flat), channels=CONFIG.in_channels))
        return program.lower(*flat).compile().as_text()


CASES = [
    # mesh, tokens, of a block, of the rest of a step with the last block
    ({"tensor": 4}, (16, 48, 24), {"all-reduce": 4}, {"all-reduce": 5}),
    ({"ulysses": 4}, (16, 48, 24), {"all-to-all": 4}, {"all-to-all": 4, "all-gather": 1}),
    ({"ulysses": 4}, (13, 35, 35), {"all-to-all": 4}, {"all-to-all": 4, "all-gather": 1}),
    ({"ring": 4}, (16, 48, 24), {"collective-permute": 6}, {"collective-permute": 6, "all-gather": 1}),
    (
        {"ring": 2, "ulysses": 2},
        (16, 48, 24),
        {"all-to-all": 4, "collective-permute": 2},
        {"all-to-all": 4, "collective-permute": 2, "all-gather": 1},
    ),
    ({"cfg": 2}, (16, 48, 24), {}, {"all-reduce": 1}),
    ({"cfg": 2, "tensor": 2}, (16, 48, 24), {"all-reduce": 4}, {"all-reduce": 6}),
]


@pytest.mark.parametrize(("sizes", "tokens", "of_block", "of_rest"), CASES)
def test_collectives(sizes, tokens, of_block, of_rest):
    """Tensor: one all-reduce for each stream's attention and MLP. The last block has one stream, so two of them.

    Besides, tensor parallelism sums two rows of small maps, of time and text; guidance sums both passes; and what the
    devices of a sequence have found is gathered at the end of a step. No weights are.
    """
    programs = {layers: compiled_step(layers, sizes, tokens) for layers in (2, 3)}
    two, three = (count_collectives(program) for program in programs.values())
    assert dict(three - two) == of_block
    assert dict(two - collections.Counter(of_block)) == of_rest
    for shape in gathered_shapes(programs[3]):
        assert shape.startswith(("f32[2,48,", "f32[2,36,")), shape  # latents


def compiled_encoder(folder: Path, layers: int, depth: int, sizes: dict[str, int]) -> str:
    """Compile the text encoder, of the tiny checkpoint's widths, for two prompts with one picture."""
    config = TEXT_ENCODER.configure(read_json(folder / "text_encoder" / "config.json"))
    config = dataclasses.replace(
        config,
        text=dataclasses.replace(config.text, num_hidden_layers=layers),
        vision=dataclasses.replace(config.vision, depth=depth),
    )
    mesh, abstract = mesh_of(**sizes), TEXT_ENCODER.abstract(config, jnp.float32)
    weights = abstract.filled(
        {
            path: jax.device_put(
                np.zeros(leaf.shape, leaf.dtype), parameter_sharding(path, leaf.shape, leaf.axes, mesh)
            )
            for path, leaf in leaves(abstract.state).items()
        }
    )
    numbers = {"ids": (2, 48), "positions": (2, 48, 3), "image_token_index": (2, 48)}
    text = TextInputs(**{name: jnp.zeros(shape, jnp.int32) for name, shape in numbers.items()})
    places = [jnp.asarray(place)[None] for place in patch_positions(4, 6, config.vision)]
    patches = jnp.zeros((1, 24, config.vision.patch_values))
    vision = VisionInputs(patches, *places, lengths=jnp.full((1,), 24, jnp.int32))
    flat, tree = jax.tree.flatten((weights, text, vision))

    def encode(*flat: jax.Array) -> jax.Array:
        weights, text, vision = tree.unflatten(flat)
        return weights.module()(text, vision)

    with jax.set_mesh(mesh):
        return jax.jit(encode).lower(*flat).compile().as_text()


@pytest.mark.parity
@pytest.mark.parametrize("devices", [2, 4])
def test_collectives_of_the_text_encoder(devices, checkpoint):
    """Two all-reduces in each layer, also where four devices share two key heads and two heads of the tower."""
    base, layer, block = (
        count_collectives(compiled_encoder(checkpoint, *sizes, {"tensor": devices}))
        for sizes in ((4, 4), (5, 4), (4, 5))
    )
    assert dict(layer - base) == {"all-reduce": 2}
    heads_are_split = devices == 2  # four devices each hold both heads of the tower: its attention needs no sum
    assert dict(block - base) == {"all-reduce": 2 if heads_are_split else 1}
    assert set(base) == {"all-reduce"}


@pytest.mark.parity
@pytest.mark.parametrize("sizes", [{"sequence": 4}, {"ring": 2, "ulysses": 2}], ids=str)
def test_a_split_prompt_gathers_keys_and_values_alone(sizes, checkpoint):
    """Two gathers in each layer of both halves, of key heads, which are few; no weights and no scores."""
    base, layer, block = (compiled_encoder(checkpoint, *layers, sizes) for layers in ((4, 4), (5, 4), (4, 5)))
    counts = [count_collectives(program) for program in (base, layer, block)]
    assert dict(counts[1] - counts[0]) == dict(counts[2] - counts[0]) == {"all-gather": 2}
    assert set(counts[0]) == {"all-gather"}
    assert max(map(numbers_in, gathered_shapes(base))) == 2 * 48 * 2 * 16  # rows, tokens, key heads, channels


def compiled_autoencoder(blocks: int, half: str, rows: int) -> str:
    """Compile one half of a small autoencoder of two levels for four devices; `rows` are those of its input."""
    config = WanVAEConfig(
        base_dim=8,
        z_dim=4,
        dim_mult=(1, 2),
        num_res_blocks=blocks,
        temperal_downsample=(True,),
        latents_mean=(0.0,) * 4,
        latents_std=(1.0,) * 4,
    )
    abstract = VAE.abstract(config, jnp.float32)
    weights = abstract.filled({path: jnp.zeros(leaf.shape) for path, leaf in leaves(abstract.state).items()})
    x = jnp.zeros((1, rows, 24, 3) if half == "encode" else (1, rows, 12, config.z_dim))
    with jax.set_mesh(mesh_of(sequence=4)):
        return jax.jit(lambda x: getattr(weights.module(), half)(x)).lower(x).compile().as_text()


@pytest.mark.parametrize(
    ("half", "blocks", "permutes"),
    # 3×3 convolutions: the first, two in each residual block, the last; borders come from two neighbours each. One that
    # halves the size reaches downwards only. The middle has two residual blocks.
    [
        ("encode", 1, 2 * (1 + 2 + 2 + 4 + 1) + 1),
        ("encode", 2, 2 * (1 + 4 + 4 + 4 + 1) + 1),
        ("decode", 1, 2 * (1 + 4 + 4 + 1 + 4 + 1)),
        ("decode", 2, 2 * (1 + 4 + 6 + 1 + 6 + 1)),
    ],
)
def test_collectives_of_the_autoencoder(half, blocks, permutes):
    """Two borders for each convolution, and the keys and values of the middle's attention once."""
    program = compiled_autoencoder(blocks, half, 64 if half == "encode" else 32)
    assert dict(count_collectives(program)) == {"collective-permute": permutes, "all-gather": 2}
    assert set(map(numbers_in, gathered_shapes(program))) == {32 * 12 * 16}  # pixels of the middle, channels


def numbers_in(shape: str) -> int:
    """Return how many numbers an array such as `f32[2,3]` has."""
    return math.prod(int(size) for size in shape.partition("[")[2].partition("]")[0].split(","))
