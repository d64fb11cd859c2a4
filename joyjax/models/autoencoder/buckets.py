"""Two padded buckets for all sizes of a table, so that the autoencoder compiles twice for a table, not for each size.

A picture is padded on the right and at the bottom to the smaller bucket that holds it. Both buckets are at least as
high as wide; a landscape picture is transposed, and so are the network's kernels. Padding never changes the result
(`joyjax/layers/valid_region.py`). It costs time: for JoyImage's table at 1024 the buckets have 1280 × 1024 and
2048 × 768 pixels. That is 1.25 times the pixels of a square and 1.30 times those of the size for 3:2, at most 1.71
times (1792 × 512), and 1.50 times on average over the 49 sizes.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int, UInt8

from joyjax.layers.patch import patchify, unpatchify
from joyjax.layers.weights import Weights
from joyjax.media.image import Size

LONG = 1.25  # times the side of the table's square: pictures with a longer side have the second bucket


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["size", "flip", "count", "patches", "tokens"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a picture is in its bucket. All fields are arrays, so every picture of a bucket shares a program.

    `size`: valid rows and columns of the bucket, in pixels. `flip`: the picture is transposed. Token n of the picture's
    `count` tokens is the bucket's patch `patches[n]`, and patch m is token `tokens[m]`, both counted row by row;
    padding has index 0. L is the largest number of tokens of a picture of the table.
    """

    size: Int[Any, " 2"]
    flip: Bool[Any, ""]
    count: Int[Any, ""]
    patches: Int[Any, " L"]
    tokens: Int[Any, " M"]


def padded_sizes(table: tuple[Size, ...]) -> tuple[Size, ...]:
    """Return height and width of the padded buckets of a table: one for its longest pictures, one for the others."""
    sides = [(max(size), min(size)) for size in table]
    groups = [[pair for pair in sides if _is_long(pair, table) is long] for long in (False, True)]
    return tuple((max(long for long, _ in group), max(short for _, short in group)) for group in groups if group)


def _is_long(size: Size, table: tuple[Size, ...]) -> bool:
    """Return whether a size belongs to the long bucket, by the side of the table's square."""
    return max(size) > LONG * max(map(min, table))


def bucket_placement(
    height: int, width: int, table: tuple[Size, ...], patch: tuple[int, int], factor: int
) -> tuple[Size, Placement] | None:
    """Return the padded bucket of a picture of this size in pixels, and the placement there.

    `patch` is in latent pixels, of which each is `factor` pixels high and wide. None: the size is not in the table, or
    patches are not square or do not divide its sides; then the picture is not padded.
    """
    side = patch[0] * factor
    if (height, width) not in table or patch[0] != patch[1] or any(length % side for size in table for length in size):
        return None
    rows, columns = max(height, width), min(height, width)
    bucket = padded_sizes(table)[_is_long((rows, columns), table)]
    across = bucket[1] // side  # patches
    in_bucket = np.arange(rows // side)[:, None] * across + np.arange(columns // side)
    order = (in_bucket.T if width > height else in_bucket).reshape(-1)  # the picture's row order
    patches = np.zeros(max(h * w for h, w in table) // side**2, np.int32)
    patches[: order.size] = order
    tokens = np.zeros(bucket[0] // side * across, np.int32)
    tokens[order] = np.arange(order.size)
    size, flip, count = np.array((rows, columns), np.int32), np.array(width > height), np.array(order.size, np.int32)
    return bucket, Placement(size, flip, count, patches, tokens)


def pad_to_bucket(pixels: UInt8[np.ndarray, "b h w c"], bucket: Size) -> UInt8[np.ndarray, "b y x c"]:
    """Transpose landscape pictures, then pad with zeros to the bucket."""
    pixels = _portrait(pixels, pixels.shape[1:3])
    padding = ((0, 0), *((0, bucket[n] - pixels.shape[1 + n]) for n in range(2)), (0, 0))
    return np.pad(pixels, padding)


def crop_from_bucket(pixels: UInt8[np.ndarray, "b y x c"], size: Size) -> UInt8[np.ndarray, "b h w c"]:
    """Undo `pad_to_bucket` for pictures of this height and width."""
    return _portrait(pixels[:, : max(size), : min(size)], size)


def _portrait(pixels: UInt8[np.ndarray, "b h w c"], size: tuple[int, ...]) -> UInt8[np.ndarray, "b y x c"]:
    """Transpose landscape images. Its own inverse."""
    return pixels.swapaxes(1, 2) if size[1] > size[0] else pixels


def transpose_kernels(network: Weights, flip: Bool[Array, ""]) -> Weights:
    """Return the network for transposed pictures if `flip`: rows and columns of its kernels are exchanged."""

    def transpose(x: Array) -> Array:
        return jnp.where(flip, x.swapaxes(0, 1), x) if x.ndim == 4 else x  # kernels: [height, width, c_in, c_out]

    return dataclasses.replace(network, state=jax.tree.map(transpose, network.state))


def gather_tokens(
    latents: Float[Array, "b y x c"], placement: Placement, patch: tuple[int, int]
) -> Float[Array, "b L P"]:
    """Return the picture's tokens from the latents of its bucket, followed by zeros."""
    tokens = _transpose_patches(patchify(latents, patch), placement, patch)
    tokens = jnp.take(tokens, placement.patches, axis=1, mode="clip")
    return jnp.where(jnp.arange(tokens.shape[1])[:, None] < placement.count, tokens, 0)


def scatter_tokens(
    tokens: Float[Array, "b T P"], placement: Placement, patch: tuple[int, int], width: int
) -> Float[Array, "b y x c"]:
    """Return the latents of a bucket that is `width` patches wide from the picture's tokens and any padding."""
    tokens = jnp.take(tokens, placement.tokens, axis=1, mode="clip")
    return unpatchify(_transpose_patches(tokens, placement, patch), patch, width)


def _transpose_patches(
    tokens: Float[Array, "b L P"], placement: Placement, patch: tuple[int, int]
) -> Float[Array, "b L P"]:
    exchanged = rearrange(tokens, "b L (q r c) -> b L (r q c)", q=patch[0], r=patch[1])
    return jnp.where(placement.flip, exchanged, tokens)
