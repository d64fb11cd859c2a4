"""The transformer on meshes of simulated devices: the same velocity as on one, whatever does not divide."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from meshes import CONFIG, MESHES, draw, make_condition, make_weights, mesh_of, name_of
from whole_step import denoise_step

from joyjax.errors import MeshError
from joyjax.kernels.choice import Kernels
from joyjax.layers.condition import Condition
from joyjax.layers.weights import Weights
from joyjax.sampling.rows import pad_batch
from joyjax.sharding.attention import sequence_mesh, share_out

pytestmark = pytest.mark.jax


def step(weights: Weights, latents: jax.Array, condition: Condition) -> np.ndarray:
    numbers = (np.float32(number) for number in (0.8, 0.5, 800, 3))
    return np.asarray(denoise_step(weights, jnp.copy(latents), condition, *numbers, channels=CONFIG.in_channels))


# (edits, passes, (text, target, reference tokens), ragged): odd lengths, no reference, fewer tokens than devices.
CASES = {
    "edit": (1, 2, (11, 35, 35), False),
    "even": (2, 2, (16, 48, 24), False),
    "plus": (3, 2, (13, 30, 50), True),
    "text": (1, 1, (5, 6, 0), False),
}


@pytest.fixture(scope="module")
def alone():
    """Every case, and its step on one device."""
    found = {}
    for name, (edits, passes, tokens, ragged) in CASES.items():
        latents, condition = draw(4, edits, tokens[1], 16), make_condition(edits, passes, tokens, ragged=ragged)
        found[name] = latents, condition, step(make_weights(), latents, condition)
    return found


ALL_CASES = {"cfg": 2, "sequence": 2, "tensor": 2}
DAILY = ({"tensor": 2}, {"sequence": 3}, {"sequence": 8}, {"ulysses": 2, "ring": 3}, ALL_CASES)  # the others nightly
PAIRS = [(sizes, "plus") for sizes in MESHES]
PAIRS += [(sizes, case) for sizes in MESHES if len(sizes) > 2 or "ring" in sizes for case in ("edit", "even", "text")]
STEPS = [
    pytest.param(
        sizes,
        case,
        id=f"{name_of(sizes)} {case}",
        marks=() if sizes in DAILY and (case == "plus" or sizes == ALL_CASES) else pytest.mark.nightly,
    )
    for sizes, case in PAIRS
]


@pytest.mark.parametrize(("sizes", "case"), STEPS)
def test_a_step_is_the_same_on_every_mesh(sizes, case, alone, error):
    latents, condition, expected = alone[case]
    mesh = mesh_of(**sizes)
    with jax.set_mesh(mesh):
        result = step(make_weights(mesh=mesh), latents, condition)
    rows = range(len(latents))
    valid = [condition.target_lengths[n] if condition.target_lengths is not None else latents.shape[1] for n in rows]
    for n in rows:
        assert error(result[n, : valid[n]], expected[n, : valid[n]]) < 2e-5


@pytest.mark.parametrize("sizes", [{}, {"cfg": 2, "sequence": 2, "tensor": 2}], ids=["alone", "on a mesh"])
def test_kernels_change_no_step(sizes, alone, error):
    """A kernel runs on every device's own rows, tokens and heads; outside of them XLA would gather its inputs."""
    latents, condition, expected = alone["plus"]
    mesh = mesh_of(**sizes) if sizes else None
    weights = dataclasses.replace(make_weights(mesh=mesh), kernels=Kernels("triton", "triton", "triton"))
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        result = step(weights, latents, condition)
    for n in range(len(latents)):
        assert error(result[n, : condition.target_lengths[n]], expected[n, : condition.target_lengths[n]]) < 2e-5


@pytest.mark.parametrize(
    ("sizes", "heads", "ring", "ulysses"),
    [
        ({}, 32, 1, 1),
        ({"tensor": 4}, 32, 1, 1),
        ({"sequence": 8}, 32, 1, 8),
        ({"sequence": 8}, 5, 8, 1),
        ({"sequence": 6}, 4, 3, 2),
        ({"sequence": 8, "tensor": 8}, 32, 2, 4),
        ({"ring": 4, "data": 2}, 32, 4, 1),
        ({"ring": 2, "ulysses": 4}, 32, 2, 4),
    ],
)
def test_the_rule_that_shares_a_sequence_out(sizes, heads, ring, ulysses):
    found = share_out(sizes, heads)
    assert (found.ring, found.ulysses, found.devices) == (ring, ulysses, ring * ulysses)


def test_more_of_ulysses_than_heads():
    with pytest.raises(MeshError, match="ulysses=3 does not divide the 4 heads of a device; what fits: 1, 2, 4;"):
        share_out({"ulysses": 3, "tensor": 8}, 32)


@pytest.mark.parametrize(
    ("rows", "passes", "devices", "filled"), [(3, 2, 4, 4), (1, 2, 2, 1), (1, 1, 8, 8), (2, 2, 1, 2)]
)
def test_rows_are_filled_within_each_pass(rows, passes, devices, filled):
    x = jnp.arange(passes * rows).reshape(-1, 1)
    with jax.set_mesh(mesh_of(data=devices)):
        found = np.asarray(pad_batch({"x": x}, passes)["x"]).reshape(passes, -1)
    assert found.shape[1] == filled
    for n in range(passes):
        assert found[n, :rows].tolist() == list(range(n * rows, (n + 1) * rows))
        assert set(found[n, rows:]) <= {(n + 1) * rows - 1}


def test_axes_out_of_order_are_noticed():
    with jax.set_mesh(Mesh(np.asarray(jax.devices()[:4]).reshape(2, 2), ("ulysses", "ring"))):
        with pytest.raises(ValueError, match="not in order"):
            sequence_mesh(4)
