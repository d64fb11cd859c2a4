"""Layers that every network is made of."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

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
