"""Every kernel compiled for an H100 that is not there: through lowering, PTX and ptxas."""

import dataclasses
import functools

import gpu_compile
import jax
import jax.numpy as jnp
import pytest
import qwen_full_size
from collectives import count_collectives
from full_size import stage
from jax.sharding import NamedSharding, PartitionSpec

from joyjax.kernels.attention import attention
from joyjax.kernels.cases import SHAPES, Shape, cases
from joyjax.kernels.choice import SELECTING, Kernels
from joyjax.kernels.modulate_pallas import WIDEST
from joyjax.sharding.attention import partitioned_attention
from joyjax.sharding.place import on_shards

pytestmark = [
    pytest.mark.jax,
    pytest.mark.skipif(gpu_compile.missing_packages() is not None, reason=str(gpu_compile.missing_packages())),
]

CALLS = {"mosaic": "mosaic_gpu_v2", "triton": "__gpu$xla.gpu.triton"}
COMPILED = [
    *(("mosaic", case) for shape in ("joyimage", "joyimage, odd") for case in cases(shape)),
    *(("mosaic", case) for case in cases("joyimage, tensor=8")),
    *(("mosaic", case) for case in cases("qwen-image-edit") if "residual" in case.operation),
    *(("mosaic", case) for case in cases("widest", Shape(1, 9, 3, WIDEST // 128, 128, WIDEST))[2:4]),
    *(("mosaic", case) for case in cases("float32", SHAPES["joyimage, odd"], jnp.float32)[3:]),
    *(("triton", case) for case in cases("qwen-image-edit")[3:]),
]


@pytest.mark.parametrize(
    ("how", "case"), COMPILED, ids=lambda x: x if isinstance(x, str) else f"{x.shape}-{x.operation}"
)
def test_kernels(how, case):
    compiled, used = gpu_compile.kernel_resources(functools.partial(case.function, implementation=how), *case.arguments)
    assert dict(gpu_compile.custom_calls(compiled)) == {CALLS[how]: 1}
    tokens = max(x.size * x.dtype.itemsize for x in jax.tree.leaves(case.arguments))
    if case.shape != "float32" or case.operation != "qk_norm_rope":
        assert compiled.memory_analysis().temp_size_in_bytes < tokens / 100  # nothing as large as tokens is copied
    if used:  # ptxas is silent about a kernel that it compiled before
        assert used["spills"] == 0
        assert used["registers"] <= 255


def test_what_xla_makes_of_a_norm():
    """One fusion, and with a residual another that reads the same again for its sum: what docs/kernels.md says."""
    for case, more in zip(cases("joyimage")[:4], (0, 0, 1, 2), strict=True):  # select01 compares the index apart
        compiled = gpu_compile.compile_for_gpu(case.function, *case.arguments)
        assert not gpu_compile.custom_calls(compiled)
        found = gpu_compile.fusions(compiled)
        assert (found["Custom"], found["Loop"]) == (1, more)
        assert compiled.memory_analysis().temp_size_in_bytes < 2**20


def test_a_kernel_on_shards_gathers_nothing():
    mesh = gpu_compile.gpu_mesh({"cfg": 2, "sequence": 4})
    for case in (cases("joyimage")[2], cases("joyimage")[4]):
        axes = [("batch", "sequence") if x.ndim > 2 else ("batch",) for x in jax.tree.leaves(case.arguments)]
        if case.operation == "qk_norm_rope":
            axes[2:6] = [(None,)] * 4
        leaves, tree = jax.tree.flatten(case.arguments)
        spec = {"batch": "cfg", "sequence": "sequence", None: None}
        specs = [PartitionSpec(*map(spec.get, own)) for own in axes]
        placed = [
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, own))
            for x, own in zip(leaves, specs, strict=True)
        ]
        names = tuple(own + (None,) * (x.ndim - len(own)) for own, x in zip(axes, leaves, strict=True))
        results = jax.tree.map(
            lambda x: ("batch", "sequence") + (None,) * (x.ndim - 2), jax.eval_shape(case.function, *case.arguments)
        )

        def run(*leaves, case=case, tree=tree, names=names, results=results):
            def local(*parts):
                return case.function(*jax.tree.unflatten(tree, parts), implementation="mosaic")

            return on_shards(local, names, results)(*leaves)

        compiled = gpu_compile.compile_for_gpu(run, *placed, mesh=mesh)
        assert gpu_compile.custom_calls(compiled)["mosaic_gpu_v2"] == 1
        assert not count_collectives(compiled.as_text())


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({}, id="alone", marks=pytest.mark.nightly),
        pytest.param({"cfg": 2, "sequence": 2, "tensor": 2}, id="on a mesh"),
    ],
)
def test_a_step_with_kernels(sizes):
    """All of a block's norms and its rotation are kernels, and devices exchange what they do without them."""
    mesh = gpu_compile.gpu_mesh(sizes) if sizes else gpu_compile.gpu_mesh()
    step, (weights, *arguments) = stage("denoise_step", mesh, layers=2)
    chosen = dataclasses.replace(weights, kernels=Kernels("mosaic", "mosaic", "mosaic"))
    own, plain = (gpu_compile.compile_for_gpu(step, each, *arguments, mesh=mesh) for each in (chosen, weights))
    calls = gpu_compile.custom_calls(own)
    assert calls["mosaic_gpu_v2"] == 5 + 4  # the last block has no text to finish
    assert calls["__cudnn$fmhaSoftmax"] == 2
    assert "mosaic_gpu_v2" not in gpu_compile.custom_calls(plain)
    assert count_collectives(own.as_text()) == count_collectives(plain.as_text())
    working = [program.memory_analysis().temp_size_in_bytes for program in (own, plain)]
    assert working[0] <= 1.05 * working[1]


@pytest.mark.nightly  # the kernels themselves are compiled daily, at Qwen-Image's width
@pytest.mark.parametrize(
    "sizes",
    [pytest.param({}, id="alone"), pytest.param({"cfg": 2, "sequence": 2, "tensor": 2}, id="on a mesh")],
)
def test_a_step_whose_references_have_time_0(sizes):
    """Of each block, both norms of the image are kernels that select by token."""
    mesh = gpu_compile.gpu_mesh(sizes) if sizes else gpu_compile.gpu_mesh()
    step, (weights, *arguments) = qwen_full_size.step(mesh, 2, references=4096, zero_cond_t=True)
    chosen = dataclasses.replace(weights, kernels=Kernels(**dict.fromkeys(SELECTING, "mosaic")))
    own, plain = (gpu_compile.compile_for_gpu(step, each, *arguments, mesh=mesh) for each in (chosen, weights))
    calls = gpu_compile.custom_calls(own)
    assert calls["mosaic_gpu_v2"] == 2 + 1 + 2  # norms of both blocks, the first one's residual; rotations
    assert calls["__cudnn$fmhaSoftmax"] == 2
    assert "mosaic_gpu_v2" not in gpu_compile.custom_calls(plain)
    assert count_collectives(own.as_text()) == count_collectives(plain.as_text())
    working = [program.memory_analysis().temp_size_in_bytes for program in (own, plain)]
    assert working[0] <= 1.1 * working[1]


def test_attention_is_cudnn_and_keeps_no_scores():
    shape = SHAPES["joyimage"]
    vectors = jax.ShapeDtypeStruct((2, shape.images + shape.texts, shape.heads, shape.width), jnp.bfloat16)
    lengths = jax.ShapeDtypeStruct((2,), jnp.int32)

    def run(query, key, value, lengths):
        return attention(query, key, value, lengths=lengths)

    compiled = gpu_compile.compile_for_gpu(run, vectors, vectors, vectors, lengths)
    assert dict(gpu_compile.custom_calls(compiled)) == {"__cudnn$fmhaSoftmax": 1}
    assert compiled.memory_analysis().temp_size_in_bytes < 2**12

    def loss(*arguments):
        return jnp.sum(run(*arguments).astype(jnp.float32))

    compiled = gpu_compile.compile_for_gpu(jax.grad(loss, (0, 1, 2)), vectors, vectors, vectors, lengths)
    assert set(gpu_compile.custom_calls(compiled)) == {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}

    mesh = gpu_compile.gpu_mesh({"tensor": 8})
    split = jax.ShapeDtypeStruct(
        vectors.shape, vectors.dtype, sharding=NamedSharding(mesh, PartitionSpec(None, None, "tensor"))
    )
    compiled = gpu_compile.compile_for_gpu(run, split, split, split, lengths, mesh=mesh)
    assert dict(gpu_compile.custom_calls(compiled)) == {"__cudnn$fmhaSoftmax": 1}
    assert not count_collectives(compiled.as_text())


@pytest.mark.parametrize(
    ("sizes", "key_heads", "by_cudnn"),
    [({"tensor": 2}, 4, True), ({"cfg": 2}, 2, True), ({"sequence": 2}, 4, False), ({"tensor": 8}, 4, False)],
)
def test_attention_that_the_partitioner_splits(sizes, key_heads, by_cudnn):
    """cuDNN's call is no program where a sequence is split, or where key heads are whole and query heads are not."""
    mesh = gpu_compile.gpu_mesh(sizes)

    def tokens(heads: int) -> jax.ShapeDtypeStruct:
        shape, names = (2, 64, heads, 64), ("cfg", "sequence", "tensor")
        spec = [
            name if name in sizes and size % sizes[name] == 0 else None
            for name, size in zip(names, shape[:3], strict=True)
        ]
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    arguments = tokens(8), tokens(key_heads), tokens(key_heads)
    compiled = gpu_compile.compile_for_gpu(functools.partial(partitioned_attention, causal=True), *arguments, mesh=mesh)
    assert ("__cudnn$fmhaSoftmax" in gpu_compile.custom_calls(compiled)) == by_cudnn
    if not by_cudnn:
        with pytest.raises(jax.errors.JaxRuntimeError, match="custom_partitioner"):
            gpu_compile.compile_for_gpu(functools.partial(attention, causal=True), *arguments, mesh=mesh)
