"""Meshes of simulated devices, and a small transformer with random weights to run on them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from joyjax.convert.component import Component
from joyjax.convert.joyimage import TRANSFORMER
from joyjax.layers.condition import Condition
from joyjax.layers.weights import Weights, leaves
from joyjax.models.joyimage import JoyImageConfig
from joyjax.sharding.mesh import check_mesh
from joyjax.sharding.place import parameter_sharding

CONFIG = JoyImageConfig(
    hidden_size=64,
    num_attention_heads=4,
    num_layers=2,
    in_channels=4,
    out_channels=4,
    patch_size=(1, 2, 2),
    text_dim=24,
    mlp_width_ratio=4.0,
    rope_dim_list=(4, 6, 6),
    rope_type="rope",
    theta=10000.0,
)


def mesh_of(**sizes: int) -> Mesh:
    """Return a mesh over the first devices, as `joyjax.load` makes it."""
    count = int(np.prod(list(sizes.values())))
    return check_mesh(Mesh(np.asarray(jax.devices()[:count]).reshape(tuple(sizes.values())), tuple(sizes)))


def draw(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def make_weights(config: Any = CONFIG, mesh: Mesh | None = None, component: Component = TRANSFORMER) -> Weights:
    abstract = component.abstract(config, jnp.float32)
    rng, arrays = np.random.default_rng(1), {}
    for path, leaf in leaves(abstract.state).items():
        fan = np.prod(leaf.shape[: -1 if "qkv" not in path else 1]) if "kernel" in path else 4
        array = rng.standard_normal(leaf.shape) * 1.5 / fan**0.5 + ("norm" in path)
        sharding = parameter_sharding(path, leaf.shape, leaf.axes, mesh)
        arrays[path] = jax.device_put(np.asarray(array, leaf.dtype), sharding or jax.devices()[0])
    return abstract.filled(arrays)


def make_condition(edits: int, passes: int, tokens: tuple[int, int, int], *, ragged: bool) -> Condition:
    """Return a condition with these numbers of text, target and reference tokens; `ragged`: lengths differ by edit."""
    rows = edits * passes
    texts, targets, references = tokens
    rng = np.random.default_rng(5)

    def lengths(size: int) -> jax.Array | None:
        return jnp.asarray([size - 3 * (n % edits) for n in range(rows)], jnp.int32) if ragged else None

    return Condition(
        txt=draw(2, rows, texts, CONFIG.text_dim),
        txt_lengths=jnp.asarray([max(1, texts - 2 * n) for n in range(rows)], jnp.int32),
        references=draw(3, rows, references, 16),
        positions=jnp.asarray(rng.integers(0, 20, (rows, targets + references, 3)), jnp.int32),
        target_lengths=lengths(targets),
        reference_lengths=lengths(references),
    )


# Every axis alone, pairs, three and all four; a sequence over more devices than heads; explicit ring and ulysses.
MESHES = (
    {"tensor": 2},
    {"tensor": 4},
    {"cfg": 2},
    {"data": 3},
    {"sequence": 2},
    {"sequence": 3},
    {"sequence": 8},
    {"ring": 4},
    {"ulysses": 4},
    {"ulysses": 2, "ring": 3},
    {"sequence": 2, "tensor": 4},
    {"tensor": 2, "cfg": 2},
    {"data": 2, "cfg": 2},
    {"cfg": 2, "sequence": 4},
    {"data": 2, "sequence": 3},
    {"data": 2, "tensor": 4},
    {"cfg": 2, "sequence": 2, "tensor": 2},
    {"data": 2, "cfg": 2, "sequence": 2, "tensor": 1},
    {"data": 1, "cfg": 2, "sequence": 2, "tensor": 2},
)
# Whole pictures are made on these 14; the others run a step of each network.
SPARED = ({"tensor": 2}, {"sequence": 2}, {"sequence": 3}, {"ulysses": 4}, {"ulysses": 2, "ring": 3})
EDITED = tuple(sizes for sizes in MESHES if sizes not in SPARED)
DAILY = ({"data": 3}, {"ring": 4}, {"cfg": 2, "sequence": 2, "tensor": 2})  # every axis


def name_of(sizes: dict[str, int]) -> str:
    """Return a mesh's sizes as a test id."""
    return "-".join(f"{name}{size}" for name, size in sizes.items())
