"""Two canvases for all sizes of a bucket table, so that the autoencoder compiles twice for a table, not for each size.

A picture lies at the top left of the smaller canvas that holds it; both canvases are at least as high as wide, and a
landscape picture is transposed, as the network's kernels then are, too. The autoencoder gives what it gives for the
picture alone (`layers/valid_region.py`). The price is the padding: at 1024 the canvases have 1280 × 1024 and 2048 ×
768 pixels. That is 1.25 times the pixels of a square and 1.30 times those of the size for 3:2, at most 1.71 times
(1792 × 512), and 1.50 times on average over the 49 sizes.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int, UInt8

from joyjax.layers.patch import patchify, unpatchify
from joyjax.layers.weights import Weights
from joyjax.media.image import Size, buckets

LONG = 1.25  # of the base size: a longer side lies on the second canvas


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["size", "flip", "count", "patches", "tokens"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a picture lies on its canvas. Arrays alone: every picture of a canvas shares a program.

    `size` is in pixels: rows and columns of the canvas. `flip`: the picture's columns are the canvas's rows. Of the
    picture's `count` tokens, number n is the canvas's patch `patches[n]`, and patch m is token `tokens[m]`, both
    counted row by row; padding has index 0. L is the most tokens that a picture of the table has.
    """

    size: Int[Array, " 2"]
    flip: Bool[Array, ""]
    count: Int[Array, ""]
    patches: Int[Array, " L"]
    tokens: Int[Array, " M"]


def padded_sizes(base_size: int) -> tuple[Size, ...]:
    """Return height and width of the canvases of a table: one for its longest pictures, one for the others.

    Raises:
        RequestError: for a base size that has no table.
    """
    sides = [(max(size), min(size)) for size in buckets(base_size)]
    groups = [[pair for pair in sides if (pair[0] > LONG * base_size) is long] for long in (False, True)]
    return tuple((max(long for long, _ in group), max(short for _, short in group)) for group in groups if group)


def bucket_placement(
    height: int, width: int, base_size: int, patch: tuple[int, int], factor: int
) -> tuple[Size, Placement] | None:
    """Return the canvas of a picture of this size, height and width in pixels, and its place there.

    `patch` is in latent pixels, of which each is `factor` pixels high and wide. None: the size is not in the table, or
    patches are not square or do not fit its sides; then the picture goes through the network alone.
    """
    side = patch[0] * factor
    table = buckets(base_size)
    if (height, width) not in table or patch[0] != patch[1] or any(length % side for size in table for length in size):
        return None
    rows, columns = max(height, width), min(height, width)
    canvas = padded_sizes(base_size)[rows > LONG * base_size]
    across = canvas[1] // side  # patches
    on_canvas = np.arange(rows // side)[:, None] * across + np.arange(columns // side)
    order = (on_canvas.T if width > height else on_canvas).reshape(-1)  # the picture's own
    patches = np.zeros(max(h * w for h, w in table) // side**2, np.int32)
    patches[: order.size] = order
    tokens = np.zeros(canvas[0] // side * across, np.int32)
    tokens[order] = np.arange(order.size)
    size, count = np.array((rows, columns), np.int32), np.int32(order.size)
    # device_put, unlike jnp.asarray, compiles nothing
    return canvas, Placement(*jax.device_put((size, np.bool_(width > height), count, patches, tokens)))


def pad_to_bucket(pixels: UInt8[np.ndarray, "b h w 3"], canvas: Size) -> UInt8[np.ndarray, "b y x 3"]:
    """Return pictures as they lie on the canvas; zeros beside them."""
    pixels = _upright(pixels, pixels.shape[1:3])
    padding = ((0, 0), *((0, canvas[n] - pixels.shape[1 + n]) for n in range(2)), (0, 0))
    return np.pad(pixels, padding)


def crop_from_bucket(pixels: UInt8[np.ndarray, "b y x 3"], size: Size) -> UInt8[np.ndarray, "b h w 3"]:
    """Return the pictures of that height and width that lie on a canvas."""
    return _upright(pixels[:, : max(size), : min(size)], size)


def _upright(pixels: UInt8[np.ndarray, "b h w 3"], size: tuple[int, ...]) -> UInt8[np.ndarray, "b y x 3"]:
    """Exchange rows and columns if pictures of this height and width lie so on a canvas; twice is not at all."""
    return pixels.swapaxes(1, 2) if size[1] > size[0] else pixels


def transpose_kernels(network: Weights, flip: Bool[Array, ""]) -> Weights:
    """Return the network with rows and columns of its kernels exchanged if `flip`: for pictures that lie so."""

    def turn(x: Array) -> Array:
        return jnp.where(flip, x.swapaxes(0, 1), x) if x.ndim == 4 else x  # kernels: [height, width, c_in, c_out]

    return Weights(network.graph, jax.tree.map(turn, network.state))


def gather_tokens(latents: Float[Array, "b y x c"], place: Placement, patch: tuple[int, int]) -> Float[Array, "b L P"]:
    """Return the picture's own tokens, from the latents of its canvas; zeros behind the last."""
    tokens = _turn_patches(patchify(latents, patch), place, patch)
    tokens = jnp.take(tokens, place.patches, axis=1, mode="clip")
    return jnp.where(jnp.arange(tokens.shape[1])[:, None] < place.count, tokens, 0)


def scatter_tokens(
    tokens: Float[Array, "b T P"], place: Placement, patch: tuple[int, int], width: int
) -> Float[Array, "b y x c"]:
    """Return the latents of a canvas that is `width` patches wide, of the picture's own tokens and any behind them."""
    tokens = jnp.take(tokens, place.tokens, axis=1, mode="clip")
    return unpatchify(_turn_patches(tokens, place, patch), patch, width)


def _turn_patches(tokens: Float[Array, "b L P"], place: Placement, patch: tuple[int, int]) -> Float[Array, "b L P"]:
    exchanged = rearrange(tokens, "b L (q r c) -> b L (r q c)", q=patch[0], r=patch[1])
    return jnp.where(place.flip, exchanged, tokens)
