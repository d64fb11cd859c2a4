"""Qwen-Image's transformer on meshes of simulated devices: the same step as on one, whatever does not divide."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import count_collectives, gathered_shapes
from conftest import relative_error
from meshes import MESHES, draw, make_condition, make_weights, mesh_of, name_of
from whole_step import cached_step, denoise_step

from joyjax.convert.qwen_image import TRANSFORMER
from joyjax.kernels.choice import PLAIN, Kernels
from joyjax.layers.condition import Condition
from joyjax.layers.weights import Weights
from joyjax.models.qwen_image import QwenImageConfig
from joyjax.sampling.step_cache import empty_cache

pytestmark = pytest.mark.jax

CONFIG = QwenImageConfig(
    patch_size=2,
    in_channels=16,
    out_channels=4,
    num_layers=2,
    attention_head_dim=16,
    num_attention_heads=4,
    joint_attention_dim=24,
    axes_dims_rope=(4, 6, 6),
)
ZERO = dataclasses.replace(CONFIG, zero_cond_t=True)
NUMBERS = tuple(np.float32(number) for number in (0.8, 0.5, 0.8, 3))  # two levels, the time, the scale


def weights_on(mesh=None, config: QwenImageConfig = CONFIG) -> Weights:
    return make_weights(config, mesh, TRANSFORMER)


def condition_of(edits: int, passes: int, tokens: tuple[int, int, int], *, ragged: bool) -> Condition:
    condition = make_condition(edits, passes, tokens, ragged=ragged)
    starts = jnp.asarray([5 + n % edits for n in range(edits * passes)], jnp.int32)
    return dataclasses.replace(condition, positions=condition.positions - 10, txt_start=starts)


def step(weights: Weights, latents: jax.Array, condition: Condition) -> np.ndarray:
    return np.asarray(denoise_step(weights, jnp.copy(latents), condition, *NUMBERS, channels=16))


# (edits, passes, (text, target, reference tokens), ragged): odd lengths, no reference, fewer tokens than devices.
CASES = {
    "words": (2, 2, (11, 35, 0), True),
    "edit": (3, 2, (13, 30, 50), True),
    "even": (2, 2, (16, 48, 24), False),
    "few": (1, 1, (5, 6, 0), False),
}


@pytest.fixture(scope="module")
def alone():
    """Every case, and its step on one device."""
    found = {}
    for name, (edits, passes, tokens, ragged) in CASES.items():
        latents, condition = draw(4, edits, tokens[1], 16), condition_of(edits, passes, tokens, ragged=ragged)
        found[name] = latents, condition, step(weights_on(), latents, condition)
    return found


ALL_AXES = {"cfg": 2, "sequence": 2, "tensor": 2}
DAILY = ({"tensor": 4}, {"sequence": 3}, {"ulysses": 2, "ring": 3}, ALL_AXES)  # the others nightly
PAIRS = [(sizes, "words") for sizes in MESHES]
PAIRS += [(sizes, case) for sizes in MESHES if len(sizes) > 2 or "ring" in sizes for case in ("edit", "even", "few")]
STEPS = [
    pytest.param(
        sizes,
        case,
        id=f"{name_of(sizes)} {case}",
        marks=() if sizes in DAILY and case == "words" else pytest.mark.nightly,
    )
    for sizes, case in PAIRS
]


@pytest.mark.parametrize(("sizes", "case"), STEPS)
def test_a_step_is_the_same_on_every_mesh(sizes, case, alone, error):
    latents, condition, expected = alone[case]
    mesh = mesh_of(**sizes)
    with jax.set_mesh(mesh):
        result = step(weights_on(mesh), latents, condition)
    assert error_of_valid(result, expected, condition, error) < 2e-5


def error_of_valid(result, expected, condition, error) -> float:
    """Return the largest error of a row's valid tokens."""
    valid = [result.shape[1]] * len(result) if condition.target_lengths is None else condition.target_lengths
    return max(error(result[n, : valid[n]], expected[n, : valid[n]]) for n in range(len(result)))


SELECTING = Kernels(layer_norm_scale_shift_select01="triton", residual_gate_layer_norm_scale_shift_select01="triton")


@pytest.fixture(scope="module")
def at_time_0(alone):
    """The step of an edit whose references have time 0, on one device; the rows are of unlike lengths."""
    latents, condition, same_time = alone["edit"]
    expected = step(weights_on(config=ZERO), latents, condition)
    assert relative_error(expected, same_time) > 0.01
    return latents, condition, expected


@pytest.mark.parametrize(
    ("sizes", "kernels"),
    [
        pytest.param(ALL_AXES, SELECTING, id="by kernels"),
        *(pytest.param(sizes, PLAIN, id=name_of(sizes), marks=pytest.mark.nightly) for sizes in MESHES),
    ],
)
def test_references_at_time_0_on_every_mesh(sizes, kernels, at_time_0, error):
    """Where a device's target ends and its references begin differs by row and device."""
    latents, condition, expected = at_time_0
    mesh = mesh_of(**sizes)
    with jax.set_mesh(mesh):
        weights = dataclasses.replace(weights_on(mesh, ZERO), kernels=kernels)
        result = step(weights, latents, condition)
    assert error_of_valid(result, expected, condition, error) < 2e-5


@pytest.mark.parametrize(
    ("sizes", "zero"),
    [
        pytest.param(None, False, id="alone"),
        pytest.param(ALL_AXES, False, id="on a mesh"),
        pytest.param(None, True, id="references at 0", marks=pytest.mark.nightly),
    ],
)
def test_a_step_with_a_cache_that_runs_all_blocks_is_the_exact_one(sizes, zero, alone, at_time_0, error):
    latents, condition, expected = at_time_0 if zero else alone["even"]

    def cached(mesh=None) -> jax.Array:
        weights = weights_on(mesh, ZERO if zero else CONFIG)
        cache = empty_cache(weights, latents, condition, kind="taylor")
        how = np.float32(0.1), np.bool_(False)
        return cached_step(weights, jnp.copy(latents), cache, condition, *NUMBERS, *how, channels=16)[0]

    if sizes is None:
        assert error_of_valid(cached(), expected, condition, error) < 2e-5
        return
    mesh = mesh_of(**sizes)
    with jax.set_mesh(mesh):
        assert error(cached(mesh), expected) < 2e-5


def compiled_step(
    layers: int, sizes: dict[str, int], tokens: tuple[int, int, int], config: QwenImageConfig = CONFIG
) -> str:
    mesh = mesh_of(**sizes)
    with jax.set_mesh(mesh):
        weights = weights_on(mesh, dataclasses.replace(config, num_layers=layers))
        condition = condition_of(2, 2, tokens, ragged=False)
        flat, tree = jax.tree.flatten((weights, draw(4, 2, tokens[1], 16), condition, *NUMBERS))
        program = jax.jit(lambda *flat: denoise_step(*tree.unflatten(flat), channels=16))
        return program.lower(*flat).compile().as_text()


COLLECTIVES = [
    # mesh, tokens, of a block, of the rest of a step with the last block
    ({"tensor": 4}, (16, 48, 24), {"all-reduce": 4}, {"all-reduce": 3, "all-gather": 2}),
    ({"ulysses": 4}, (16, 48, 24), {"all-to-all": 4}, {"all-to-all": 4, "all-gather": 1}),
    ({"ulysses": 4}, (13, 35, 35), {"all-to-all": 4}, {"all-to-all": 4, "all-gather": 1}),
    ({"ulysses": 4}, (13, 35, 0), {"all-to-all": 4}, {"all-to-all": 4, "all-gather": 1}),
    ({"ring": 4}, (16, 48, 24), {"collective-permute": 6}, {"collective-permute": 6, "all-gather": 1}),
    ({"cfg": 2}, (16, 48, 24), {}, {"all-reduce": 1}),
    ({"cfg": 2, "tensor": 2}, (16, 48, 24), {"all-reduce": 4}, {"all-reduce": 4, "all-gather": 2}),
]


@pytest.mark.parametrize(("sizes", "tokens", "of_block", "of_rest"), COLLECTIVES)
def test_collectives(sizes, tokens, of_block, of_rest):
    """As in JoyImage: one all-reduce for each stream's attention and MLP, one exchange each way for attention.

    Besides, tensor parallelism sums one row of the time and gathers the modulations, those of the first block and those
    of all others together; guidance sums both passes; what a sequence's devices have found is gathered at the end.
    """
    programs = {layers: compiled_step(layers, sizes, tokens) for layers in (2, 3)}
    two, three = (count_collectives(program) for program in programs.values())
    assert dict(three - two) == of_block
    assert dict(two - three) == {}
    rest = two.copy()
    rest.subtract(of_block)
    assert dict(+rest) == of_rest
    for shape in gathered_shapes(programs[3]):
        assert shape.startswith(("f32[2,48,", "f32[2,36,")) or ",6,64]" in shape, shape  # latents, modulations


@pytest.mark.nightly
@pytest.mark.parametrize("sizes", [{"tensor": 4}, {"ulysses": 4}, {"cfg": 2, "tensor": 2}], ids=name_of)
def test_references_at_time_0_exchange_nothing_more(sizes):
    """The second modulation goes with the first, and which one a token has is known on each device."""
    own, plain = (count_collectives(compiled_step(2, sizes, (13, 35, 35), config)) for config in (ZERO, CONFIG))
    assert own == plain
