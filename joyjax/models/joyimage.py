"""The JoyImage-Edit diffusion transformer: two streams, image and text, that meet in joint attention.

An item is a picture's latent: the target that is being denoised, or a reference. Tokens are 2×2 patches of latent
pixels; those of the target come first, then those of each reference. Edit and Edit-Plus are this one network.
Source: transformer_joyimage.py and transformer_joyimage_edit_plus.py in Diffusers.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from joyjax.config import read_config
from joyjax.dtypes import FLOAT32
from joyjax.errors import ConfigError
from joyjax.kernels.modulate import layer_norm
from joyjax.layers.activation import gelu
from joyjax.layers.condition import Condition, lay_out
from joyjax.layers.double_stream import MODULATIONS, Block, FirstBlockOutput, Stream
from joyjax.layers.embed import timestep_embedding
from joyjax.layers.joint_attention import Layout, pad_to_devices
from joyjax.layers.linear import Linear
from joyjax.layers.parameter import parameter
from joyjax.sharding.attention import SequenceMesh, sequence_mesh
from joyjax.sharding.place import constrain

TIME_CHANNELS = 256  # fixed in the reference, not in the config


@dataclasses.dataclass(frozen=True)
class JoyImageConfig:
    """The transformer's config.json."""

    hidden_size: int
    num_attention_heads: int
    num_layers: int
    in_channels: int
    out_channels: int
    patch_size: tuple[int, ...]
    text_dim: int
    mlp_width_ratio: float
    rope_dim_list: tuple[int, ...]
    rope_type: str
    theta: float

    @classmethod
    def from_diffusers(cls, raw: Mapping[str, Any], where: str = "transformer/config.json") -> "JoyImageConfig":
        """Read the json object; raises ConfigError for what this network does not implement."""
        channels = raw.get("in_channels") if isinstance(raw, Mapping) else None
        config = read_config(
            cls, raw, where=where, fixed={"rope_type": ("rope", "mrope")}, optional={"out_channels": channels}
        )
        if len(config.patch_size) != 3 or config.patch_size[0] != 1 or min(config.patch_size) < 1:
            raise ConfigError(f"{where}: patch_size is {config.patch_size}; expected one frame, as in [1, 2, 2]")
        sizes = config.hidden_size, config.num_attention_heads, config.num_layers, config.in_channels, config.text_dim
        if min(sizes) < 1 or not all(0 < value < math.inf for value in (config.mlp_width_ratio, config.theta)):
            raise ConfigError(f"{where}: sizes, mlp_width_ratio and theta must be positive")
        if config.mlp_dim < 1:
            raise ConfigError(f"{where}: mlp_width_ratio is {config.mlp_width_ratio}; the MLP must have a unit")
        if config.out_channels != config.in_channels:
            raise ConfigError(
                f"{where}: out_channels {config.out_channels} must equal in_channels {config.in_channels}, or be null: "
                "the prediction is added to the latents"
            )
        if config.hidden_size % config.num_attention_heads:
            raise ConfigError(
                f"{where}: hidden_size {config.hidden_size} is not divisible by "
                f"num_attention_heads {config.num_attention_heads}"
            )
        if len(config.rope_dim_list) != 3 or sum(config.rope_dim_list) != config.head_dim:
            raise ConfigError(
                f"{where}: rope_dim_list {list(config.rope_dim_list)} must be three widths that add up to the head's, "
                f"{config.head_dim}"
            )
        if any(width < 2 or width % 2 for width in config.rope_dim_list):
            raise ConfigError(f"{where}: rope_dim_list {list(config.rope_dim_list)} must be even widths from 2")
        # The Edit-Plus class has the field and does not read it.
        if str(raw.get("_class_name")).startswith("JoyImageEditPlus"):
            config = dataclasses.replace(config, rope_type="rope")
        return config

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def mlp_dim(self) -> int:
        """Channels inside the MLP."""
        return int(self.hidden_size * self.mlp_width_ratio)

    @property
    def patch(self) -> tuple[int, int]:
        """Height and width of a patch, in latent pixels."""
        return self.patch_size[1], self.patch_size[2]

    @property
    def patch_area(self) -> int:
        """Latent pixels in a token."""
        return self.patch_size[1] * self.patch_size[2]

    @property
    def modulations(self) -> int:
        """Modulations among which image tokens select: one for all."""
        return 1


class JoyImageStream(Stream):
    """A stream with a modulation table, which is added to the time's modulation that all blocks share."""

    def __init__(self, config: JoyImageConfig, *, dtype: DTypeLike, rngs: nnx.Rngs | None):
        width = config.hidden_size
        self.table = parameter(rngs, (MODULATIONS, width), (None, "embed"), dtype, init=width**-0.5)
        super().__init__(
            width=width,
            heads=config.num_attention_heads,
            head_dim=config.head_dim,
            mlp_dim=config.mlp_dim,
            fused=True,
            dtype=dtype,
            rngs=rngs,
        )

    def modulation(self, temb: Float[Array, "B 6 D"]) -> Float[Array, "B 1 6 D"]:
        """Return shift, scale, gate of the attention and shift, scale, gate of the MLP, in float32."""
        return (self.table[...].astype(FLOAT32) + temb.astype(FLOAT32))[:, None]


def make_block(config: JoyImageConfig, *, dtype: DTypeLike, rngs: nnx.Rngs | None) -> Block:
    """Build one double-stream block."""
    return Block(*(JoyImageStream(config, dtype=dtype, rngs=rngs) for _ in range(2)))


def modulations(block: Block, temb: Float[Array, "B 6 D"]) -> tuple[Float[Array, "B 1 6 D"], Float[Array, "B 1 6 D"]]:
    """Return the modulation of a block's image and of its text, in float32."""
    return block.img.modulation(temb), block.txt.modulation(temb)


class JoyImageTransformer(nnx.Module):
    """Predicts the velocity of the target's latents from noisy target, clean references, text and time."""

    def __init__(self, config: JoyImageConfig, *, dtype: DTypeLike, rngs: nnx.Rngs | None):
        def linear(inputs: int, outputs: tuple[int, ...], axes: tuple[str | None, ...], dtype: DTypeLike) -> Linear:
            return Linear((inputs,), outputs, axes_in=axes[:1], axes_out=axes[1:], dtype=dtype, rngs=rngs)

        width = config.hidden_size
        self.config = config
        self.img_in = linear(config.in_channels * config.patch_area, (width,), ("patch", "embed"), dtype)
        # The reference keeps these two in float32 whatever the dtype of the rest.
        self.time_in = linear(TIME_CHANNELS, (width,), ("time", "mlp"), FLOAT32)
        self.time_hidden = linear(width, (width,), ("mlp", "embed"), FLOAT32)
        self.time_out = linear(width, (MODULATIONS, width), ("mlp", None, "embed"), dtype)
        self.txt_in = linear(config.text_dim, (width,), (None, "mlp"), dtype)
        self.txt_hidden = linear(width, (width,), ("mlp", "embed"), dtype)
        self.blocks = nnx.List([make_block(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)])
        self.out = linear(width, (config.out_channels * config.patch_area,), ("embed", "patch"), dtype)

    def __call__(
        self, latents: Float[Array, "B T P"], timestep: Float[Array, " B"], condition: Condition
    ) -> Float[Array, "B T P"]:
        """Return the velocity of the target's tokens, in float32; `timestep` is 1000·sigma.

        On a mesh, the devices that share a batch must divide B; those that share a sequence may be any number.
        """
        first_output = self.first_block(latents, timestep, condition)
        return self.head(self.remaining_blocks(first_output), first_output)[:, : latents.shape[1]]

    def first_block(
        self, latents: Float[Array, "B T P"], timestep: Float[Array, " B"], condition: Condition
    ) -> FirstBlockOutput:
        """Embed everything and run the first block, unless it is the last too."""
        mesh = sequence_mesh(self.config.num_attention_heads)
        count = latents.shape[1]
        targets = count + -count % mesh.devices  # with padding
        temb = self._embed_time(timestep)
        layout, latents = self._lay_out(latents, condition, mesh)
        img = constrain(self.img_in(latents), "batch", "sequence", "embed")
        txt = constrain(self._embed_text(pad_to_devices(condition.txt, mesh.devices)), "batch", "sequence", "embed")
        before = img
        for block in self.blocks[:-1][:1]:
            with jax.named_scope("block_0"):
                img, txt = block(img, txt, *modulations(block, temb), layout)
        return FirstBlockOutput(before, img, txt, temb, layout, targets)

    def remaining_blocks(self, first_output: FirstBlockOutput) -> Float[Array, "B U D"]:
        """Run all other blocks; return the target's tokens, with padding."""
        img, txt, temb, layout = first_output.img, first_output.txt, first_output.temb, first_output.layout
        for number, block in enumerate(self.blocks[1:-1], 1):
            with jax.named_scope(f"block_{number}"):
                img, txt = block(img, txt, *modulations(block, temb), layout)
        last = self.blocks[-1]
        with jax.named_scope(f"block_{len(self.blocks) - 1}"):
            return last.last(img, txt, *modulations(last, temb), layout, first_output.targets)

    @jax.named_scope("head")
    def head(self, tokens: Float[Array, "B U D"], first_output: FirstBlockOutput) -> Float[Array, "B U P"]:
        """Return the velocity from the last block's output, in float32. This head is not modulated by the time."""
        return self.out(layer_norm(tokens)).astype(FLOAT32)

    @jax.named_scope("text")
    def _embed_text(self, txt: Float[Array, "B J C"]) -> Float[Array, "B J D"]:
        return self.txt_hidden(gelu(self.txt_in(txt)))

    @jax.named_scope("time")
    def _embed_time(self, timestep: Float[Array, " B"]) -> Float[Array, "B 6 D"]:
        temb = self.time_hidden(nnx.silu(self.time_in(timestep_embedding(timestep, TIME_CHANNELS))))
        return self.time_out(nnx.silu(temb))

    def _lay_out(
        self, latents: Float[Array, "B T P"], condition: Condition, mesh: SequenceMesh
    ) -> tuple[Layout, Float[Array, "B I P"]]:
        """Shard all tokens over the devices; return their layout, and the joined tokens of target and references."""
        config, start = self.config, None
        if config.rope_type == "mrope":  # text positions follow the largest image position, equal on all three axes
            start = jnp.max(condition.positions, axis=(1, 2)) + 1
        return lay_out(latents, condition, mesh, txt_start=start, widths=config.rope_dim_list, theta=config.theta)
