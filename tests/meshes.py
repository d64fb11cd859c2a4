"""Meshes of simulated devices, and a small transformer with random weights to run on them."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from joyjax.convert.joyimage import TRANSFORMER
from joyjax.layers.weights import Weights, leaves
from joyjax.models.joyimage import Condition, JoyImageConfig
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
    count = int(np.prod(list(sizes.values())))
    return Mesh(np.asarray(jax.devices()[:count]).reshape(tuple(sizes.values())), tuple(sizes))


def draw(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def make_weights(config: JoyImageConfig = CONFIG, mesh: Mesh | None = None) -> Weights:
    abstract = TRANSFORMER.abstract(config, jnp.float32)
    rng, arrays = np.random.default_rng(1), {}
    for path, leaf in leaves(abstract.state).items():
        fan = np.prod(leaf.shape[: -1 if "qkv" not in path else 1]) if "kernel" in path else 4
        array = rng.standard_normal(leaf.shape) * 1.5 / fan**0.5 + ("norm" in path)
        place = parameter_sharding(path, leaf.shape, leaf.axes, mesh)
        arrays[path] = jax.device_put(np.asarray(array, leaf.dtype), place or jax.devices()[0])
    return abstract.filled(arrays)


def make_condition(edits: int, passes: int, tokens: tuple[int, int, int], *, ragged: bool) -> Condition:
    """Return a condition with so many text, target and reference tokens; edits differ where it is ragged."""
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
