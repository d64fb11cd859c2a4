"""How the autoencoder goes over a picture: as a whole, in overlapping tiles, or cut in patches.

`exact` is the network itself; on a mesh, each device has some of the rows and neighbours exchange their borders. The
others are what users of other systems know, and approximations, since the middle of the network attends to the whole
picture and every cut is an edge to its convolutions. `tiled` needs the memory of one tile on each device; `patch` gives
each device one cut. `auto` takes `tiled` for what is larger than a tile, else `patch`; where that cannot be cut evenly,
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
    """Apply one half of an autoencoder; `sides` are those of a tile before and after it.

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
    """Return the mode that is meant for a picture of this size; `sides` as above.

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
    """Return into how many rows and columns a picture is cut: rows are the largest divisor up to the square root."""
    rows = max(rows for rows in range(1, math.isqrt(devices) + 1) if devices % rows == 0)
    return rows, devices // rows


def _tiled(function: Function, x: Float[Array, "b h w c"], sides: tuple[int, int]) -> Float[Array, "b y x d"]:
    """Apply the function to overlapping tiles and blend them, as `tiled_decode` of AutoencoderKLWan in Diffusers."""
    tile, stride = sides[0], sides[0] * STRIDE // TILE
    tops, lefts = (range(0, size, stride) for size in x.shape[1:3])
    cut = {(top, left): x[:, top : top + tile, left : left + tile] for top in tops for left in lefts}
    drawn: dict[tuple[int, int], Array] = {}
    for shape in {part.shape for part in cut.values()}:  # tiles at the end may be smaller
        places = [place for place, part in cut.items() if part.shape == shape]
        results = _run(function, jnp.stack([cut[place] for place in places]))
        drawn |= {place: results[n] for n, place in enumerate(places)}
    kept, blend = sides[1] * STRIDE // TILE, sides[1] - sides[1] * STRIDE // TILE
    for top, left in cut:  # each with its neighbours as they are by then
        if top:
            drawn[top, left] = _blend(drawn[top - stride, left], drawn[top, left], blend, axis=1)
        if left:
            drawn[top, left] = _blend(drawn[top, left - stride], drawn[top, left], blend, axis=2)
    rows = [jnp.concatenate([drawn[top, left][:, :kept, :kept] for left in lefts], axis=2) for top in tops]
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
    drawn = _run(function, cut.reshape(rows * columns, *cut.shape[2:]))
    drawn = drawn.reshape(rows, columns, *drawn.shape[1:]).transpose(2, 0, 3, 1, 4, 5)
    return drawn.reshape(batch, rows * drawn.shape[2], columns * drawn.shape[4], -1)


def _run(function: Function, parts: Float[Array, "n b h w c"]) -> Float[Array, "n b y x d"]:
    """Apply the function to parts of one size, spread over all devices and one after the other on each."""
    count, axes = len(parts), ("tile", None, None, None, None)
    more = -count % devices_along("tile")
    parts = jnp.concatenate([parts, jnp.repeat(parts[-1:], more, axis=0)])
    return on_shards(lambda own: jax.lax.map(function, own), (axes,), axes)(parts)[:count]
