"""Modulated layer norms as Pallas kernels: one pass over the tokens, statistics in registers, one rounding."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from joyjax.dtypes import FLOAT32
from joyjax.kernels import mosaic, triton
from joyjax.kernels.dispatch import lowered_once

WIDEST = 6144  # what the registers of a warpgroup hold without spilling: one token in float32, and vectors beside it
KEPT = 4096  # up to this width the vectors of a row stay in registers from token to token
TOKENS = 8  # of one block of Mosaic GPU, which share those vectors


@lowered_once
def modulate(
    x: Float[Array, "B L D"],
    scale: Float[Array, "B S D"],
    shift: Float[Array, "B S D"],
    residual: Float[Array, "B L D"] | None = None,
    gate: Float[Array, "B S D"] | None = None,
    index: Array | None = None,
    *,
    backend: str,
    eps: float,
) -> list[Float[Array, "B L D"]]:
    """Return `LN(r)·(1 + scale) + shift` and, where there is a residual, `r = residual + gate·x`; else r is x.

    S is 2 where `index` [B L] selects among the vectors, else 1.

    Raises:
        ValueError: for tokens wider than `WIDEST`.
    """
    if x.shape[-1] > WIDEST:
        raise ValueError(f"{backend}: tokens of {x.shape[-1]} channels; the kernel takes up to {WIDEST}")
    tokens = [x] if residual is None else [x, residual]
    vectors = [scale, shift] if gate is None else [scale, shift, gate]
    index = None if index is None else index.astype(jnp.int32)
    return (_mosaic if backend == "mosaic" else _triton)(tokens, vectors, index, eps)


def _row(tokens: list[Array], vectors: list[Array], inside: Array | None, width: int, eps: float) -> list[Array]:
    """Compute one token, in float32; `inside` is 1 within the width and 0 in the padding."""
    r = tokens[0] if len(tokens) == 1 else tokens[1] + vectors[2] * tokens[0]
    centred = r - jnp.sum(r) * (1 / width)
    if inside is not None:
        centred = centred * inside
    inverse_std = jax.lax.rsqrt(jnp.sum(centred * centred) * (1 / width) + eps)
    y = centred * inverse_std * (1 + vectors[0]) + vectors[1]
    return [y] if len(tokens) == 1 else [y, r]


def _mosaic(tokens: list[Array], vectors: list[Array], index: Array | None, eps: float) -> list[Array]:
    batch, length, width = tokens[0].shape
    dtype = tokens[0].dtype
    padding = -width % mosaic.THREADS  # costs copies; no model has such a width
    tokens, vectors = ([jnp.pad(x, ((0, 0), (0, 0), (0, padding))) for x in part] for part in (tokens, vectors))
    inside = [(jnp.arange(width + padding) < width).astype(FLOAT32)] if padding else []
    indices = [] if index is None else [index]

    def body(*refs: Any) -> None:
        token_refs, refs = refs[: len(tokens)], refs[len(tokens) :]
        vector_refs, refs = refs[: len(vectors)], refs[len(vectors) :]
        layout = mosaic.strided(width + padding, dtype.itemsize)
        row, first = jax.lax.axis_index("row"), jax.lax.axis_index("block") * TOKENS

        def read(ref: Any) -> Array:
            return mosaic.load(ref, layout).astype(FLOAT32)

        mask = read(refs[0]) if padding else None
        kept = None
        if index is None and width <= KEPT:
            kept = [read(ref.at[row, 0]) for ref in vector_refs]

        def one(token: Array, carry: None) -> None:
            if kept is None:
                which = 0 if index is None else refs[len(inside)][row, token]
                own = [read(ref.at[row, which]) for ref in vector_refs]
            else:
                own = kept
            results = _row([read(ref.at[row, token]) for ref in token_refs], own, mask, width, eps)
            for ref, result in zip(refs[len(inside) + len(indices) :], results, strict=True):
                ref[row, token] = result.astype(dtype)
            return carry

        jax.lax.fori_loop(first, jnp.minimum(first + TOKENS, length), one, None)

    out = jax.ShapeDtypeStruct((batch, length, width + padding), dtype)
    grid = {"row": batch, "block": -(-length // TOKENS)}
    results = mosaic.call(body, (out,) * len(tokens), grid, *tokens, *vectors, *inside, *indices)
    return [result[..., :width] for result in results]


def _triton(tokens: list[Array], vectors: list[Array], index: Array | None, eps: float) -> list[Array]:
    batch, length, width = tokens[0].shape
    dtype = tokens[0].dtype
    indices = [] if index is None else [index]

    def body(*refs: Any) -> None:
        token_refs, vector_refs = refs[: len(tokens)], refs[len(tokens) : len(tokens) + len(vectors)]
        refs = refs[len(tokens) + len(vectors) :]
        row, token = triton.program(0), triton.program(1)
        channels, inside = triton.masked(width)

        def read(ref: Any, *index: Any) -> Array:
            return triton.load(ref, (*index, channels), inside).astype(FLOAT32)

        which = 0 if index is None else refs[0][row, token]
        results = _row(
            [read(ref, row, token) for ref in token_refs],
            [read(ref, row, which) for ref in vector_refs],
            inside.astype(FLOAT32),
            width,
            eps,
        )
        for ref, result in zip(refs[len(indices) :], results, strict=True):
            triton.store(ref, (row, token, channels), inside, result.astype(dtype))

    out = [jax.ShapeDtypeStruct((batch, length, width), dtype)] * len(tokens)
    return list(triton.call(body, out, (batch, length), *tokens, *vectors, *indices))
