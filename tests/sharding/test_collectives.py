"""What a compiled step makes devices say to each other: counted, by block and in all."""

import collections
import dataclasses

import jax
import numpy as np
import pytest
from collectives import count_collectives, gathered_shapes
from meshes import CONFIG, draw, make_condition, make_weights, mesh_of

from joyjax.sampling.steps import denoise_step


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
