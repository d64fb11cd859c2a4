"""Modulated layer norms against float64, by every implementation; kernels are interpreted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from joyjax.kernels import modulate_pallas
from joyjax.kernels.dispatch import PALLAS
from joyjax.kernels.modulate import (
    layer_norm,
    layer_norm_scale_shift,
    layer_norm_scale_shift_select01,
    residual_gate,
    residual_gate_layer_norm_scale_shift,
    residual_gate_layer_norm_scale_shift_select01,
    residual_gate_select01,
)

pytestmark = pytest.mark.jax

TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2}
SHAPES = [(2, 5, 8), (1, 1, 33), (3, 7, 640)]
# A kernel's shapes: the demo's width, which is padded; one that no load fits; an odd tail of a block; the widths of the
# models; one whose vectors are read for every token.
KERNEL_SHAPES = [(2, 9, 160), (1, 1, 33), (3, 11, 640), (2, 2, 3072), (2, 9, 4096), (2, 1, 5120)]
FORMS = ("plain", "residual", "select01", "residual select01")


def draw(shape, dtype):
    """Return tokens with a mean far from zero, and scales, shifts and gates that differ between rows, as float64."""
    rng = np.random.default_rng(0)
    tokens = 2 * rng.standard_normal((2, *shape)) + 3
    vectors = rng.standard_normal((3, shape[0], 2, shape[2]))
    rounded = [np.asarray(jnp.asarray(x, dtype).astype(jnp.float32), np.float64) for x in (*tokens, *vectors)]
    return rounded, [jnp.asarray(x, dtype) for x in rounded], rng.integers(0, 2, shape[:2])


def norm(x, eps):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


def close(ours, expected, dtype):
    assert ours.dtype == dtype
    assert np.abs(np.asarray(ours.astype(jnp.float32)) - expected).max() < TOLERANCE[dtype] * np.abs(expected).max()


def check(form, shape, dtype, eps, implementation):
    (residual, x, *vectors), arrays, index = draw(shape, dtype)
    tokens, pairs = arrays[:2], arrays[2:]
    if "select01" in form:
        scale, shift, gate = (np.take_along_axis(v, index[:, :, None], axis=1) for v in vectors)
        own, more = pairs, (jnp.asarray(index, jnp.int32),)
    else:
        scale, shift, gate = (v[:, :1] for v in vectors)
        own, more = [v[:, 0] for v in pairs], ()
    function = {
        "plain": layer_norm_scale_shift,
        "select01": layer_norm_scale_shift_select01,
        "residual": residual_gate_layer_norm_scale_shift,
        "residual select01": residual_gate_layer_norm_scale_shift_select01,
    }[form]
    options = dict(eps=eps, implementation=implementation)
    if "residual" not in form:
        ours = function(tokens[1], *own[:2], *more, **options)
        close(ours, norm(x, eps) * (1 + scale) + shift, dtype)
        return
    summed = residual + gate * x
    ours, modulated = function(*tokens, own[2], *own[:2], *more, **options)
    close(ours, summed, dtype)
    close(modulated, norm(summed, eps) * (1 + scale) + shift, dtype)  # from the sum before it was rounded


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
@pytest.mark.parametrize("form", FORMS)
def test_modulation(form, shape, dtype, eps):
    check(form, shape, dtype, eps, None)


@pytest.mark.parametrize("implementation", PALLAS)
@pytest.mark.parametrize(
    ("shape", "form", "dtype", "eps"),
    [
        (KERNEL_SHAPES[0], "plain", "float32", 1e-2),
        (KERNEL_SHAPES[0], "residual select01", "bfloat16", 1e-6),
        (KERNEL_SHAPES[1], "residual", "float32", 1e-2),
        (KERNEL_SHAPES[2], "residual", "bfloat16", 1e-6),
        (KERNEL_SHAPES[2], "select01", "float32", 1e-6),
        (KERNEL_SHAPES[3], "residual select01", "float32", 1e-2),
        (KERNEL_SHAPES[4], "residual", "float32", 1e-6),
        (KERNEL_SHAPES[4], "plain", "bfloat16", 1e-6),
        (KERNEL_SHAPES[5], "plain", "float32", 1e-6),
    ],
)
def test_kernels(implementation, shape, form, dtype, eps):
    check(form, shape, dtype, eps, implementation)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_next_residual_picks_its_gate_by_index(dtype):
    (residual, x, _, _, gate), arrays, index = draw((2, 5, 8), dtype)
    picked = np.take_along_axis(gate, index[:, :, None], axis=1)
    ours = residual_gate_select01(*arrays[:2], arrays[4], jnp.asarray(index, jnp.int32))
    close(ours, residual + picked * x, dtype)
    assert np.array_equal(ours, residual_gate_select01(*arrays[:2], arrays[4], jnp.asarray(index != 0)))
    close(residual_gate(*arrays[:2], arrays[4][:, 1]), residual + gate[:, 1:] * x, dtype)


@pytest.mark.parametrize("implementation", PALLAS)
def test_gradients_are_those_of_the_reference(implementation):
    """Of every argument, for both results, rows and tokens weighed apart."""
    _, (residual, x, scale, shift, gate), index = draw((2, 3, 128), "float32")
    arguments = residual, x, gate, scale, shift
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((2, 2, 3, 128)), jnp.float32)

    def gradient(implementation):
        def loss(arguments, index):
            found = residual_gate_layer_norm_scale_shift_select01(*arguments, index, implementation=implementation)
            return sum(jnp.sum(weight * y) for weight, y in zip(weights, found, strict=True))

        return jax.jit(jax.grad(loss))(arguments, jnp.asarray(index, jnp.int32))

    ours, expected = gradient(implementation), gradient("reference")
    for one, other in zip(ours, expected, strict=True):
        assert np.abs(other).max() > 0.1
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_the_gradient_of_the_reference_is_that_of_its_values():
    _, (residual, x, scale, shift, gate), index = draw((2, 3, 16), "float32")

    index = jnp.asarray(index, jnp.int32)

    def loss(*arguments):
        arguments = [jnp.asarray(x) for x in arguments]
        r, y = residual_gate_layer_norm_scale_shift_select01(*arguments, index, eps=1e-2)
        return jnp.sum(jnp.sin(r) + jnp.cos(y))

    check_grads(loss, (residual, x, gate, scale, shift), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


def test_tokens_too_wide_for_a_kernel():
    wide = jnp.ones((1, 1, modulate_pallas.WIDEST + 1))
    with pytest.raises(ValueError, match="6145 channels; the kernel takes up to 6144"):
        layer_norm_scale_shift(wide, wide[:, 0], wide[:, 0], implementation="mosaic")


def test_a_large_mean_costs_no_precision():
    x = 1e3 + np.random.default_rng(0).standard_normal((1, 2, 512))
    x = x.astype(np.float32)
    np.testing.assert_allclose(layer_norm(jnp.asarray(x)), norm(x.astype(np.float64), 1e-6), atol=2e-4)


@pytest.mark.parametrize("implementation", PALLAS)
def test_a_large_mean_costs_a_kernel_no_precision(implementation):
    """Also where the width is padded: what is behind it must not reach the variance."""
    x = (1e3 + np.random.default_rng(0).standard_normal((1, 2, 160))).astype(np.float32)
    zeros = jnp.zeros((1, 160))
    ours = layer_norm_scale_shift(jnp.asarray(x), zeros, zeros, implementation=implementation)
    np.testing.assert_allclose(ours, norm(x.astype(np.float64), 1e-6), atol=2e-4)
