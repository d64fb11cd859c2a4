"""The vision tower of Qwen2.5-VL: a transformer from 14×14 patches to tokens of the language model.

Blocks of 2×2 patches become one token. Most layers attend within windows of 4×4 tokens, a few within the whole picture.
Tokens are stored window by window, each window padded at the end, so that windowed attention is plain attention on a
batch of windows. After the merger they are put back into the order of rows.
Source: Qwen2_5_VisionTransformerPretrainedModel in Transformers' modeling_qwen2_5_vl.py.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from joyjax.config import read_config
from joyjax.errors import ConfigError
from joyjax.layers.activation import swiglu
from joyjax.layers.linear import Linear
from joyjax.layers.norm import RMSNorm
from joyjax.layers.rope import Rotation, rotate_half_split, rotation_by_blocks
from joyjax.models.qwen3_vl_vision import check_tower, flatten_rope, gelu
from joyjax.sharding.attention import partitioned_attention
from joyjax.sharding.place import constrain

EPS = 1e-6  # of every norm in the tower; fixed in the reference, not in the config
OLDER_NAMES = {"in_chans": "in_channels", "spatial_patch_size": "patch_size"}  # published files have both

# Queries, keys and values `[I L N H]` to the attention's output `[I L N H]`.
Attend = Callable[[Array, Array, Array], Array]


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
    window_size: int
    fullatt_block_indexes: tuple[int, ...]
    out_hidden_size: int
    rope_theta: float

    @classmethod
    def from_transformers(cls, raw: Mapping[str, Any], where: str = "vision_config") -> "VisionConfig":
        """Read the json object; raises ConfigError for what this network does not implement."""
        flat = dict(flatten_rope(raw))
        for older, name in OLDER_NAMES.items():
            value = flat.pop(older, None)
            if value is not None and flat.setdefault(name, value) != value:
                raise ConfigError(f"{where}: {older} is {value!r:.200}, but {name} is {flat[name]!r:.200}")
        config = read_config(
            cls,
            flat,
            where=where,
            fixed={
                "hidden_act": ("silu",),
                "model_type": ("qwen2_5_vl", "qwen2_5_vl_vision"),
                "rope_type": ("axial",),
            },
            ignored=("dtype", "torch_dtype", "initializer_range", "tokens_per_second"),  # the last is of videos
            optional={"rope_theta": 10000.0},  # a constant of the network until Transformers 5 wrote it down
        )
        check_tower(config, "fullatt_block_indexes", where)
        if config.window < 1:
            raise ConfigError(
                f"{where}: window_size is {config.window_size}; expected at least one token, "
                f"{config.spatial_merge_size * config.patch_size} pixels"
            )
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
    def window(self) -> int:
        """Tokens on the side of a window."""
        return self.window_size // self.spatial_merge_size // self.patch_size


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["patches", "positions", "window_lengths", "slots", "lengths"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class WindowedInputs:
    """Pictures as patches in windows; the windows are padded to one size, and their number to that of all pictures.

    `patches` are (channel, frame, row, column), normalised. `positions` are the row and column of each patch in its
    picture, any valid ones at padding. `window_lengths` are the patches of each window, which come first in it; at
    least one, so that no softmax is empty. `slots` are the places of a picture's tokens among those of all windows, in
    the order of rows, and `lengths` the number of its patches.
    """

    patches: Float[Any, "I L P"]
    positions: Int[Any, "I L 2"]
    window_lengths: Int[Any, "I W"]
    slots: Int[Any, "I M"]
    lengths: Int[Any, " I"]


def window_slots(rows: int, columns: int, window: int) -> tuple[Int[np.ndarray, " M"], Int[np.ndarray, " W"]]:
    """Return the slot of each token of a picture, in the order of rows, and the number of tokens in each window.

    Windows are counted row by row from the top left; those at the right and lower edge may be smaller. A window has
    `window`² slots, of which its tokens take the first, row by row.
    """
    row, column = np.divmod(np.arange(rows * columns, dtype=np.int32), np.int32(columns))
    across = -(-columns // window)
    number = row // window * across + column // window
    width = np.minimum(window, columns - column // window * window)
    slots = number * window**2 + row % window * width + column % window
    return slots.astype(np.int32), np.bincount(number).astype(np.int32)


class VisionBlock(nnx.Module):
    """A pre-norm transformer block with a gated MLP; all linear maps have a bias."""

    def __init__(self, config: VisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs | None):
        def linear(
            inputs: tuple[int, ...],
            outputs: tuple[int, ...],
            axes_in: tuple[str | None, ...],
            axes_out: tuple[str | None, ...],
        ) -> Linear:
            return Linear(inputs, outputs, axes_in=axes_in, axes_out=axes_out, dtype=dtype, rngs=rngs)

        width, hidden, heads = (config.hidden_size,), (config.intermediate_size,), (config.num_heads, config.head_dim)
        head_axes = ("vision_heads", "head_width")
        self.attention_norm = RMSNorm(config.hidden_size, eps=EPS, axis="embed", dtype=dtype, rngs=rngs)
        self.qkv = linear(width, (3, *heads), ("embed",), (None, *head_axes))
        self.out = linear(heads, width, head_axes, ("embed",))
        self.mlp_norm = RMSNorm(config.hidden_size, eps=EPS, axis="embed", dtype=dtype, rngs=rngs)
        self.gate, self.up = (linear(width, hidden, ("embed",), ("mlp",)) for _ in range(2))
        self.down = linear(hidden, width, ("mlp",), ("embed",))

    def __call__(self, x: Float[Array, "I L D"], rotation: Rotation, attend: Attend) -> Float[Array, "I L D"]:
        """Return the updated patches. `attend` decides which patches see each other."""
        x = x + self.attention(self.attention_norm(x), rotation, attend)
        x = x + self.mlp(self.mlp_norm(x))
        return constrain(x, "batch", "sequence", "embed")

    @jax.named_scope("attention")
    def attention(self, x: Float[Array, "I L D"], rotation: Rotation, attend: Attend) -> Float[Array, "I L D"]:
        """Attend from every patch to those that `attend` shows it."""
        qkv = self.qkv(x)
        query, key = (rotate_half_split(qkv[:, :, part], rotation).astype(x.dtype) for part in (0, 1))
        return self.out(attend(query, key, qkv[:, :, 2]))

    @jax.named_scope("mlp")
    def mlp(self, x: Float[Array, "I L D"]) -> Float[Array, "I L D"]:
        """A linear map and a gate's SiLU, multiplied, and a linear map back."""
        return self.down(swiglu(self.gate(x), self.up(x)))


class Merger(nnx.Module):
    """Normalises patches and merges each block of them into one token of the language model, with an exact GELU."""

    def __init__(self, config: VisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs | None):
        joined = config.merged * config.hidden_size
        self.norm = RMSNorm(config.hidden_size, eps=EPS, axis="embed", dtype=dtype, rngs=rngs)
        self.up = Linear((joined,), (joined,), axes_in=("embed",), axes_out=("mlp",), dtype=dtype, rngs=rngs)
        self.down = Linear(
            (joined,), (config.out_hidden_size,), axes_in=("mlp",), axes_out=("embed",), dtype=dtype, rngs=rngs
        )
        self.merged = config.merged

    @jax.named_scope("merger")
    def __call__(self, x: Float[Array, "I L D"]) -> Float[Array, "I T E"]:
        """Return the tokens; T is L divided by the patches of a block."""
        joined = self.norm(x).reshape(x.shape[0], x.shape[1] // self.merged, self.merged * x.shape[2])
        return self.down(gelu(self.up(joined), approximate=False))


class VisionTower(nnx.Module):
    """Patches to tokens of the language model."""

    def __init__(self, config: VisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs | None):
        self.config = config
        self.patch = Linear(
            (config.patch_values,),
            (config.hidden_size,),
            axes_in=("patch",),
            axes_out=("embed",),
            bias=False,
            dtype=dtype,
            rngs=rngs,
        )
        self.blocks = nnx.List([VisionBlock(config, dtype=dtype, rngs=rngs) for _ in range(config.depth)])
        self.merger = Merger(config, dtype=dtype, rngs=rngs)

    @jax.named_scope("vision")
    def __call__(self, inputs: WindowedInputs) -> Float[Array, "I M E"]:
        """Return the tokens of each picture in the order of rows, undefined at padding."""
        config = self.config
        x = constrain(self.patch(inputs.patches), "batch", "sequence", "embed")
        rotation = rotation_by_blocks(inputs.positions, (config.head_dim // 2,) * 2, config.rope_theta)
        windows, pictures = attend_in_windows(inputs), attend_in_pictures(inputs, config.merged)
        for index, block in enumerate(self.blocks):
            with jax.named_scope(f"block_{index}"):
                x = block(x, rotation, pictures if index in config.fullatt_block_indexes else windows)
        return _pick(self.merger(x), inputs.slots)


def attend_in_windows(inputs: WindowedInputs) -> Attend:
    """Return the attention of every patch to those of its window."""
    lengths = inputs.window_lengths.reshape(-1)

    def attend(
        query: Float[Array, "I L N H"], key: Float[Array, "I L N H"], value: Float[Array, "I L N H"]
    ) -> Float[Array, "I L N H"]:
        rows = (lengths.shape[0], -1, *query.shape[2:])
        found = partitioned_attention(*(x.reshape(rows) for x in (query, key, value)), lengths=lengths)
        return found.reshape(query.shape)

    return attend


def attend_in_pictures(inputs: WindowedInputs, merged: int) -> Attend:
    """Return the attention of every patch to all of its picture, without the padding of the windows."""
    patches = inputs.slots[:, :, None] * merged + jnp.arange(merged, dtype=inputs.slots.dtype)
    patches = patches.reshape(patches.shape[0], -1)

    def attend(
        query: Float[Array, "I L N H"], key: Float[Array, "I L N H"], value: Float[Array, "I L N H"]
    ) -> Float[Array, "I L N H"]:
        return partitioned_attention(query, _pick(key, patches), _pick(value, patches), lengths=inputs.lengths)

    return attend


def _pick(x: Shaped[Array, "I L *rest"], index: Int[Array, "I M"]) -> Shaped[Array, "I M *rest"]:
    """Return the elements of each row at these places."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)
