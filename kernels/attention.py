"""Scaled dot-product attention over the first `lengths` keys of each row.

`implementation`: "reference", in plain JAX; "cudnn", NVIDIA's fused kernel, which never materialises the scores. None:
cuDNN on GPUs from Ampere on, for the dtypes and head widths that it supports, else the reference. There is no Pallas
kernel; one would have to be faster than cuDNN's.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from joyjax.dtypes import FLOAT32
from joyjax.kernels.dispatch import AMPERE, HOPPER, check_name, on_cpu, target

# Above so many scores, queries are processed in blocks, so the full score matrix is never in memory.
SCORES_AT_ONCE = 2**20
QUERY_BLOCK = 128
# On a CPU, where the scores of such a block exceed the cache, some heads at a time: docs/speed.md has measurements.
CPU_TILE = 3 * 2**19
CPU_QUERY_BLOCK = 256

Implementation = Literal["reference", "cudnn"] | None


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
    S - T + t: the queries belong to the last keys. `scale` multiplies the scores, 1/√H unless given. The output is
    undefined for queries beyond the length, and in a row of length 0.

    Raises:
        ValueError: for an unknown implementation, or one that does not support these arrays on this device.
    """
    check_name("attention", implementation, ("reference", "cudnn"))
    refusal = None if implementation == "reference" else _refused_by_cudnn(query, key, value, causal)
    if implementation == "cudnn" and refusal:
        raise ValueError(f"attention: 'cudnn' {refusal}")
    if implementation != "reference" and refusal is None:
        return _cudnn(query, key, value, lengths, causal, scale)
    return _attend(query, key, value, lengths, causal, scale, value.dtype)[0]


def attention_and_sum(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    lengths: Int[Array, " B"] | None = None,
    scale: float | None = None,
    implementation: Literal["reference"] | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Return the attention in float32, and the log-sum-exp of each query's scores.

    `merge` combines the results of two parts of the keys. A row of length 0 gives zeros and -∞. cuDNN's log-sum-exp is
    not used: JAX rounds it to the dtype of the results, which puts bfloat16 weights off by up to 3 %, and drops its
    gradient.
    """
    check_name("attention_and_sum", implementation, ("reference",))
    return _attend(query, key, value, lengths, False, scale, FLOAT32)


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

    def attend(part: _Part, block: Float[Array, "b k G Q H"], first: Int[Array, ""]) -> tuple[Array, Array]:
        scores = jnp.einsum("BKGQH,BKHS->BKGQS", block, part.key, preferred_element_type=FLOAT32) * scale
        position = jnp.arange(keys)
        if part.lengths is not None:
            scores = jnp.where(position < part.lengths[:, None, None, None, None], scores, -jnp.inf)
        if causal:
            visible = position <= keys - queries + first + jnp.arange(block.shape[3])[:, None]
            scores = jnp.where(visible, scores, -jnp.inf)
        top = jnp.maximum(jnp.max(scores, axis=-1), jnp.finfo(FLOAT32).min)  # finite also where no key is visible
        weights = jnp.exp(scores - top[..., None])
        total = jnp.sum(weights, axis=-1)
        mixed = jnp.einsum("BKGQS,BKSH->BKGQH", weights.astype(value.dtype), part.value, preferred_element_type=FLOAT32)
        mixed = mixed / jnp.maximum(total, jnp.finfo(FLOAT32).tiny)[..., None]
        return mixed.astype(dtype), top + jnp.log(total)

    def in_blocks(part: _Part) -> tuple[Float[Array, "b k G T H"], Float[Array, "b k G T"]]:
        if size == queries:
            return attend(part, part.query, jnp.int32(0))
        blocks = -(-queries // size)
        query = jnp.pad(part.query, ((0, 0), (0, 0), (0, 0), (0, blocks * size - queries), (0, 0)))
        query = jnp.moveaxis(query.reshape(*query.shape[:3], blocks, size, width), 3, 0)
        first = jnp.arange(blocks, dtype=jnp.int32) * size
        out, sums = (
            jnp.moveaxis(x, 0, 3).reshape(*x.shape[1:4], blocks * size, *x.shape[5:])[:, :, :, :queries]
            for x in jax.lax.map(lambda block: attend(part, *block), (query, first))
        )
        return out, sums

    size, together = _tile(batch * key_heads, heads // key_heads, queries, keys)
    if together == batch * key_heads:
        out, sums = in_blocks(_Part(query, key, value, lengths))
    else:
        if lengths is not None:
            lengths = jnp.repeat(lengths, key_heads).reshape(-1, together)
        query, key, value = (x.reshape(-1, together, 1, *x.shape[2:]) for x in (query, key, value))
        out, sums = jax.lax.map(in_blocks, _Part(query, key, value, lengths))
        out, sums = (x.reshape(batch, key_heads, *x.shape[3:]) for x in (out, sums))
    out = out.transpose(0, 3, 1, 2, 4).reshape(batch, queries, heads, width)
    return out, sums.transpose(0, 3, 1, 2).reshape(batch, queries, heads)


class _Part(NamedTuple):
    """Some key heads of some rows, with their queries."""

    query: Float[Array, "b k G T H"]
    key: Float[Array, "b k H S"]
    value: Float[Array, "b k S H"]
    lengths: Int[Array, " b"] | None


def _tile(rows: int, group: int, queries: int, keys: int) -> tuple[int, int]:
    """Return how many queries and how many of all `rows` key heads are computed at once, all where that is little."""
    few = queries <= 2 * QUERY_BLOCK or rows * group * queries * keys <= SCORES_AT_ONCE
    size = queries if few else QUERY_BLOCK
    mesh = jax.sharding.get_abstract_mesh()
    partitioned = not (mesh.empty or mesh.are_all_axes_manual)  # XLA splits rows and heads over devices
    if not on_cpu() or partitioned or rows * group * min(queries, QUERY_BLOCK) * keys <= CPU_TILE:
        return size, rows
    block = CPU_QUERY_BLOCK if CPU_QUERY_BLOCK * keys <= CPU_TILE else QUERY_BLOCK
    size = -(-queries // -(-queries // block))  # no more blocks, all of one size
    size = min(queries, size + -size % 16)
    fitting = (n for n in range(1, rows + 1) if rows % n == 0 and n * group * size * keys <= CPU_TILE)
    return size, max(fitting, default=1)


def merge(
    one: tuple[Float[Array, "B T N H"], Float[Array, "B T N"]],
    other: tuple[Float[Array, "B T N H"], Float[Array, "B T N"]],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Combine the attention to two parts of the keys; the arguments are results of `attention_and_sum`."""
    sums = jnp.logaddexp(one[1], other[1])
    finite = jnp.maximum(sums, jnp.finfo(FLOAT32).min)  # -∞ where neither part has a key
    first, second = (out * jnp.exp(part - finite)[..., None] for out, part in (one, other))
    return first + second, sums


def _refused_by_cudnn(query: Array, key: Array, value: Array, causal: bool) -> str | None:
    """Return why cuDNN does not support this call, None if it does. Source: `check_is_flash_attention` in JAX."""
    device, width = target(), query.shape[-1]
    if device.capability is None or device.capability < AMPERE:
        return f"needs an NVIDIA GPU of compute capability 8.0 or more; the device is {device.kind}"
    if not query.dtype == key.dtype == value.dtype or query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 or float16, all alike; these are {query.dtype}, {key.dtype} and {value.dtype}"
    if causal and query.shape[1] != key.shape[1]:
        return (
            f"masks causally from the first key; here the {query.shape[1]} queries belong to the last of "
            f"{key.shape[1]} keys"
        )
    widest = 256 if device.capability >= HOPPER and device.here else 128
    if width % 8 or width > widest:
        return f"takes heads of a multiple of 8 channels, up to {widest}; these have {width}"
    return None


def _cudnn(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    lengths: Int[Array, " B"] | None,
    causal: bool,
    scale: float | None,
) -> Float[Array, "B T N H"]:
    if lengths is not None:
        lengths = jnp.maximum(lengths.astype(jnp.int32), 1)  # cuDNN does not support a length of 0
    return jax.nn.dot_product_attention(
        query, key, value, is_causal=causal, scale=scale, key_value_seq_lengths=lengths, implementation="cudnn"
    )
