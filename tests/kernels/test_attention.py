"""Attention against softmax written out in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joyjax.kernels.attention import QUERY_BLOCK, SCORES_AT_ONCE, _tile, attention, attention_and_sum, merge

pytestmark = pytest.mark.jax

TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2}


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def plain(query, key, value, lengths, causal, scale):
    batch, queries, heads, width = query.shape
    out = np.zeros_like(query)
    for b in range(batch):
        for n in range(heads):
            k, v = (x[b, : lengths[b], n * x.shape[2] // heads] for x in (key, value))
            scores = query[b, :, n] @ k.T * scale
            if causal:
                scores[key.shape[1] - queries + np.arange(queries)[:, None] < np.arange(len(k))] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[b, :, n] = weights / weights.sum(-1, keepdims=True) @ v
    return out


CASES = {
    "square": dict(batch=2, queries=7, keys=7, heads=4, key_heads=4, width=16),
    "grouped": dict(batch=2, queries=5, keys=9, heads=6, key_heads=2, width=8),
    "one key head": dict(batch=1, queries=3, keys=11, heads=5, key_heads=1, width=24),
    "wide head": dict(batch=1, queries=33, keys=33, heads=1, key_heads=1, width=384),
    "blocks": dict(batch=2, queries=2 * QUERY_BLOCK + 37, keys=900, heads=4, key_heads=2, width=8),
    "tiles of three heads": dict(batch=2, queries=2 * QUERY_BLOCK + 37, keys=1500, heads=12, key_heads=6, width=8),
    "tiles of one head": dict(batch=3, queries=601, keys=1300, heads=6, key_heads=2, width=4),
    "long keys": dict(batch=1, queries=2 * QUERY_BLOCK + 37, keys=12500, heads=2, key_heads=2, width=4),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("case", CASES)
def test_attention(case, causal, padded, dtype):
    c = CASES[case]
    query = draw(0, c["batch"], c["queries"], c["heads"], c["width"])
    key, value = draw(1, 2, c["batch"], c["keys"], c["key_heads"], c["width"])
    query, key, value = (np.asarray(jnp.asarray(x, dtype).astype(jnp.float32), np.float64) for x in (query, key, value))
    lengths = np.array([c["keys"] - 2 * b - 1 if padded else c["keys"] for b in range(c["batch"])])
    for b in range(c["batch"]):  # what lies behind a row's end must not matter
        key[b, lengths[b] :], value[b, lengths[b] :] = 1e4, 1e4
    expected = plain(query, key, value, lengths, causal, c["width"] ** -0.5)
    out = attention(
        *(jnp.asarray(x, dtype) for x in (query, key, value)),
        lengths=jnp.asarray(lengths, jnp.int32) if padded else None,
        causal=causal,
    )
    assert out.dtype == dtype
    error = np.abs(np.asarray(out.astype(jnp.float32)) - expected).max() / np.abs(expected).max()
    assert error < TOLERANCE[dtype]


def tile(case: str) -> tuple[int, int]:
    c = CASES[case]
    return _tile(c["batch"] * c["key_heads"], c["heads"] // c["key_heads"], c["queries"], c["keys"])


def test_long_cases_are_computed_in_blocks_and_tiles(monkeypatch):
    monkeypatch.setattr("joyjax.kernels.attention.on_cpu", lambda: True)
    c = CASES["blocks"]
    assert c["batch"] * c["heads"] * c["queries"] * c["keys"] > SCORES_AT_ONCE
    assert c["queries"] % QUERY_BLOCK
    assert tile("blocks") == (QUERY_BLOCK, 4)
    assert tile("tiles of three heads") == (160, 3)
    assert tile("tiles of one head") == (208, 1)
    assert tile("long keys") == (112, 1)


def test_a_gpu_gets_all_heads_at_once(monkeypatch):
    """A tile of a few heads would leave most of it idle."""
    monkeypatch.setattr("joyjax.kernels.attention.on_cpu", lambda: False)
    assert tile("tiles of three heads") == (QUERY_BLOCK, 12)


def test_heads_that_the_partitioner_splits_stay_together(monkeypatch):
    if jax.device_count() < 2:
        pytest.skip("needs two devices")
    monkeypatch.setattr("joyjax.kernels.attention.on_cpu", lambda: True)
    with jax.set_mesh(jax.make_mesh((2,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))):
        assert tile("tiles of three heads") == (QUERY_BLOCK, 12)


def test_scale():
    query, key, value = (jnp.asarray(draw(n, 1, 4, 2, 8), jnp.float32) for n in range(3))
    expected = plain(*(np.asarray(x, np.float64) for x in (query, key, value)), [4], False, 0.7)
    np.testing.assert_allclose(attention(query, key, value, scale=0.7), expected, atol=1e-5)


def test_large_scores_do_not_overflow():
    query, key = (jnp.full((1, 3, 1, 8), 1e4, jnp.float32) for _ in range(2))
    assert np.isfinite(attention(query, key, key)).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_attention_to_parts_equals_attention_to_all_keys(dtype):
    """Three parts of unlike sizes; a row that has nothing in one of them, and one with nothing in the first two."""
    query, key, value = (jnp.asarray(draw(n, 3, size, 4, 8), dtype) for n, size in enumerate((7, 30, 30)))
    query = query * 4  # some scores are far above others
    ends, starts = (10, 16, 30), (0, 10, 16)
    lengths = np.array([[10, 6, 14], [3, 0, 5], [0, 0, 9]])
    found = None
    for n, (start, end) in enumerate(zip(starts, ends, strict=True)):
        part = attention_and_sum(query, key[:, start:end], value[:, start:end], lengths=jnp.int32(lengths[:, n]))
        assert part[0].dtype == part[1].dtype == jnp.float32
        found = part if found is None else merge(found, part)
    for row in range(3):
        valid = np.concatenate([np.arange(start, start + lengths[row, n]) for n, start in enumerate(starts)])
        expected = attention(query[row : row + 1], key[row : row + 1, valid], value[row : row + 1, valid])
        got = np.asarray(found[0][row : row + 1])
        assert np.abs(got - np.asarray(expected.astype(jnp.float32))).max() < TOLERANCE[dtype]


def test_a_row_without_keys_gives_zeros():
    query, key = jnp.asarray(draw(0, 1, 3, 2, 8), jnp.float32), jnp.ones((1, 5, 2, 8))
    nothing = attention_and_sum(query, key, key, lengths=jnp.int32([0]))
    assert np.all(np.asarray(nothing[0]) == 0)
    assert np.all(np.asarray(nothing[1]) == -np.inf)
    both = merge(nothing, nothing)
    assert np.all(np.asarray(both[0]) == 0)
    assert np.all(np.asarray(both[1]) == -np.inf)
