"""Modulated layer norms against float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from joyjax.kernels.modulate import (
    layer_norm,
    layer_norm_scale_shift,
    residual_gate,
    residual_gate_layer_norm_scale_shift,
)

TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2}
SHAPES = [(2, 5, 8), (1, 1, 33), (3, 7, 640)]


def draw(shape, dtype):
    """Return tokens with a mean far from zero, and scales, shifts and gates that differ between rows, as float64."""
    rng = np.random.default_rng(0)
    tokens = 2 * rng.standard_normal((2, *shape)) + 3
    vectors = rng.standard_normal((3, shape[0], shape[2]))
    rounded = [np.asarray(jnp.asarray(x, dtype).astype(jnp.float32), np.float64) for x in (*tokens, *vectors)]
    return rounded, [jnp.asarray(x, dtype) for x in rounded]


def norm(x, eps):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


def close(ours, expected, dtype):
    assert ours.dtype == dtype
    assert np.abs(np.asarray(ours.astype(jnp.float32)) - expected).max() < TOLERANCE[dtype] * np.abs(expected).max()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_modulation(shape, dtype, eps):
    (residual, x, scale, shift, gate), arrays = draw(shape, dtype)
    expected = norm(x, eps) * (1 + scale[:, None]) + shift[:, None]
    close(layer_norm_scale_shift(*arrays[1:4], eps=eps), expected, dtype)

    summed = residual + gate[:, None] * x
    close(residual_gate(arrays[0], arrays[1], arrays[4]), summed, dtype)
    ours, modulated = residual_gate_layer_norm_scale_shift(*arrays[:2], arrays[4], *arrays[2:4], eps=eps)
    close(ours, summed, dtype)
    # from the sum before it was rounded
    close(modulated, norm(summed, eps) * (1 + scale[:, None]) + shift[:, None], dtype)


def test_a_large_mean_costs_no_precision():
    x = 1e3 + np.random.default_rng(0).standard_normal((1, 2, 512))
    x = x.astype(np.float32)
    np.testing.assert_allclose(layer_norm(jnp.asarray(x)), norm(x.astype(np.float64), 1e-6), atol=2e-4)
