"""The Qwen-Image diffusion transformer: double-stream blocks with one modulation map each.

Tokens are 2×2 patches of latent pixels; those of the target come first, then those of each reference. Rows and columns
are counted from the middle of a picture. Text is rotated too; its positions start after the last row and column.
With `zero_cond_t` (2511) the references have the modulation of time 0, the target and the text that of the step.
Source: transformer_qwenimage.py in Diffusers.
"""

import dataclasses
from collections.abc import Mapping, Sequence
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
from joyjax.kernels.modulate import layer_norm_scale_shift
from joyjax.layers.condition import Condition, lay_out
from joyjax.layers.double_stream import MODULATIONS, Block, FirstBlockOutput, Stream
from joyjax.layers.embed import timestep_embedding
from joyjax.layers.joint_attention import pad_to_devices
from joyjax.layers.linear import Linear
from joyjax.layers.norm import RMSNorm
from joyjax.layers.parameter import parameter
from joyjax.sharding.attention import sequence_mesh
from joyjax.sharding.place import constrain

# Fixed in the reference, not in the config.
TIME_CHANNELS = 256
TIME_SCALE = 1000.0
THETA = 10000.0
EPS = 1e-6
MLP_RATIO = 4
PATCH = 2  # the pipelines pack 2×2 latent pixels, whatever patch_size says


@dataclasses.dataclass(frozen=True)
class QwenImageConfig:
    """The transformer's config.json. `in_channels` are those of a token, `out_channels` those of a latent pixel."""

    patch_size: int
    in_channels: int
    out_channels: int
    num_layers: int
    attention_head_dim: int
    num_attention_heads: int
    joint_attention_dim: int
    axes_dims_rope: tuple[int, ...]
    zero_cond_t: bool = False
    use_additional_t_cond: bool = False
    use_layer3d_rope: bool = False

    @classmethod
    def from_diffusers(cls, raw: Mapping[str, Any], where: str = "transformer/config.json") -> "QwenImageConfig":
        """Read the json object; raises ConfigError for what this network does not implement."""
        config = read_config(
            cls,
            raw,
            where=where,
            fixed={"guidance_embeds": (False,)},
            optional=dict.fromkeys(("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"), False),
            ignored=("pooled_projection_dim",),  # of older configs; the network has no pooled text
        )
        sizes = config.num_layers, config.attention_head_dim, config.num_attention_heads, config.joint_attention_dim
        if min(*sizes, config.in_channels, config.out_channels) < 1:
            raise ConfigError(f"{where}: sizes must be positive")
        if config.patch_size != PATCH:
            raise ConfigError(f"{where}: patch_size is {config.patch_size}; this version of joyjax implements {PATCH}")
        if config.in_channels != config.out_channels * config.patch_area:
            raise ConfigError(
                f"{where}: in_channels is {config.in_channels}; expected {config.out_channels * config.patch_area}, "
                f"which are {config.patch_area} latent pixels of out_channels {config.out_channels}: the prediction is "
                "added to the latents"
            )
        axes = config.axes_dims_rope
        if len(axes) != 3 or sum(axes) != config.head_dim or any(width < 2 or width % 2 for width in axes):
            raise ConfigError(
                f"{where}: axes_dims_rope {list(axes)} must be three even widths from 2 that add up to "
                f"attention_head_dim, {config.head_dim}"
            )
        kinds = config.zero_cond_t, config.use_additional_t_cond, config.use_layer3d_rope
        if kinds not in ((False, False, False), (True, False, False), (False, True, True)):
            raise ConfigError(
                f"{where}: zero_cond_t is {kinds[0]}, use_additional_t_cond {kinds[1]} and use_layer3d_rope {kinds[2]}"
                "; expected the last two alike, and zero_cond_t only without them"
            )
        return config

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.attention_head_dim

    @property
    def hidden_size(self) -> int:
        """Channels of a token inside the network."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def modulations(self) -> int:
        """Modulations among which image tokens select: those of the time and, with `zero_cond_t`, of time 0."""
        return 2 if self.zero_cond_t else 1

    @property
    def layered(self) -> bool:
        """Whether it is the network of Qwen-Image-Layered."""
        return self.use_layer3d_rope

    @property
    def patch(self) -> tuple[int, int]:
        """Height and width of a patch, in latent pixels."""
        return self.patch_size, self.patch_size

    @property
    def patch_area(self) -> int:
        """Latent pixels in a token."""
        return self.patch_size**2


def image_positions(sizes: Sequence[tuple[int, int]], items: Sequence[int] | None = None) -> Int[np.ndarray, "I 3"]:
    """Return (item, row, column) of the tokens of pictures of these rows and columns, the target first.

    Rows and columns are counted from the middle: of 9, from -5 to 3. `items` are 0, 1, … unless given.
    """
    positions = []
    for item, (rows, columns) in zip(range(len(sizes)) if items is None else items, sizes, strict=True):
        row, column = np.divmod(np.arange(rows * columns, dtype=np.int32), np.int32(columns))
        centred = row - np.int32(rows - rows // 2), column - np.int32(columns - columns // 2)
        positions.append(np.stack([np.full_like(row, item), *centred], axis=-1))
    return np.concatenate(positions)


def layer_positions(size: tuple[int, int], layers: int) -> Int[np.ndarray, "I 3"]:
    """Return the positions of `layers` + 1 frames of this size, then of the condition, whose item is -1."""
    return image_positions([size] * (layers + 2), [*range(layers + 1), -1])


def text_start(sizes: Sequence[tuple[int, int]], least: int = 0) -> int:
    """Return the position of the first text token beside pictures of these rows and columns: `Condition.txt_start`.

    `least` is the lowest for Qwen-Image-Layered: its layers + 1.
    """
    return max(least, *(side // 2 for size in sizes for side in size))


class QwenImageStream(Stream):
    """A stream with a linear map from the embedding of the time to its modulation."""

    def __init__(self, config: QwenImageConfig, *, dtype: DTypeLike, rngs: nnx.Rngs | None):
        width = config.hidden_size
        self.modulation = Linear(
            (width,),
            (MODULATIONS, width),
            axes_in=("embed",),
            axes_out=(None, "modulation"),
            dtype=dtype,
            rngs=rngs,
        )
        super().__init__(
            width=width,
            heads=config.num_attention_heads,
            head_dim=config.head_dim,
            mlp_dim=MLP_RATIO * width,
            fused=False,
            dtype=dtype,
            rngs=rngs,
        )


def make_block(config: QwenImageConfig, *, dtype: DTypeLike, rngs: nnx.Rngs | None) -> Block:
    """Build one double-stream block."""
    return Block(*(QwenImageStream(config, dtype=dtype, rngs=rngs) for _ in range(2)))


@jax.named_scope("modulation")
def modulations(
    blocks: Sequence[Block], temb: Float[Array, "B K D"]
) -> list[tuple[Float[Array, "B K 6 D"], Float[Array, "B 1 6 D"]]]:
    """Return the modulation of image and text for each block, in float32; the text has the first time only.

    Their maps are a third of all parameters. With tensor parallelism every device computes a part of each modulation,
    and one all-gather completes those of all blocks.
    """
    if not blocks:
        return []
    hidden, times = nnx.silu(temb), temb.shape[1]
    each = [(block.img.modulation(hidden), block.txt.modulation(hidden[:, :1])) for block in blocks]
    parts = jnp.stack([jnp.concatenate(pair, axis=1) for pair in each])
    parts = constrain(parts, None, "batch", None, None, "modulation")
    whole = constrain(parts, None, "batch", None, None, "embed").astype(FLOAT32)
    return [(part[:, :times], part[:, times:]) for part in whole]


class QwenImageTransformer(nnx.Module):
    """Predicts the velocity of the target's latents from noisy target, clean references, text and time."""

    def __init__(self, config: QwenImageConfig, *, dtype: DTypeLike, rngs: nnx.Rngs | None):
        def linear(inputs: int, outputs: tuple[int, ...], axes: tuple[str | None, ...], dtype: DTypeLike) -> Linear:
            return Linear((inputs,), outputs, axes_in=axes[:1], axes_out=axes[1:], dtype=dtype, rngs=rngs)

        width, text = config.hidden_size, config.joint_attention_dim
        self.config = config
        self.img_in = linear(config.in_channels, (width,), ("patch", "embed"), dtype)
        # The time embedding is float32, as everywhere in joyjax; the reference rounds it to the dtype.
        self.time_in = linear(TIME_CHANNELS, (width,), ("time", "mlp"), FLOAT32)
        self.time_hidden = linear(width, (width,), ("mlp", "embed"), FLOAT32)
        if config.use_additional_t_cond:  # for pictures without and with alpha; the pipeline uses the first row only
            self.time_added = parameter(rngs, (2, width), (None, "embed"), FLOAT32, init=width**-0.5)
        self.txt_norm = RMSNorm(text, eps=EPS, axis=None, dtype=dtype, rngs=rngs)
        self.txt_in = linear(text, (width,), (None, "embed"), dtype)
        self.blocks = nnx.List([make_block(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)])
        self.head_modulation = linear(width, (2, width), ("embed", None, "embed"), dtype)
        self.out = linear(width, (config.in_channels,), ("embed", "patch"), dtype)

    def __call__(
        self, latents: Float[Array, "B T P"], timestep: Float[Array, " B"], condition: Condition
    ) -> Float[Array, "B T P"]:
        """Return the velocity of the target's tokens, in float32; `timestep` is sigma, from 1 to 0.

        `condition.txt_start` must be given. On a mesh, the devices that share a batch must divide B; those that share a
        sequence may be any number.
        """
        first_output = self.first_block(latents, timestep, condition)
        return self.head(self.remaining_blocks(first_output), first_output)[:, : latents.shape[1]]

    def first_block(
        self, latents: Float[Array, "B T P"], timestep: Float[Array, " B"], condition: Condition
    ) -> FirstBlockOutput:
        """Embed everything and run the first block, unless it is the last too."""
        if condition.txt_start is None:
            raise ValueError(
                "condition.txt_start is None; Qwen-Image rotates text from a position on: see `text_start`"
            )
        config, count = self.config, latents.shape[1]
        mesh = sequence_mesh(config.num_attention_heads)
        targets = count + -count % mesh.devices  # with padding
        temb = self._embed_times(timestep)
        layout, tokens = lay_out(
            latents,
            condition,
            mesh,
            txt_start=condition.txt_start,
            widths=config.axes_dims_rope,
            theta=THETA,
            select=config.zero_cond_t,
        )
        img = constrain(self.img_in(tokens), "batch", "sequence", "embed")
        txt = self.txt_in(self.txt_norm(pad_to_devices(condition.txt, mesh.devices)))
        txt = constrain(txt, "batch", "sequence", "embed")
        before, first = img, self.blocks[:-1][:1]
        for block, modulation in zip(first, modulations(first, temb), strict=True):
            with jax.named_scope("block_0"):
                img, txt = block(img, txt, *modulation, layout)
        return FirstBlockOutput(before, img, txt, temb, layout, targets)

    def remaining_blocks(self, first_output: FirstBlockOutput) -> Float[Array, "B U D"]:
        """Run all other blocks; return the target's tokens, with padding."""
        img, txt, layout = first_output.img, first_output.txt, first_output.layout
        blocks = [*self.blocks[1:-1], self.blocks[-1]]
        *inner, last = zip(blocks, modulations(blocks, first_output.temb), strict=True)
        for number, (block, modulation) in enumerate(inner, 1):
            with jax.named_scope(f"block_{number}"):
                img, txt = block(img, txt, *modulation, layout)
        block, modulation = last
        with jax.named_scope(f"block_{len(self.blocks) - 1}"):
            return block.last(img, txt, *modulation, layout, first_output.targets)

    @jax.named_scope("head")
    def head(self, tokens: Float[Array, "B U D"], first_output: FirstBlockOutput) -> Float[Array, "B U P"]:
        """Return the velocity from the last block's output, in float32."""
        modulation = self.head_modulation(nnx.silu(first_output.temb[:, 0]))
        scale, shift = modulation[:, 0], modulation[:, 1]
        return self.out(layer_norm_scale_shift(tokens, scale, shift, eps=EPS)).astype(FLOAT32)

    def _embed_times(self, timestep: Float[Array, " B"]) -> Float[Array, "B K D"]:
        """Embed the time, and with `zero_cond_t` time 0 beside it."""
        times = jnp.stack([timestep, jnp.zeros_like(timestep)][: self.config.modulations], axis=1)
        return self._embed_time(times.reshape(-1)).reshape(*times.shape, -1)

    @jax.named_scope("time")
    def _embed_time(self, timestep: Float[Array, " B"]) -> Float[Array, "B D"]:
        embedding = timestep_embedding(timestep, TIME_CHANNELS, scale=TIME_SCALE)
        temb = self.time_hidden(nnx.silu(self.time_in(embedding)))
        return temb + self.time_added[0] if self.config.use_additional_t_cond else temb
