"""Kernels on eight devices: each runs on its own part, results are those of one device, and nothing is exchanged."""

import jax
import numpy as np
import pytest
from collectives import count_collectives
from jax.sharding import NamedSharding, PartitionSpec

from joyjax.kernels.cases import Shape, cases, draw
from joyjax.sharding.mesh import parse_mesh
from joyjax.sharding.place import on_shards

pytestmark = pytest.mark.jax

SMALL = Shape(rows=2, images=12, texts=4, heads=8, width=64, channels=512)


def test_a_kernel_on_shards():
    """In Triton, which is plain JAX when it is interpreted; tests/kernels compiles Mosaic GPU for eight GPUs."""
    mesh = parse_mesh("cfg=2,sequence=4")
    for case in cases("small", SMALL, "float32")[:4]:
        arguments = draw(case.arguments)
        expected = jax.tree.leaves(case.function(*arguments))
        # Tokens and their indices are spread, vectors are not.
        names = tuple(
            ("batch", "sequence" if x.shape[1] == SMALL.images else None) + (None,) * (x.ndim - 2) for x in arguments
        )
        results = jax.tree.map(lambda x: ("batch", "sequence", None), jax.eval_shape(case.function, *case.arguments))

        def run(*arguments, case=case, names=names, results=results):
            return on_shards(lambda *parts: case.function(*parts, implementation="triton"), names, results)(*arguments)

        axes = {"batch": "cfg", "sequence": "sequence", None: None}
        specs = [PartitionSpec(*map(axes.get, own)) for own in names]
        placed = [jax.device_put(x, NamedSharding(mesh, own)) for x, own in zip(arguments, specs, strict=True)]
        with jax.set_mesh(mesh):
            compiled = jax.jit(run).lower(*placed).compile()
            found = compiled(*placed)
        assert not count_collectives(compiled.as_text())
        for one, other in zip(jax.tree.leaves(found), expected, strict=True):
            assert len(one.sharding.device_set) == 8
            np.testing.assert_allclose(one, other, atol=1e-5)
