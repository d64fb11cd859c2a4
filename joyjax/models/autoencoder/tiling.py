"""Modes of applying the autoencoder to a picture: as a whole, in overlapping tiles, or in patches.

`exact` is the network itself; on a mesh, each device has some of the rows and neighbours exchange their borders. The
others are approximations, known from other systems: the middle of the network attends to the whole picture, and
convolutions treat every cut as an edge. `tiled` needs the memory of one tile on each device; `patch` gives each device
one patch. `auto` is `tiled` for pictures larger than a tile, else `patch`, else, where they cannot be split evenly,
`exact`.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from joyjax.errors import MeshError
from joyjax.options import VAEMode as Mode
from joyjax.sharding.place import devices_along, on_shards

TILE, STRIDE = 256, 192  # pixels; those of Diffusers
Function = Callable[[Array], Array]


def apply(
    function: Function, x: Float[Array, "b h w c"], mode: Mode, sides: tuple[int, int]
) -> Float[Array, "b y x d"]:
    """Apply one half of an autoencoder; `sides` are the sides of a tile before and after it.

    Raises:
        MeshError: if patches would not be of equal size.
    """
    chosen = choose(mode, x.shape[1:3], sides, devices_along("tile"))
    if chosen == "tiled":
        return _tiled(function, x, sides)
    if chosen == "patch":
        return _patched(function, x)
    return function(x)


def choose(mode: Mode, size: tuple[int, ...], sides: tuple[int, int], devices: int) -> Mode:
    """Return the mode to use for a picture of this size; `sides` as in `apply`.

    Raises:
        MeshError: if patches would not be of equal size.
    """
    rows, columns = patch_grid(devices)
    pixel = max(1, sides[0] // sides[1])  # a latent pixel's side must stay whole
    even = size[0] % (rows * pixel) == 0 and size[1] % (columns * pixel) == 0
    if mode == "patch" and not even:
        raise MeshError(
            f"patches: {size[0]} rows and {size[1]} columns cannot be cut evenly into {rows} × {columns}, one for each "
            f"of {devices} devices; use `exact` or `tiled`, or another height and width"
        )
    if mode == "auto":
        return "tiled" if max(size) > sides[0] else "patch" if even else "exact"
    return "exact" if mode == "tiled" and max(size) <= sides[0] else mode


def patch_grid(devices: int) -> tuple[int, int]:
    """Return the rows and columns of patches; rows are the largest divisor up to the square root of the devices."""
    rows = max(rows for rows in range(1, math.isqrt(devices) + 1) if devices % rows == 0)
    return rows, devices // rows


def _tiled(function: Function, x: Float[Array, "b h w c"], sides: tuple[int, int]) -> Float[Array, "b y x d"]:
    """Apply the function to overlapping tiles and blend them, as `tiled_decode` of AutoencoderKLWan in Diffusers."""
    tile, stride = sides[0], sides[0] * STRIDE // TILE
    tops, lefts = (range(0, size, stride) for size in x.shape[1:3])
    cut = {(top, left): x[:, top : top + tile, left : left + tile] for top in tops for left in lefts}
    results: dict[tuple[int, int], Array] = {}
    for shape in {part.shape for part in cut.values()}:  # tiles at the end may be smaller
        corners = [corner for corner, part in cut.items() if part.shape == shape]
        outputs = _run(function, jnp.stack([cut[corner] for corner in corners]))
        results |= {corner: outputs[n] for n, corner in enumerate(corners)}
    kept, blend = sides[1] * STRIDE // TILE, sides[1] - sides[1] * STRIDE // TILE
    for top, left in cut:  # in order: the neighbours are blended already
        if top:
            results[top, left] = _blend(results[top - stride, left], results[top, left], blend, axis=1)
        if left:
            results[top, left] = _blend(results[top, left - stride], results[top, left], blend, axis=2)
    rows = [jnp.concatenate([results[top, left][:, :kept, :kept] for left in lefts], axis=2) for top in tops]
    whole = jnp.concatenate(rows, axis=1)
    return whole[:, : x.shape[1] * sides[1] // sides[0], : x.shape[2] * sides[1] // sides[0]]


def _blend(before: Array, after: Array, width: int, *, axis: int) -> Array:
    """Fade from the end of one tile into the beginning of the next."""
    width = min(before.shape[axis], after.shape[axis], width)
    weight = (jnp.arange(width, dtype=after.dtype) / width).reshape((-1, 1, 1) if axis == 1 else (-1, 1))
    end = jax.lax.slice_in_dim(before, before.shape[axis] - width, before.shape[axis], axis=axis)
    begin = jax.lax.slice_in_dim(after, 0, width, axis=axis)
    rest = jax.lax.slice_in_dim(after, width, after.shape[axis], axis=axis)
    return jnp.concatenate([end * (1 - weight) + begin * weight, rest], axis=axis)


def _patched(function: Function, x: Float[Array, "b h w c"]) -> Float[Array, "b y x d"]:
    """Apply the function to one patch on each device and join the results."""
    rows, columns = patch_grid(devices_along("tile"))
    batch, height, width, channels = x.shape
    cut = x.reshape(batch, rows, height // rows, columns, width // columns, channels).transpose(1, 3, 0, 2, 4, 5)
    results = _run(function, cut.reshape(rows * columns, *cut.shape[2:]))
    results = results.reshape(rows, columns, *results.shape[1:]).transpose(2, 0, 3, 1, 4, 5)
    return results.reshape(batch, rows * results.shape[2], columns * results.shape[4], -1)


def _run(function: Function, parts: Float[Array, "n b h w c"]) -> Float[Array, "n b y x d"]:
    """Apply the function to parts of one size, sharded over all devices and sequentially on each."""
    count, axes = len(parts), ("tile", None, None, None, None)
    padding = -count % devices_along("tile")
    parts = jnp.concatenate([parts, jnp.repeat(parts[-1:], padding, axis=0)])
    return on_shards(lambda own: jax.lax.map(function, own), (axes,), axes)(parts)[:count]
