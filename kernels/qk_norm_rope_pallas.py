"""Head norms, rotation and the joint buffers as one Pallas kernel: every projection is read once and written once.

A block processes one token: its queries, keys and values of all heads. Padding of the image goes behind the text, so
every position of the joint buffer is written exactly once.

Rotation pairs neighbouring channels. In bfloat16 a pair is bitcast to one int32 without a copy and unpacked by shifts:
loads stay wide and no thread needs another's channel. In float32 the two parts are sliced and stacked outside, which
costs copies.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from joyjax.dtypes import FLOAT32
from joyjax.kernels import mosaic, triton
from joyjax.kernels.dispatch import lowered_once

WARPS, LANES = 4, 32  # of a warpgroup
UPPER = -65536  # mask of the second value of a pair


@lowered_once
def qk_norm_rope(
    img: Float[Array, "B I C N H"],
    txt: Float[Array, "B J C N H"],
    img_scales: Float[Array, "2 H"],
    txt_scales: Float[Array, "2 H"],
    img_rotation: tuple[Array, Array],
    txt_rotation: tuple[Array, Array] | None,
    lengths: Int[Array, " B"] | None,
    *,
    backend: str,
    eps: float,
) -> list[Float[Array, "B I+J N H"]]:
    """Return queries, keys and values of both streams; see `joyjax.kernels.qk_norm_rope`.

    Raises:
        ValueError: for a number or width of heads that does not fit the threads of a block.
    """
    batch, images, parts, heads, width = img.shape
    texts, dtype, pairs = txt.shape[1], img.dtype, width // 2
    _check(backend, img)
    lengths = jnp.full((batch,), images, jnp.int32) if lengths is None else lengths.astype(jnp.int32)
    sources = [_pairs(img), _pairs(txt)]
    scales = [jnp.stack([s[:, 0::2], s[:, 1::2]], axis=1).astype(FLOAT32) for s in (img_scales, txt_scales)]
    rotations = [img_rotation] if txt_rotation is None else [img_rotation, txt_rotation]
    streams = len(sources[0])  # arrays that hold a pair: one of bfloat16, two of float32
    normed = 2 if parts == 3 else 1

    def body(*refs: Any) -> None:
        source_refs = refs[:streams], refs[streams : 2 * streams]
        refs = refs[2 * streams :]
        scale_refs, length_ref, refs = refs[:2], refs[2], refs[3:]
        rotation_refs = [refs[2 * n : 2 * n + 2] for n in range(len(rotations))]
        out_refs = refs[2 * len(rotations) :]
        access = _Mosaic(heads, pairs) if backend == "mosaic" else _Triton(heads, pairs)
        row, position = access.position()
        valid = length_ref[row]

        def stream(kind: int, token: Array, target: Array) -> None:
            rotation = None
            if kind < len(rotations):
                rotation = [access.vector(ref, row, token) for ref in rotation_refs[kind]]
            for part in range(parts):
                values = [access.load(ref, row, token, part) for ref in source_refs[kind]]
                if part < normed:
                    which = part + 2 - normed
                    weights = [access.vector(scale_refs[kind], which, parity) for parity in (0, 1)]
                    values = _norm_rope(values, weights, rotation, access, width, eps)
                own = out_refs[part * streams : (part + 1) * streams]
                for ref, value in zip(own, values, strict=True):
                    access.store(ref, value, row, target)

        @access.when(position < images)
        def _() -> None:
            stream(0, position, jnp.where(position < valid, position, position + texts))

        @access.when(position >= images)
        def _() -> None:
            stream(1, position - images, valid + position - images)

    out = jax.ShapeDtypeStruct((batch, images + texts, heads, pairs), sources[0][0].dtype)
    tables = [x.astype(FLOAT32) for rotation in rotations for x in rotation]
    arguments = (*sources[0], *sources[1], *scales, lengths, *tables)
    if backend == "mosaic":
        grid = {"row": batch, "position": images + texts}
        results = mosaic.call(body, (out,) * (parts * streams), grid, *arguments)
    else:
        results = triton.call(body, [out] * (parts * streams), (batch, images + texts), *arguments)
    return [_single(list(results[part * streams : (part + 1) * streams]), dtype) for part in range(parts)]


def _norm_rope(
    values: list[Array], weights: list[Array], rotation: list[Array] | None, access: Any, width: int, eps: float
) -> list[Array]:
    """Normalise every head of a token and rotate its pairs."""
    packed = len(values) == 1
    even, odd = _unpack(values[0]) if packed else values
    mean_square = jnp.sum(even * even + odd * odd, axis=1) * (1 / width)
    inverse_rms = access.by_head(jax.lax.rsqrt(mean_square + eps))
    even, odd = (x * inverse_rms * access.by_pair(w) for x, w in zip((even, odd), weights, strict=True))
    if rotation is not None:
        cos, sin = (access.by_pair(x) for x in rotation)
        even, odd = even * cos - odd * sin, odd * cos + even * sin
    return [_pack(even, odd)] if packed else [even, odd]


class _Access:
    """Backend-specific access to one token's heads, an array [N, P] of P pairs each."""

    def __init__(self, heads: int, pairs: int):
        self.heads, self.pairs = heads, pairs


class _Mosaic(_Access):
    def __init__(self, heads: int, pairs: int):
        super().__init__(heads, pairs)
        self.layout = _heads_layout(heads, pairs)

    def position(self) -> tuple[Any, Any]:
        return jax.lax.axis_index("row"), jax.lax.axis_index("position")

    def when(self, condition: Any) -> Any:
        from jax.experimental import pallas

        return pallas.when(condition)

    def load(self, ref: Any, *index: Any) -> Array:
        return mosaic.load(ref.at[index], self.layout)

    def vector(self, ref: Any, *index: Any) -> Array:
        return mosaic.load(ref.at[index], self.layout.reduce(0))

    def store(self, ref: Any, value: Array, *index: Any) -> None:
        ref[index] = value

    def by_head(self, x: Array) -> Array:
        return jax.lax.broadcast_in_dim(x, (self.heads, self.pairs), (0,))

    def by_pair(self, x: Array) -> Array:
        return jax.lax.broadcast_in_dim(x, (self.heads, self.pairs), (1,))


class _Triton(_Access):
    def __init__(self, heads: int, pairs: int):
        super().__init__(heads, pairs)
        self.rows, self.columns = triton.masked(heads), triton.masked(pairs)
        self.mask = self.rows[1][:, None] & self.columns[1][None]

    def position(self) -> tuple[Any, Any]:
        return triton.program(0), triton.program(1)

    def when(self, condition: Any) -> Any:
        return triton.pallas.when(condition)

    def load(self, ref: Any, *index: Any) -> Array:
        return triton.load(ref, (*index, self.rows[0][:, None], self.columns[0][None]), self.mask)

    def vector(self, ref: Any, *index: Any) -> Array:
        return triton.load(ref, (*index, self.columns[0]), self.columns[1])

    def store(self, ref: Any, value: Array, *index: Any) -> None:
        triton.store(ref, (*index, self.rows[0][:, None], self.columns[0][None]), self.mask, value)

    def by_head(self, x: Array) -> Array:
        return x[:, None]

    def by_pair(self, x: Array) -> Array:
        return x[None]


def _check(backend: str, img: Float[Array, "B I C N H"]) -> None:
    heads, width = img.shape[3:]
    if img.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"{backend}: heads in {img.dtype}; the kernel takes bfloat16 and float32")
    if width % 2 or (backend == "mosaic" and _vector(heads, width // 2) is None):
        raise ValueError(
            f"{backend}: {heads} heads of {width} channels; the kernel takes powers of two from 64 to 256 channels, "
            "and as many heads as fill the threads of a block: a multiple of 4 or more"
        )


def _vector(heads: int, pairs: int) -> int | None:
    """Return how many pairs a thread loads at once, up to 16 bytes, so that a warp spans whole heads."""
    for vector in (4, 2, 1):
        lanes = pairs // vector
        if pairs % vector == 0 and lanes <= LANES and LANES % lanes == 0 and heads % (WARPS * LANES // lanes) == 0:
            return vector
    return None


def _heads_layout(heads: int, pairs: int) -> Any:
    """Return a layout in which a warp holds whole heads, so that a head is reduced within it."""
    from jax.experimental.pallas import mosaic_gpu

    vector = _vector(heads, pairs) or 1
    rows = LANES * vector // pairs  # heads that a warp holds at once
    if rows == 1:
        tiling = mosaic_gpu.Tiling(((WARPS, pairs), (vector,)))
        return mosaic_gpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
    tiling = mosaic_gpu.Tiling(((WARPS * rows, pairs), (rows, pairs), (vector,)))
    return mosaic_gpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def _pairs(x: Float[Array, "*rest H"]) -> list[Array]:
    """Return arrays of pairs: one int32 array for bfloat16, else an array of first and one of second values."""
    x = x.reshape(*x.shape[:-1], -1, 2)
    return [jax.lax.bitcast_convert_type(x, jnp.int32)] if x.dtype == jnp.bfloat16 else [x[..., 0], x[..., 1]]


def _single(pairs: list[Array], dtype: Any) -> Float[Array, "*rest H"]:
    """Undo `_pairs`."""
    x = jax.lax.bitcast_convert_type(pairs[0], dtype) if len(pairs) == 1 else jnp.stack(pairs, axis=-1)
    return x.reshape(*x.shape[:-2], -1)


def _unpack(pair: Int[Array, "N P"]) -> tuple[Array, Array]:
    """Return both values in float32; a bfloat16 is the upper half of a float32."""
    first, second = pair << 16, pair & UPPER
    return jax.lax.bitcast_convert_type(first, FLOAT32), jax.lax.bitcast_convert_type(second, FLOAT32)


def _pack(even: Float[Array, "N P"], odd: Float[Array, "N P"]) -> Int[Array, "N P"]:
    """Round both values to bfloat16 and pack them into one int32."""
    first, second = (
        jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16).astype(FLOAT32), jnp.int32) for x in (even, odd)
    )
    return jax.lax.shift_right_logical(first, jnp.full_like(first, 16)) | (second & UPPER)
