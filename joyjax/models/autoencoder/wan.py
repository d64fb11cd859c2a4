"""The Wan 2.1 variational autoencoder, for pictures: pixels to latents an eighth as high and as wide, and back.

The network is made for video. Its convolutions are causal in time, with zeros before the first frame. One frame
therefore uses only the last temporal slice of each kernel, which is a two-dimensional convolution. The temporal
resampling skips the first frame and is left out.
Source: autoencoder_kl_wan.py in Diffusers.
"""

import dataclasses
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
from joyjax.kernels.attention import attention
from joyjax.layers.conv import Conv
from joyjax.layers.norm import ChannelNorm
from joyjax.layers.valid_region import ValidRegion
from joyjax.models.autoencoder.tiling import TILE, Mode, apply
from joyjax.sharding.place import constrain

COLORS, WITH_ALPHA = 3, 4  # channels of pictures
LOG_VARIANCE = (-30.0, 20.0)  # bounds, as in DiagonalGaussianDistribution


@dataclasses.dataclass(frozen=True)
class WanVAEConfig:
    """The autoencoder's config.json. `temperal_downsample` is spelt like that there; one frame does not need it.

    `input_channels` are those of a picture, in and out: 3, or 4 with alpha. Only Qwen-Image's class of this network has
    the key.
    """

    base_dim: int
    z_dim: int
    dim_mult: tuple[int, ...]
    num_res_blocks: int
    temperal_downsample: tuple[bool, ...]
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]
    input_channels: int = COLORS

    @classmethod
    def from_diffusers(cls, raw: Mapping[str, Any], where: str = "vae/config.json") -> "WanVAEConfig":
        """Read the json object; raises ConfigError for what this network does not implement."""
        channels = raw.get("input_channels", COLORS)
        config = read_config(
            cls,
            raw,
            where=where,
            optional={"input_channels": COLORS},
            fixed={
                "in_channels": (channels,),
                "out_channels": (channels,),
                "decoder_base_dim": (None, raw.get("base_dim")),
                "attn_scales": ([],),
                "is_residual": (False,),
                "patch_size": (None,),
            },
            ignored=("dropout", "scale_factor_spatial", "scale_factor_temporal"),
        )
        if config.input_channels not in (COLORS, WITH_ALPHA):
            raise ConfigError(
                f"{where}: input_channels is {config.input_channels}; this version of joyjax implements {COLORS} and "
                f"{WITH_ALPHA}"
            )
        if not config.dim_mult or min(config.base_dim, config.z_dim, config.num_res_blocks, *config.dim_mult) < 1:
            raise ConfigError(f"{where}: base_dim, z_dim, num_res_blocks and every dim_mult must be positive")
        if len(config.temperal_downsample) != len(config.dim_mult) - 1:
            raise ConfigError(
                f"{where}: temperal_downsample has {len(config.temperal_downsample)} values; expected one for each "
                f"step between the {len(config.dim_mult)} levels of dim_mult"
            )
        for name in ("latents_mean", "latents_std"):
            if len(getattr(config, name)) != config.z_dim:
                raise ConfigError(
                    f"{where}: {name} has {len(getattr(config, name))} values; expected z_dim, {config.z_dim}"
                )
        if not all(std > 0 for std in config.latents_std):
            raise ConfigError(f"{where}: latents_std is {list(config.latents_std)}; expected positive numbers")
        steps = {"spatial": len(config.temperal_downsample), "temporal": sum(config.temperal_downsample)}
        for name, halvings in steps.items():
            key, factor = f"scale_factor_{name}", 2**halvings
            if raw.get(key, factor) != factor:
                raise ConfigError(f"{where}: {key} is {raw[key]!r}; dim_mult and temperal_downsample make it {factor}")
        return config

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, from the pixels inwards."""
        return tuple(self.base_dim * multiple for multiple in self.dim_mult)

    @property
    def spatial_factor(self) -> int:
        """Pixels along each side of a latent pixel."""
        return 2 ** (len(self.dim_mult) - 1)


class ResBlock(nnx.Module):
    """Two times norm, SiLU and 3×3 convolution, plus the input, through a 1×1 convolution where the width changes."""

    def __init__(self, width_in: int, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs | None):
        self.norm1 = ChannelNorm(width_in, axis="conv_in", dtype=dtype, rngs=rngs)
        self.conv1 = Conv(width_in, width, 3, dtype=dtype, rngs=rngs)
        self.norm2 = ChannelNorm(width, axis="conv_in", dtype=dtype, rngs=rngs)
        self.conv2 = Conv(width, width, 3, dtype=dtype, rngs=rngs)
        self.shortcut = Conv(width_in, width, 1, dtype=dtype, rngs=rngs) if width_in != width else None

    def __call__(self, x: Float[Array, "b h w c"], region: ValidRegion | None = None) -> Float[Array, "b h w d"]:
        """Return the picture at the same size."""
        y = self.conv1(_silu(self.norm1(x)), region)
        y = self.conv2(_silu(self.norm2(y)), region)
        return y + (x if self.shortcut is None else self.shortcut(x))


class Upsample(nnx.Module):
    """Repeats every pixel 2×2, then a 3×3 convolution that halves the channels."""

    def __init__(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs | None):
        self.conv = Conv(width, width // 2, 3, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"], region: ValidRegion | None = None) -> Float[Array, "b 2*h 2*w d"]:
        """Return the picture at twice the size."""
        return self.conv(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2), region)


def downsample(width: int, *, dtype: DTypeLike, rngs: nnx.Rngs | None) -> Conv:
    """Return a 3×3 convolution that halves the size; its windows reach past the bottom and right edges only."""
    return Conv(width, width, 3, stride=2, padding=((0, 1), (0, 1)), dtype=dtype, rngs=rngs)


class PixelAttention(nnx.Module):
    """Every pixel attends to every pixel, with one head as wide as the channels; the input is added."""

    def __init__(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs | None):
        self.norm = ChannelNorm(width, axis="conv_in", dtype=dtype, rngs=rngs)
        self.qkv = Conv(width, 3 * width, 1, dtype=dtype, rngs=rngs)
        self.out = Conv(width, width, 1, dtype=dtype, rngs=rngs)

    @jax.named_scope("attention")
    def __call__(self, x: Float[Array, "b h w c"], region: ValidRegion | None = None) -> Float[Array, "b h w c"]:
        """Return the picture at the same size."""
        b, h, w, c = x.shape
        pixels, lengths = x, None
        if region is not None:
            rows, columns = region.valid_size(x)
            pixels, lengths = region.compact(x), jnp.full(b, rows * columns)
        qkv = self.qkv(self.norm(pixels)).reshape(b, h * w, 3, 1, c)
        mixed = attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], lengths=lengths)
        mixed = self.out(mixed.reshape(x.shape))
        return x + (mixed if region is None else region.expand(mixed))


class Middle(nnx.Module):
    """The blocks of both halves at the lowest resolution."""

    def __init__(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs | None):
        self.before = ResBlock(width, width, dtype=dtype, rngs=rngs)
        self.attention = PixelAttention(width, dtype=dtype, rngs=rngs)
        self.after = ResBlock(width, width, dtype=dtype, rngs=rngs)

    @jax.named_scope("middle")
    def __call__(self, x: Float[Array, "b h w c"], region: ValidRegion | None = None) -> Float[Array, "b h w c"]:
        """Return the picture at the same size."""
        return _by_rows(self.after(self.attention(self.before(x, region), region), region))


class Encoder(nnx.Module):
    """Pixels to the mean and log variance of the latents."""

    def __init__(self, config: WanVAEConfig, *, dtype: DTypeLike, rngs: nnx.Rngs | None):
        width, blocks = config.base_dim, nnx.List([])
        self.conv_in = Conv(config.input_channels, width, 3, dtype=dtype, rngs=rngs)
        for level, level_width in enumerate(config.widths):
            if level > 0:
                blocks.append(downsample(width, dtype=dtype, rngs=rngs))
            for _ in range(config.num_res_blocks):
                blocks.append(ResBlock(width, level_width, dtype=dtype, rngs=rngs))
                width = level_width
        self.blocks = blocks
        self.middle = Middle(width, dtype=dtype, rngs=rngs)
        self.norm_out = ChannelNorm(width, axis="conv_in", dtype=dtype, rngs=rngs)
        self.conv_out = Conv(width, 2 * config.z_dim, 3, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"], region: ValidRegion | None = None) -> Float[Array, "b y x z"]:
        """Return `[b, h/8, w/8, 2·z_dim]`: all the means, then all the log variances."""
        x = _by_rows(self.conv_in(x, region))
        for number, block in enumerate(self.blocks):
            with jax.named_scope(f"block_{number}"):
                x = _by_rows(block(x, region))
        return self.conv_out(_silu(self.norm_out(self.middle(x, region))), region)


class Decoder(nnx.Module):
    """Latents to pixels: the encoder's levels in reverse, each with one residual block more."""

    def __init__(self, config: WanVAEConfig, *, dtype: DTypeLike, rngs: nnx.Rngs | None):
        width, blocks = config.widths[-1], nnx.List([])
        self.conv_in = Conv(config.z_dim, width, 3, dtype=dtype, rngs=rngs)
        self.middle = Middle(width, dtype=dtype, rngs=rngs)
        for level, level_width in enumerate(reversed(config.widths)):
            if level > 0:
                blocks.append(Upsample(width, dtype=dtype, rngs=rngs))
                width = width // 2
            for _ in range(config.num_res_blocks + 1):
                blocks.append(ResBlock(width, level_width, dtype=dtype, rngs=rngs))
                width = level_width
        self.blocks = blocks
        self.norm_out = ChannelNorm(width, axis="conv_in", dtype=dtype, rngs=rngs)
        self.conv_out = Conv(width, config.input_channels, 3, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b y x z"], region: ValidRegion | None = None) -> Float[Array, "b h w c"]:
        """Return `[b, 8·y, 8·x, input_channels]`."""
        x = self.middle(_by_rows(self.conv_in(x, region)), region)
        for number, block in enumerate(self.blocks):
            with jax.named_scope(f"block_{number}"):
                x = _by_rows(block(x, region))
        return self.conv_out(_silu(self.norm_out(x)), region)


class WanVAE(nnx.Module):
    """Both halves, with the latents normalised channel by channel as the transformer expects.

    `size`, for mode `exact` only: valid rows and columns at the top left of the input, in its own pixels; traced.
    Padding never changes the result there; elsewhere it is undefined.
    """

    def __init__(self, config: WanVAEConfig, *, dtype: DTypeLike, rngs: nnx.Rngs | None):
        self.config = config
        self.encoder = Encoder(config, dtype=dtype, rngs=rngs)
        self.quant = Conv(2 * config.z_dim, 2 * config.z_dim, 1, dtype=dtype, rngs=rngs)
        self.post_quant = Conv(config.z_dim, config.z_dim, 1, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(config, dtype=dtype, rngs=rngs)

    def encode(
        self, pixels: Float[Array, "b h w c"], mode: Mode = "exact", size: Int[Array, " 2"] | None = None
    ) -> Float[Array, "b y x z"]:
        """Return the posterior's mode for pixels in [-1, 1], normalised, in float32. Sizes are multiples of 8."""
        mean, _ = self.moments(pixels, mode, size)
        return (mean - jnp.array(self.config.latents_mean, FLOAT32)) / jnp.array(self.config.latents_std, FLOAT32)

    def decode(
        self, latents: Float[Array, "b y x z"], mode: Mode = "exact", size: Int[Array, " 2"] | None = None
    ) -> Float[Array, "b h w c"]:
        """Return the pixels of normalised latents, clamped to [-1, 1], in float32."""
        latents = latents.astype(FLOAT32) * jnp.array(self.config.latents_std, FLOAT32)
        latents = latents + jnp.array(self.config.latents_mean, FLOAT32)

        def decode(latents: Float[Array, "b y x z"]) -> Float[Array, "b h w c"]:
            return self.decode_raw(latents, size)

        _check_mode(mode, size)
        return jnp.clip(apply(decode, latents, mode, (TILE // self.config.spatial_factor, TILE)), -1, 1)

    def moments(
        self, pixels: Float[Array, "b h w c"], mode: Mode = "exact", size: Int[Array, " 2"] | None = None
    ) -> tuple[Float[Array, "b y x z"], Float[Array, "b y x z"]]:
        """Return mean and log variance of the posterior, not normalised, in float32."""

        def encode(pixels: Float[Array, "b h w c"]) -> Float[Array, "b y x d"]:
            pixels = pixels.astype(self.quant.kernel.dtype)
            return self.quant(self.encoder(pixels, _region(pixels, size))).astype(FLOAT32)

        _check_mode(mode, size)
        moments = apply(encode, pixels, mode, (TILE, TILE // self.config.spatial_factor))
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(log_variance, *LOG_VARIANCE)

    def decode_raw(
        self, latents: Float[Array, "b y x z"], size: Int[Array, " 2"] | None = None
    ) -> Float[Array, "b h w c"]:
        """Return the pixels, not clamped, of latents that are not normalised, in float32; for training."""
        latents = latents.astype(self.post_quant.kernel.dtype)
        return self.decoder(self.post_quant(latents), _region(latents, size)).astype(FLOAT32)


def _region(x: Float[Array, "b h w c"], size: Int[Array, " 2"] | None) -> ValidRegion | None:
    return None if size is None else ValidRegion(size, (x.shape[1], x.shape[2]))


def _check_mode(mode: Mode, size: Int[Array, " 2"] | None) -> None:
    if size is not None and mode != "exact":
        raise ValueError(f"mode {mode!r} takes whole pictures; expected 'exact' where `size` is given")


def _silu(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    # Every bfloat16 operation rounds: SiLU in bfloat16 makes the encoder's error 5 % larger.
    return nnx.silu(x.astype(FLOAT32)).astype(x.dtype)


def _by_rows(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    return constrain(x, "picture", "height", "width", "conv_out")
