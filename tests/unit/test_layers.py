"""Layers that every network is made of."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from joyjax.layers.activation import gelu
from joyjax.storage.forms import contract

pytestmark = pytest.mark.jax


def on(split: bool):
    """Put a mesh of two devices in force, or none."""
    return jax.set_mesh(Mesh(np.array(jax.devices()[:2]), ("data",))) if split else contextlib.nullcontext()


@pytest.mark.parametrize(
    ("rows", "inner", "columns"), [((2, 3), (5,), (7,)), ((4,), (2, 3), (5,)), ((), (6,), (2, 3)), ((2, 0), (4,), (5,))]
)
@pytest.mark.parametrize("split", [False, True])
def test_contract_is_tensordot(rows, inner, columns, split):
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((*rows, *inner), (*inner, *columns)))
    expected = np.tensordot(np.asarray(x), np.asarray(kernel), axes=len(inner))
    with on(split):
        got = contract(x, kernel, len(inner))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_contract_merges_rows_on_one_device_only():
    """A split axis cannot be merged with another; on one device a gradient is faster with one."""
    x, kernel = jnp.ones((4, 6, 8)), jnp.ones((8, 2, 3))

    def axes(split: bool) -> set[int]:
        """Return how many axes the first operands of the gradient's products have."""
        with on(split):
            gradient = jax.make_jaxpr(jax.grad(lambda x, k: jnp.sum(contract(x, k, 1)), argnums=(0, 1)))(x, kernel)
        products = [equation for equation in gradient.eqns if equation.primitive.name == "dot_general"]
        return {equation.invars[0].aval.ndim for equation in products}

    assert axes(False) == {2}
    assert max(axes(True)) > 2


def test_a_cpu_multiplies_bfloat16_by_its_own_kernel(monkeypatch):
    """It does where the result is float32; asked for bfloat16, JAX 0.10 converts the inputs and takes twice the time.

    A GPU rounds within the product, so there its bias and activation can be merged with it.
    """
    x, kernel = jnp.ones((4, 6), jnp.bfloat16), jnp.ones((6, 8), jnp.bfloat16)

    def result() -> str:
        equations = jax.make_jaxpr(lambda x, kernel: contract(x, kernel, 1))(x, kernel).eqns
        (product,) = [e for e in equations if e.primitive.name == "dot_general"]
        return str(product.outvars[0].aval.dtype)

    assert result() == "float32"
    assert contract(x, kernel, 1).dtype == jnp.bfloat16
    monkeypatch.setattr("joyjax.storage.product.on_cpu", lambda: False)
    assert result() == "bfloat16"


def test_a_product_of_bfloat16_is_rounded_once():
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=size), jnp.bfloat16) for size in ((3, 5, 64), (64, 9)))
    wide = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    np.testing.assert_array_equal(np.asarray(contract(x, kernel, 1)), np.asarray(jnp.asarray(wide, jnp.bfloat16)))


def test_gelu_is_rounded_once():
    x = np.linspace(-6, 6, 4001)
    x = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)
    wide = x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    got = jax.jit(gelu)(jnp.asarray(x, jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    error = np.abs(np.asarray(got, np.float64) - wide)
    assert np.all(error <= 2.0**-8 * np.abs(wide) + 1e-6)  # half a unit in the last place; near -6, 1 + tanh cancels
