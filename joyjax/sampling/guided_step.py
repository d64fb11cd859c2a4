"""The jitted stages of an edit: prompt, references, one step of denoising, and decoding.

Each is a pure function of weights and arrays, compiled once for each shape. They call the networks by what every
family's networks share, and they compose: all of them inside one `jax.jit` are one program from arrays to pixels.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from joyjax.kernels.joint import join
from joyjax.layers.patch import patchify, pixels_to_unit, unpatchify
from joyjax.layers.valid_region import ValidRegion
from joyjax.layers.weights import Weights
from joyjax.models.autoencoder.buckets import Placement, gather_tokens, scatter_tokens, transpose_kernels
from joyjax.models.autoencoder.tiling import Mode
from joyjax.sampling.euler import euler_step
from joyjax.sampling.guidance import guide
from joyjax.sharding.place import constrain, devices_along


@functools.partial(jax.jit, static_argnames="length")
def encode_prompt(
    text_encoder: Weights, text: Any, vision: Any, first: Int[Array, " B"], *, length: int
) -> Float[Array, "B J C"]:
    """Return `length` hidden states of each row, from token `first` on; what lies behind a row's end is padding.

    `text` and `vision` are the text encoder's own inputs; vision is None where no picture goes with the prompt.
    """
    hidden = text_encoder.module()(text, vision)
    index = jnp.minimum(first[:, None] + jnp.arange(length, dtype=first.dtype), hidden.shape[1] - 1)
    return jnp.take_along_axis(hidden, index[:, :, None], axis=1)


@functools.partial(jax.jit, static_argnames=("patch", "mode"))
def encode_images(
    vae: Weights,
    pixels: UInt8[Array, "b h w 3"],
    place: Placement | None = None,
    *,
    patch: tuple[int, int],
    mode: Mode = "exact",
) -> Float[Array, "b L P"]:
    """Return the latent tokens of pictures of one size: the mode of the posterior, normalised, float32.

    With a place, the pictures lie on a canvas (`pad_to_bucket`), and zeros follow their tokens.
    """
    if place is None:
        tokens = patchify(vae.module().encode(pixels_to_unit(pixels), mode), patch)
    else:
        latents = transpose_kernels(vae, place.flip).module().encode(pixels_to_unit(pixels), mode, place.size)
        tokens = gather_tokens(latents, place, patch)
    return constrain(tokens, None, None, None)


@functools.partial(jax.jit, static_argnames="size")
def join_tokens(
    tokens: Sequence[Float[Array, "b _ P"]], lengths: Sequence[Int[Array, ""]], *, size: int
) -> Float[Array, "b size P"]:
    """Put tokens of several pictures behind one another, the valid ones of each, `size` in all with padding."""
    joined, end = tokens[0], jnp.asarray(lengths[0])
    for more, length in zip(tokens[1:], lengths[1:], strict=True):
        joined, end = join(joined, more, jnp.broadcast_to(end, joined.shape[:1])), end + length
    room = size - joined.shape[1]
    return jnp.pad(joined, ((0, 0), (0, room), (0, 0))) if room > 0 else joined[:, :size]


@jax.jit
def batch(conditions: Sequence[Any]) -> Any:
    """Put the conditions of several edits together: rows are all first passes, then all second ones.

    Sequences are padded to the longest, so edits may have other numbers of references.
    """
    passes = conditions[0].txt.shape[0]

    def stack(*parts: Array) -> Array:
        longest = max((part.shape[1] for part in parts if part.ndim > 1), default=0)
        rows = [
            jnp.pad(part, [(0, longest - part.shape[1] if axis == 1 else 0) for axis in range(part.ndim)])
            for part in parts
        ]
        joined = jnp.stack(rows, axis=1)  # every edit has one row of each pass
        return joined.reshape(passes * len(parts), *joined.shape[2:])

    return jax.tree.map(stack, *conditions)


@jax.jit
def conditional_only(condition: Any) -> Any:
    """Return the conditional rows of a condition for two passes."""
    return jax.tree.map(lambda rows: rows[rows.shape[0] // 2 :], condition)


@functools.partial(jax.jit, donate_argnames="latents", static_argnames="channels")
def denoise_step(
    transformer: Weights,
    latents: Float[Array, "b T P"],
    condition: Any,
    sigma: Float[Array, ""],
    sigma_next: Float[Array, ""],
    timestep: Float[Array, ""],
    guidance_scale: Float[Array, "..."],
    *,
    channels: int,
) -> Float[Array, "b T P"]:
    """Take one step from `sigma` to `sigma_next`. The latents are donated: use the result in their place.

    `condition` is the transformer's own input, with as many rows as the latents, or twice as many for guidance: all
    unconditional rows, then all conditional ones. `channels` is the number of latent channels of a pixel. Every edit
    of a batch has its own `guidance_scale`; a single number is that of all.
    """
    passes, rows, condition = expand_for_cfg(latents, condition)
    velocity = transformer.module()(rows, jnp.broadcast_to(timestep, rows.shape[:1]), condition)
    return guided_step(latents, velocity, sigma, sigma_next, guidance_scale, passes=passes, channels=channels)


def expand_for_cfg(latents: Float[Array, "b T P"], condition: Any) -> tuple[int, Float[Array, "B T P"], Any]:
    """Return the passes of each edit, two with guidance, and what the network is given for them.

    That is the latents once for each pass, and rows enough for the devices to divide.
    """
    passes = condition.txt.shape[0] // latents.shape[0]
    return passes, *pad_batch((jnp.tile(latents, (passes, 1, 1)), condition), passes)


def guided_step(
    latents: Float[Array, "b T P"],
    velocity: Float[Array, "B T P"],
    sigma: Float[Array, ""],
    sigma_next: Float[Array, ""],
    guidance_scale: Float[Array, "..."],
    *,
    passes: int,
    channels: int,
) -> Float[Array, "b T P"]:
    """Return the latents at `sigma_next` from what the network predicted for all rows."""
    velocity = velocity.reshape(passes, -1, *velocity.shape[1:])[:, : latents.shape[0]]
    velocity = guide(velocity, guidance_scale, channels) if passes == 2 else velocity[0]
    return constrain(euler_step(latents, velocity, sigma, sigma_next), None, None, None)


def pad_batch(arrays: Any, passes: int) -> Any:
    """Repeat the last row of each pass until the devices that share a batch divide all rows; without a mesh, never."""
    devices = devices_along("batch")

    def fill(x: Array) -> Array:
        count = x.shape[0] // passes
        more = next(more for more in range(devices) if (count + more) * passes % devices == 0)
        if not more:
            return x
        rows = x.reshape(passes, count, *x.shape[1:])
        rows = jnp.concatenate([rows, jnp.repeat(rows[:, -1:], more, axis=1)], axis=1)
        return rows.reshape(passes * (count + more), *x.shape[1:])

    return jax.tree.map(fill, arrays)


@functools.partial(jax.jit, static_argnames=("patch", "width", "mode", "canvas"))
def decode_latents(
    vae: Weights,
    latents: Float[Array, "b T P"],
    place: Placement | None = None,
    *,
    patch: tuple[int, int],
    width: int | None = None,
    mode: Mode = "exact",
    canvas: tuple[int, int] | None = None,
) -> tuple[UInt8[Array, "b h w 3"], Bool[Array, " b"]]:
    """Return the pictures of latent tokens that lie `width` patches wide, and which of them are finite numbers.

    With a place, whatever follows a picture's tokens is padding, and the pictures come on a canvas of so many rows and
    columns of pixels (`crop_from_bucket`). Values are rounded half to even. A number that is not finite would come out
    black.
    """
    if place is None and width is not None and canvas is None:
        pixels = vae.module().decode(unpatchify(latents, patch, width), mode)
    elif place is not None and width is None and canvas is not None:
        network = transpose_kernels(vae, place.flip).module()
        factor = network.config.spatial_factor
        on_canvas = scatter_tokens(latents, place, patch, canvas[1] // (patch[1] * factor))
        pixels = ValidRegion(place.size, canvas).cut(network.decode(on_canvas, mode, place.size // factor))
    else:
        raise ValueError("pictures have a `place` and its `canvas`, or else a `width`")
    finite = constrain(jnp.all(jnp.isfinite(pixels), axis=(1, 2, 3)), None)
    drawn = jnp.round(jnp.clip(pixels / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8)
    return constrain(drawn, None, None, None, None), finite
