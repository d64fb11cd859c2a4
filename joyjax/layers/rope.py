"""Rotary position embeddings (Su et al., 2021): tables of angles, and the rotation of half-split channel pairs.

A rotation is a pair `(cos, sin)` of float32 arrays `[B, L, H/2]`, one angle for each pair of channels, the same for all
heads. The diffusion transformer pairs channels (0, 1), (2, 3), … (kernels/qk_norm_rope.py); Qwen3-VL pairs channel i
with channel i + H/2.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from joyjax.dtypes import FLOAT32
from joyjax.kernels.qk_norm_rope import Rotation


def inverse_frequencies(channels: int, theta: float) -> np.ndarray:
    """Return `theta^(-2i/channels)` for i below channels/2, in float32."""
    exponent = np.arange(0, channels, 2, dtype=np.float32) / np.float32(channels)
    return np.float32(1) / np.power(np.float32(theta), exponent)


def rotation_by_blocks(positions: Int[Array, "B L A"], channels: Sequence[int], theta: float) -> Rotation:
    """Give each position axis its own block of channels, each with the full range of frequencies.

    `channels` are the block widths, one per axis; their sum is the head width.
    Source: get_rotary_pos_embed in Diffusers' transformer_joyimage.py.
    """
    angles = [
        positions[..., axis, None].astype(FLOAT32) * inverse_frequencies(width, theta)
        for axis, width in enumerate(channels)
    ]
    angle = jnp.concatenate(angles, axis=-1)
    return jnp.cos(angle), jnp.sin(angle)


def rotation_by_frequency(positions: Int[Array, "B L A"], axis_of: Sequence[int], theta: float) -> Rotation:
    """Share one range of frequencies among the position axes: frequency i uses axis `axis_of[i]`.

    Source: Qwen3VLTextRotaryEmbedding in Transformers' modeling_qwen3_vl.py.
    """
    chosen = positions[..., np.asarray(axis_of)].astype(FLOAT32)
    angle = chosen * inverse_frequencies(2 * len(axis_of), theta)
    return jnp.cos(angle), jnp.sin(angle)


def rotate_half_split(x: Float[Array, "B L N H"], rotation: Rotation) -> Float[Array, "B L N H"]:
    """Rotate channel i with channel i + H/2; float32 inside and out."""
    cos, sin = rotation[0][:, :, None, :], rotation[1][:, :, None, :]
    first, second = jnp.split(x.astype(FLOAT32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
