"""From projections to attention: RMS norm over each head, rotary embedding, and the joint buffer of two streams.

`implementation`: "reference", left to XLA; "mosaic" or "triton", one kernel (qk_norm_rope_pallas.py); None, by the rule
in dispatch.py. A kernel takes one device's arrays: under a mesh, call it inside `on_shards`.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from joyjax.dtypes import FLOAT32
from joyjax.kernels import qk_norm_rope_pallas
from joyjax.kernels.dispatch import pallas, with_gradient_of
from joyjax.kernels.joint import join

Rotation = tuple[Float[Array, "B _ P"], Float[Array, "B _ P"]]  # cos and sin, P = H/2
Implementation = Literal["reference", "mosaic", "triton"] | None


def qk_norm_rope(
    img: Float[Array, "B I C N H"],
    txt: Float[Array, "B J C N H"],
    img_scales: tuple[Float[Array, " H"], Float[Array, " H"]],
    txt_scales: tuple[Float[Array, " H"], Float[Array, " H"]],
    img_rotation: Rotation,
    txt_rotation: Rotation | None = None,
    *,
    img_lengths: Int[Array, " B"] | None = None,
    eps: float = 1e-6,
    implementation: Implementation = None,
) -> tuple[Float[Array, "B I+J N H"], ...]:
    """Return queries, keys and values of both streams, each in one buffer with the image in front.

    The axis C of `img` and `txt` holds queries, keys and values, or keys and values alone; as many buffers come back.
    Scales are those of queries and of keys. Values are neither normalised nor rotated; text is rotated only where
    `txt_rotation` is given. `img_lengths`: valid image tokens of each row, with the text right behind them.
    """
    backend = pallas("qk_norm_rope", implementation)

    def reference(
        img: Array,
        txt: Array,
        img_scales: tuple[Array, Array],
        txt_scales: tuple[Array, Array],
        img_rotation: Rotation,
        txt_rotation: Rotation | None,
        lengths: Array | None,
    ) -> tuple[Array, ...]:
        normed = 2 if img.shape[2] == 3 else 1  # how many of the parts are queries or keys
        out = []
        for part in range(img.shape[2]):
            first, second = img[:, :, part], txt[:, :, part]
            if part < normed:
                which = part + 2 - normed
                first = norm_rope(first, img_scales[which], img_rotation, eps=eps)
                second = norm_rope(second, txt_scales[which], txt_rotation, eps=eps)
            out.append(join(first, second, lengths))
        return tuple(out)

    def kernel(
        img: Array,
        txt: Array,
        img_scales: tuple[Array, Array],
        txt_scales: tuple[Array, Array],
        img_rotation: Rotation,
        txt_rotation: Rotation | None,
        lengths: Array | None,
    ) -> tuple[Array, ...]:
        scales = jnp.stack(img_scales), jnp.stack(txt_scales)
        out = qk_norm_rope_pallas.qk_norm_rope(
            img, txt, *scales, img_rotation, txt_rotation, lengths, backend=str(backend), eps=eps
        )
        return tuple(out)

    run = reference if backend is None else with_gradient_of(reference, kernel)
    return run(img, txt, img_scales, txt_scales, img_rotation, txt_rotation, img_lengths)


def norm_rope(
    x: Float[Array, "B L N H"], scale: Float[Array, " H"], rotation: Rotation | None, *, eps: float = 1e-6
) -> Float[Array, "B L N H"]:
    """RMS-normalise each head and rotate its channel pairs (0, 1), (2, 3), …; round once, at the end."""
    y = x.astype(FLOAT32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps) * scale.astype(FLOAT32)
    if rotation is not None:
        cos, sin = rotation[0][:, :, None, :], rotation[1][:, :, None, :]
        pairs = y.reshape(*y.shape[:-1], -1, 2)
        even, odd = pairs[..., 0], pairs[..., 1]
        y = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(y.shape)
    return y.astype(x.dtype)
