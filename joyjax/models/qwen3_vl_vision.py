"""The vision tower of Qwen3-VL: a transformer from 16×16 patches to tokens of the language model.

Blocks of 2×2 patches become one token. Patches are in the order (block row, block column, row in the block, column in
the block), so that the four of a token are neighbours. A few intermediate layers give tokens too, which the language
model adds to the outputs of its first layers (DeepStack: Meng et al., 2024).
Source: Qwen3VLVisionModel in Transformers' modeling_qwen3_vl.py.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from joyjax.config import read_config
from joyjax.dtypes import FLOAT32
from joyjax.errors import ConfigError
from joyjax.layers.linear import Embedding, Linear
from joyjax.layers.norm import LayerNorm
from joyjax.layers.rope import Rotation, rotate_half_split, rotation_by_blocks
from joyjax.sharding.attention import partitioned_attention
from joyjax.sharding.place import constrain

EPS = 1e-6  # of every norm in the tower; fixed in the reference, not in the config


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The `vision_config` of the text encoder's config.json."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    out_hidden_size: int
    num_position_embeddings: int
    deepstack_visual_indexes: tuple[int, ...]
    rope_theta: float

    @classmethod
    def from_transformers(cls, raw: Mapping[str, Any], where: str = "vision_config") -> "VisionConfig":
        """Read the json object; raises ConfigError for what this network does not implement."""
        config = read_config(
            cls,
            flatten_rope(raw),
            where=where,
            fixed={
                "hidden_act": ("gelu_pytorch_tanh",),
                "model_type": ("qwen3_vl", "qwen3_vl_vision"),
                "rope_type": ("axial",),
            },
            ignored=("dtype", "torch_dtype", "initializer_range"),
            optional={"rope_theta": 10000.0},  # a constant of the network until Transformers 5 wrote it down
        )
        check_tower(config, "deepstack_visual_indexes", where)
        if config.grid_size**2 != config.num_position_embeddings:
            raise ConfigError(f"{where}: num_position_embeddings {config.num_position_embeddings} is not a square")
        return config

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def merged(self) -> int:
        """Patches in one token."""
        return self.spatial_merge_size**2

    @property
    def patch_values(self) -> int:
        """Values in one patch: channels × frames × rows × columns."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def grid_size(self) -> int:
        """Rows, and columns, of the table of position embeddings."""
        return math.isqrt(self.num_position_embeddings)


def flatten_rope(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Lift the keys of `rope_parameters` (Transformers 5) and `rope_scaling` (Transformers 4) to the top level."""
    flat = dict(raw)
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(flat.get(key, {}), Mapping | None):
            flat.update(flat.pop(key, None) or {})
    return flat


def check_positive(config: Any, where: str) -> None:
    """Raise ConfigError if a numeric field of this configuration is not positive."""
    for name, value in vars(config).items():
        if isinstance(value, int | float) and value <= 0:
            raise ConfigError(f"{where}: {name} is {value}; expected a positive number")


def check_tower(config: Any, indexes: str, where: str) -> None:
    """Raise ConfigError for a vision tower's configuration that cannot be; `indexes` is the field of some layers."""
    check_positive(config, where)
    if config.hidden_size % (4 * config.num_heads):
        raise ConfigError(
            f"{where}: hidden_size {config.hidden_size} is not divisible by 4 · num_heads {config.num_heads}; "
            "rows and columns each rotate pairs of channels"
        )
    layers = getattr(config, indexes)
    if any(layer not in range(config.depth) for layer in layers) or list(layers) != sorted(set(layers)):
        raise ConfigError(f"{where}: {indexes} {list(layers)} must be ascending numbers below depth {config.depth}")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["patches", "positions", "taps", "weights", "lengths"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class VisionInputs:
    """Pictures as patches, padded at the end to a common number of patches, a multiple of the block.

    `patches` have 1536 values each: (channel, frame, row, column), in [-1, 1]. `positions`, `taps` and `weights` are
    those of `patch_positions`, any valid values at padding. `lengths`: patches of each picture, at least one block.
    """

    patches: Float[Any, "I L P"]
    positions: Int[Any, "I L 2"]
    taps: Int[Any, "I L 4"]
    weights: Float[Any, "I L 4"]
    lengths: Int[Any, " I"]


def block_positions(grid_height: int, grid_width: int, merge: int) -> Int[np.ndarray, "L 2"]:
    """Return (row, column) of a picture's patches, in block order."""
    if grid_height % merge or grid_width % merge:
        raise ValueError(f"a grid of {grid_height}×{grid_width} patches is not made of blocks of {merge}×{merge}")
    grid = np.moveaxis(np.indices((grid_height, grid_width), np.int32), 0, -1)
    grid = grid.reshape(grid_height // merge, merge, grid_width // merge, merge, 2)
    return grid.swapaxes(1, 2).reshape(-1, 2)


def patch_positions(
    grid_height: int, grid_width: int, config: VisionConfig
) -> tuple[Int[np.ndarray, "L 2"], Int[np.ndarray, "L 4"], Float[np.ndarray, "L 4"]]:
    """Return positions of a picture's patches, in block order, and taps and weights of their position embeddings.

    Positions are (row, column). Taps are the four nearest rows of the position table, which is stretched over the
    picture with aligned corners; weights are bilinear.
    Source: get_vision_interpolation_indices_and_weights in Transformers' vision_utils.py, to the last bit.
    """
    size = config.grid_size
    positions = block_positions(grid_height, grid_width, config.spatial_merge_size)
    steps = np.maximum(np.array([grid_height, grid_width], np.float32) - 1, 1)
    source = positions.astype(np.float32) * np.float32(size - 1) / steps
    near = np.floor(source) + np.arange(2, dtype=np.float32)[:, None, None]
    rows, columns = np.moveaxis(np.minimum(near, size - 1).astype(np.int32), -1, 0)
    row_weights, column_weights = np.moveaxis(1 - np.abs(source - near), -1, 0)
    taps = rows[:, None] * size + columns
    weights = row_weights[:, None] * column_weights
    return positions, taps.reshape(4, -1).T, weights.reshape(4, -1).T


def gelu(x: Float[Array, "..."], *, approximate: bool) -> Float[Array, "..."]:
    """Gaussian error linear unit, exact or by tanh; float32 inside."""
    return jax.nn.gelu(x.astype(FLOAT32), approximate=approximate).astype(x.dtype)


class VisionBlock(nnx.Module):
    """A pre-norm transformer block; a patch attends to all patches of its own picture only."""

    def __init__(self, config: VisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs | None):
        width, hidden, heads = (config.hidden_size,), (config.intermediate_size,), (config.num_heads, config.head_dim)
        head_axes = ("vision_heads", "head_width")
        self.attention_norm = LayerNorm(config.hidden_size, eps=EPS, axis="embed", dtype=dtype, rngs=rngs)
        self.qkv = Linear(width, (3, *heads), axes_in=("embed",), axes_out=(None, *head_axes), dtype=dtype, rngs=rngs)
        self.out = Linear(heads, width, axes_in=head_axes, axes_out=("embed",), dtype=dtype, rngs=rngs)
        self.mlp_norm = LayerNorm(config.hidden_size, eps=EPS, axis="embed", dtype=dtype, rngs=rngs)
        self.up = Linear(width, hidden, axes_in=("embed",), axes_out=("mlp",), dtype=dtype, rngs=rngs)
        self.down = Linear(hidden, width, axes_in=("mlp",), axes_out=("embed",), dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "I L D"], rotation: Rotation, lengths: Int[Array, " I"]
    ) -> Float[Array, "I L D"]:
        """Return the updated patches."""
        x = x + self.attention(self.attention_norm(x), rotation, lengths)
        x = x + self.mlp(self.mlp_norm(x))
        return constrain(x, "batch", "sequence", "embed")

    @jax.named_scope("attention")
    def attention(
        self, x: Float[Array, "I L D"], rotation: Rotation, lengths: Int[Array, " I"]
    ) -> Float[Array, "I L D"]:
        """Attend from every patch to all patches of its picture."""
        qkv = self.qkv(x)
        query, key = (rotate_half_split(qkv[:, :, part], rotation).astype(x.dtype) for part in (0, 1))
        return self.out(partitioned_attention(query, key, qkv[:, :, 2], lengths=lengths))

    @jax.named_scope("mlp")
    def mlp(self, x: Float[Array, "I L D"]) -> Float[Array, "I L D"]:
        """Two linear maps with a tanh-approximated GELU between."""
        return self.down(gelu(self.up(x), approximate=True))


class Merger(nnx.Module):
    """Merges each block of patches into one token of the language model, with an exact GELU.

    The final merger normalises patches and then joins them; those of DeepStack (`joined_norm`) join first.
    """

    def __init__(self, config: VisionConfig, *, joined_norm: bool, dtype: DTypeLike, rngs: nnx.Rngs | None):
        joined = config.merged * config.hidden_size
        normed = joined if joined_norm else config.hidden_size
        self.norm = LayerNorm(normed, eps=EPS, axis="embed", dtype=dtype, rngs=rngs)
        self.up = Linear((joined,), (joined,), axes_in=("embed",), axes_out=("mlp",), dtype=dtype, rngs=rngs)
        self.down = Linear(
            (joined,), (config.out_hidden_size,), axes_in=("mlp",), axes_out=("embed",), dtype=dtype, rngs=rngs
        )
        self.merged = config.merged
        self.joined_norm = joined_norm

    @jax.named_scope("merger")
    def __call__(self, x: Float[Array, "I L D"]) -> Float[Array, "I M E"]:
        """Return the tokens; M is L divided by the patches of a block."""
        joined = (x.shape[0], x.shape[1] // self.merged, self.merged * x.shape[2])
        x = self.norm(x.reshape(joined)) if self.joined_norm else self.norm(x).reshape(joined)
        return self.down(gelu(self.up(x), approximate=False))


class VisionTower(nnx.Module):
    """Patches to tokens of the language model, from the last layer and from the DeepStack layers."""

    def __init__(self, config: VisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs | None):
        self.config = config
        self.patch = Linear(
            (config.patch_values,),
            (config.hidden_size,),
            axes_in=("patch",),
            axes_out=("embed",),
            dtype=dtype,
            rngs=rngs,
        )
        self.position = Embedding(
            config.num_position_embeddings, config.hidden_size, axes=(None, "embed"), dtype=dtype, rngs=rngs
        )
        self.blocks = nnx.List([VisionBlock(config, dtype=dtype, rngs=rngs) for _ in range(config.depth)])
        self.merger = Merger(config, joined_norm=False, dtype=dtype, rngs=rngs)
        self.deepstack = nnx.List(
            [Merger(config, joined_norm=True, dtype=dtype, rngs=rngs) for _ in config.deepstack_visual_indexes]
        )

    @jax.named_scope("vision")
    def __call__(self, inputs: VisionInputs) -> tuple[Float[Array, "I M D"], tuple[Float[Array, "I M D"], ...]]:
        """Return the final tokens and those of each DeepStack layer, undefined at padding."""
        config = self.config
        patches = self.patch(inputs.patches)
        near = self.position(inputs.taps).astype(FLOAT32)
        position = jnp.sum(near * inputs.weights[..., None], axis=2)
        x = constrain((patches.astype(FLOAT32) + position).astype(patches.dtype), "batch", "sequence", "embed")
        rotation = rotation_by_blocks(inputs.positions, (config.head_dim // 2,) * 2, config.rope_theta)
        deepstack: list[Array] = []
        for index, block in enumerate(self.blocks):
            with jax.named_scope(f"block_{index}"):
                x = block(x, rotation, inputs.lengths)
            if index in config.deepstack_visual_indexes:
                deepstack.append(self.deepstack[len(deepstack)](x))
        return self.merger(x), tuple(deepstack)
