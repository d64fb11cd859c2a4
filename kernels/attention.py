"""Scaled dot-product attention over the first `lengths` keys of each row."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from joyjax.dtypes import ISLAND

# Scores above this many numbers are computed a block of queries at a time, so that they never lie in memory as a whole.
# Measured on CPU: blocks of 128 queries stay in cache and reach two to six times the speed of one large product.
QUERY_BLOCK = 128
SCORES_AT_ONCE = 2**20

Implementation = Literal["reference"] | None


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    lengths: Int[Array, " B"] | None = None,
    causal: bool = False,
    scale: float | None = None,
    implementation: Implementation = None,
) -> Float[Array, "B T N H"]:
    """Attend from every query to the first `lengths` keys of its row; scores and softmax in float32.

    Grouped queries: key head j serves the query heads j·N/K up to (j+1)·N/K. With `causal`, query t sees keys up to
    S - T + t: the queries are those of the last keys.
    `scale` multiplies the scores, 1/√H unless given. Rows of `query` beyond the length give numbers without meaning.
    """
    _check(implementation)
    return _attend(query, key, value, lengths, causal, scale, value.dtype)[0]


def attention_and_sum(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    lengths: Int[Array, " B"] | None = None,
    scale: float | None = None,
    implementation: Implementation = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Return what `attention` does, in float32, and the logarithm of the sum of exponentials of every query's scores.

    With these, attention to one part of the keys is put together with that to another (`merge`). A row of length 0
    gives zeros and -∞.
    """
    _check(implementation)
    return _attend(query, key, value, lengths, False, scale, ISLAND)


def _attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    lengths: Int[Array, " B"] | None,
    causal: bool,
    scale: float | None,
    dtype: DTypeLike,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    batch, queries, heads, width = query.shape
    keys, key_heads = key.shape[1:3]
    scale = width**-0.5 if scale is None else scale
    query = query.reshape(batch, queries, key_heads, heads // key_heads, width).transpose(0, 2, 3, 1, 4)  # B K G T H
    key = key.transpose(0, 2, 3, 1)  # B K H S
    value = value.transpose(0, 2, 1, 3)  # B K S H
    limit = jnp.full((batch,), keys, jnp.int32) if lengths is None else lengths

    def attend(
        block: Float[Array, "B K G Q H"], first: Int[Array, ""]
    ) -> tuple[Float[Array, "B K G Q H"], Float[Array, "B K G Q"]]:
        scores = jnp.einsum("BKGQH,BKHS->BKGQS", block, key, preferred_element_type=ISLAND) * scale
        position = jnp.arange(keys)
        if lengths is not None:
            scores = jnp.where(position < limit[:, None, None, None, None], scores, -jnp.inf)
        if causal:
            seen = position <= keys - queries + first + jnp.arange(block.shape[3])[:, None]
            scores = jnp.where(seen, scores, -jnp.inf)
        top = jnp.maximum(jnp.max(scores, axis=-1), jnp.finfo(ISLAND).min)  # a number also where no key is seen
        weights = jnp.exp(scores - top[..., None])
        total = jnp.sum(weights, axis=-1)
        mixed = jnp.einsum("BKGQS,BKSH->BKGQH", weights.astype(value.dtype), value, preferred_element_type=ISLAND)
        mixed = mixed / jnp.maximum(total, jnp.finfo(ISLAND).tiny)[..., None]
        return mixed.astype(dtype), top + jnp.log(total)

    if queries <= 2 * QUERY_BLOCK or batch * heads * queries * keys <= SCORES_AT_ONCE:
        out, sums = attend(query, jnp.int32(0))
    else:
        blocks = -(-queries // QUERY_BLOCK)
        query = jnp.pad(query, ((0, 0), (0, 0), (0, 0), (0, blocks * QUERY_BLOCK - queries), (0, 0)))
        query = jnp.moveaxis(query.reshape(*query.shape[:3], blocks, QUERY_BLOCK, width), 3, 0)
        first = jnp.arange(blocks, dtype=jnp.int32) * QUERY_BLOCK
        out, sums = (
            jnp.moveaxis(x, 0, 3).reshape(*x.shape[1:4], blocks * QUERY_BLOCK, *x.shape[5:])[:, :, :, :queries]
            for x in jax.lax.map(lambda block: attend(*block), (query, first))
        )
    out = out.transpose(0, 3, 1, 2, 4).reshape(batch, queries, heads, width)
    return out, sums.transpose(0, 3, 1, 2).reshape(batch, queries, heads)


def merge(
    one: tuple[Float[Array, "B T N H"], Float[Array, "B T N"]],
    other: tuple[Float[Array, "B T N H"], Float[Array, "B T N"]],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Return attention to two parts of the keys together, from that to each, as `attention_and_sum` gives it."""
    sums = jnp.logaddexp(one[1], other[1])
    known = jnp.maximum(sums, jnp.finfo(ISLAND).min)  # no key in either part
    first, second = (out * jnp.exp(part - known)[..., None] for out, part in (one, other))
    return first + second, sums


def _check(implementation: Implementation) -> None:
    if implementation not in (None, "reference"):
        raise ValueError(f"attention has no implementation {implementation!r}; there is: 'reference'")
