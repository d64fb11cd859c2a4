"""The JoyImage-Edit diffusion transformer: two streams, image and text, that meet in joint attention.

An item is a picture's latent: the target that is being denoised, or a reference. Tokens are 2×2 patches of latent
pixels; those of the target come first, then those of each reference. Edit and Edit-Plus are this one network.
Source: transformer_joyimage.py and transformer_joyimage_edit_plus.py in Diffusers.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from joyjax.config import read_config
from joyjax.dtypes import FLOAT32
from joyjax.errors import ConfigError
from joyjax.kernels.modulate import (
    layer_norm,
    layer_norm_scale_shift,
    residual_gate,
    residual_gate_layer_norm_scale_shift,
)
from joyjax.kernels.qk_norm_rope import norm_rope
from joyjax.layers.embed import timestep_embedding
from joyjax.layers.joint_attention import (
    Layout,
    add_lengths,
    join_on_devices,
    joint_attention,
    leading_tokens,
    lengths_on_devices,
    pad_to_devices,
)
from joyjax.layers.linear import Linear
from joyjax.layers.parameter import parameter
from joyjax.layers.rope import rotation_by_blocks
from joyjax.sharding.attention import SequenceMesh, sequence_mesh
from joyjax.sharding.place import constrain

TIME_CHANNELS = 256  # fixed in the reference, not in the config
MODULATIONS = 6  # shift, scale and gate of the attention, then of the MLP


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
        if min(sizes) < 1 or not all(0 < number < math.inf for number in (config.mlp_width_ratio, config.theta)):
            raise ConfigError(f"{where}: sizes, mlp_width_ratio and theta must be positive")
        if config.mlp_dim < 1:
            raise ConfigError(f"{where}: mlp_width_ratio is {config.mlp_width_ratio}; the MLP must have a unit")
        if config.out_channels != config.in_channels:
            raise ConfigError(
                f"{where}: out_channels {config.out_channels} must equal in_channels {config.in_channels}, or be null: "
                "what is predicted is added to the latents"
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


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["txt", "txt_lengths", "references", "positions", "target_lengths", "reference_lengths"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Condition:
    """What a prediction is made from, besides the noisy latents and the time.

    A row is one pass of one edit. Sequences are padded at the end to a common size and `*_lengths` say how much of
    each row is valid; None: all of it. `positions` are (item, row, column) of the target's tokens, then of the
    references', padded as these are, with any valid numbers.
    """

    txt: Float[Array, "B J C"]
    txt_lengths: Int[Array, " B"] | None
    references: Float[Array, "B R P"]
    positions: Int[Array, "B I 3"]
    target_lengths: Int[Array, " B"] | None = None
    reference_lengths: Int[Array, " B"] | None = None


class Stream(nnx.Module):
    """One stream's half of a block: its modulation table, its projections to and from attention, its MLP."""

    def __init__(self, config: JoyImageConfig, *, dtype: DTypeLike, rngs: nnx.Rngs | None):
        width, heads = (config.hidden_size,), (config.num_attention_heads, config.head_dim)
        head_axes = ("heads", "head_width")
        self.table = parameter(rngs, (MODULATIONS, *width), (None, "embed"), dtype, init=width[0] ** -0.5)
        self.qkv = Linear(
            width, (3, *heads), axes_in=("embed",), axes_out=(None, *head_axes), dtype=dtype, rngs=rngs, storable=True
        )
        self.q_norm = parameter(rngs, (config.head_dim,), ("head_width",), dtype)
        self.k_norm = parameter(rngs, (config.head_dim,), ("head_width",), dtype)
        self.out = Linear(heads, width, axes_in=head_axes, axes_out=("embed",), dtype=dtype, rngs=rngs, storable=True)
        self.up = Linear(
            width, (config.mlp_dim,), axes_in=("embed",), axes_out=("mlp",), dtype=dtype, rngs=rngs, storable=True
        )
        self.down = Linear(
            (config.mlp_dim,), width, axes_in=("mlp",), axes_out=("embed",), dtype=dtype, rngs=rngs, storable=True
        )

    def modulation(self, temb: Float[Array, "B 6 D"]) -> list[Float[Array, "B D"]]:
        """Return shift, scale, gate of the attention and shift, scale, gate of the MLP, in float32."""
        modulation = self.table[...].astype(FLOAT32) + temb.astype(FLOAT32)
        return [modulation[:, n] for n in range(MODULATIONS)]

    @property
    def scales(self) -> tuple[Float[Array, " H"], Float[Array, " H"]]:
        """The weights of the query norm and of the key norm."""
        return self.q_norm[...], self.k_norm[...]

    def mlp(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """Two linear maps with a tanh-approximated GELU between."""
        hidden = constrain(self.up(x), "batch", "sequence", "mlp")
        return self.down(nnx.gelu(hidden, approximate=True))

    def finish(
        self, x: Float[Array, "B L D"], attended: Float[Array, "B L N H"], modulation: list[Float[Array, "B D"]]
    ) -> Float[Array, "B L D"]:
        """Add what attention brought, then the MLP."""
        _, _, gate1, shift2, scale2, gate2 = modulation
        x, y = residual_gate_layer_norm_scale_shift(x, self.out(attended), gate1, scale2, shift2)
        return constrain(residual_gate(x, self.mlp(y), gate2), "batch", "sequence", "embed")


class Block(nnx.Module):
    """A double-stream block: modulated norms, joint attention over [image, text], gated residuals, MLPs."""

    def __init__(self, config: JoyImageConfig, *, dtype: DTypeLike, rngs: nnx.Rngs | None):
        self.img = Stream(config, dtype=dtype, rngs=rngs)
        self.txt = Stream(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, img: Float[Array, "B I D"], txt: Float[Array, "B J D"], temb: Float[Array, "B 6 D"], layout: Layout
    ) -> tuple[Float[Array, "B I D"], Float[Array, "B J D"]]:
        """Return both streams, updated."""
        img_mod, txt_mod = self.img.modulation(temb), self.txt.modulation(temb)
        img_qkv = self.img.qkv(layer_norm_scale_shift(img, img_mod[1], img_mod[0]))
        txt_qkv = self.txt.qkv(layer_norm_scale_shift(txt, txt_mod[1], txt_mod[0]))
        img_found, txt_found = joint_attention(img_qkv, txt_qkv, self.img.scales, self.txt.scales, layout)
        return self.img.finish(img, img_found, img_mod), self.txt.finish(txt, txt_found, txt_mod)

    def last(
        self,
        img: Float[Array, "B I D"],
        txt: Float[Array, "B J D"],
        temb: Float[Array, "B 6 D"],
        layout: Layout,
        targets: int,
    ) -> Float[Array, "B T D"]:
        """Return the first `targets` image tokens only; everything else is asked for keys and values, no more."""
        img_mod, txt_mod = self.img.modulation(temb), self.txt.modulation(temb)
        img_normed = layer_norm_scale_shift(img, img_mod[1], img_mod[0])
        txt_normed = layer_norm_scale_shift(txt, txt_mod[1], txt_mod[0])
        img_kv, txt_kv = self.img.qkv(img_normed, 1), self.txt.qkv(txt_normed, 1)
        target = functools.partial(leading_tokens, size=targets, devices=layout.mesh.devices)
        cos, sin = layout.img_rotation
        query = self.img.qkv(target(img_normed), 0, 1)[:, :, 0]
        query = norm_rope(query, self.img.scales[0], (target(cos), target(sin)))
        found, _ = joint_attention(img_kv, txt_kv, self.img.scales, self.txt.scales, layout, query)
        return self.img.finish(target(img), found, img_mod)


@dataclasses.dataclass(frozen=True)
class FirstBlockOutput:
    """A pass of the transformer after its embeddings and its first block.

    `before` and `img` are the image tokens before and after that block; `targets` counts the target's, with padding.
    """

    before: Float[Array, "B I D"]
    img: Float[Array, "B I D"]
    txt: Float[Array, "B J D"]
    temb: Float[Array, "B 6 D"]
    layout: Layout
    targets: int

    def target(self) -> Float[Array, "B U D"]:
        """Return the target's tokens after the first block."""
        return leading_tokens(self.img, size=self.targets, devices=self.layout.mesh.devices)

    def target_before(self) -> Float[Array, "B U D"]:
        """Return the target's tokens before the first block."""
        return leading_tokens(self.before, size=self.targets, devices=self.layout.mesh.devices)


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
        self.blocks = nnx.List([Block(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)])
        self.out = linear(width, (config.out_channels * config.patch_area,), ("embed", "patch"), dtype)

    def __call__(
        self, latents: Float[Array, "B T P"], timestep: Float[Array, " B"], condition: Condition
    ) -> Float[Array, "B T P"]:
        """Return the velocity of the target's tokens, in float32; `timestep` is 1000·sigma.

        On a mesh, the devices that share a batch must divide B; those that share a sequence need not divide anything.
        """
        return self.head(self.remaining_blocks(self.first_block(latents, timestep, condition)))[:, : latents.shape[1]]

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
            img, txt = block(img, txt, temb, layout)
        return FirstBlockOutput(before, img, txt, temb, layout, targets)

    def remaining_blocks(self, first_output: FirstBlockOutput) -> Float[Array, "B U D"]:
        """Run all other blocks; return the target's tokens, with padding."""
        img, txt = first_output.img, first_output.txt
        for block in self.blocks[1:-1]:
            img, txt = block(img, txt, first_output.temb, first_output.layout)
        return self.blocks[-1].last(img, txt, first_output.temb, first_output.layout, first_output.targets)

    def head(self, tokens: Float[Array, "B U D"]) -> Float[Array, "B U P"]:
        """Return the velocity of what the last block gave, in float32."""
        return self.out(layer_norm(tokens)).astype(FLOAT32)

    def _embed_text(self, txt: Float[Array, "B J C"]) -> Float[Array, "B J D"]:
        return self.txt_hidden(nnx.gelu(self.txt_in(txt), approximate=True))

    def _embed_time(self, timestep: Float[Array, " B"]) -> Float[Array, "B 6 D"]:
        temb = self.time_hidden(nnx.silu(self.time_in(timestep_embedding(timestep, TIME_CHANNELS))))
        return self.time_out(nnx.silu(temb))

    def _lay_out(
        self, latents: Float[Array, "B T P"], condition: Condition, mesh: SequenceMesh
    ) -> tuple[Layout, Float[Array, "B I P"]]:
        """Spread all tokens over the devices; return where they lie, and those of target and references."""
        config, n, positions = self.config, mesh.devices, condition.positions
        rows, targets = latents.shape[:2]
        references, texts = condition.references.shape[1], condition.txt.shape[1]
        txt_rotation = None
        if config.rope_type == "mrope":  # text goes on where the largest image index ends, on all three axes alike
            start = jnp.max(positions, axis=(1, 2)) + 1
            txt_positions = (start[:, None] + jnp.arange(texts, dtype=positions.dtype))[:, :, None]
            txt_positions = pad_to_devices(jnp.tile(txt_positions, 3), n)
            txt_rotation = rotation_by_blocks(txt_positions, config.rope_dim_list, config.theta)
        target_lengths = lengths_on_devices(condition.target_lengths, targets, rows, n)
        reference_lengths = lengths_on_devices(condition.reference_lengths, references, rows, n)
        tokens, places = (
            join_on_devices(pad_to_devices(first, n), pad_to_devices(second, n), target_lengths, mesh)
            for first, second in (
                (latents, condition.references),
                # Every device cuts out its own part; left to itself, XLA spreads them before they are told apart.
                [constrain(part, "batch", None, None) for part in jnp.split(positions, [targets], axis=1)],
            )
        )
        layout = Layout(
            mesh,
            rotation_by_blocks(places, config.rope_dim_list, config.theta),
            txt_rotation,
            add_lengths(target_lengths, -(-targets // n), reference_lengths, -(-references // n)),
            lengths_on_devices(condition.txt_lengths, texts, rows, n),
        )
        return layout, tokens
