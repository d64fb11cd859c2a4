"""Kernels in other forms: how near float8 comes, its gradient, adapters, programs, and what a GPU multiplies."""

import dataclasses
import functools

import gpu_compile
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import counting
from flax import nnx
from meshes import CONFIG, draw, make_condition, make_weights, mesh_of
from PIL import Image

import joyjax
from joyjax.convert.joyimage import TRANSFORMER
from joyjax.convert.source.model import model_folder
from joyjax.errors import JoyJaxError, RequestError
from joyjax.families.joyimage import EDIT
from joyjax.layers.linear import Linear
from joyjax.layers.stored import array_leaves, nbytes, quantized, storable, storage_faults, with_storage
from joyjax.layers.weights import Weights, count_parameters, leaves
from joyjax.runtime.storage import AS_STORED, check_form, check_options
from joyjax.storage import float8, forms
from joyjax.storage.adapted import Adapted
from joyjax.storage.float8 import Float8, quantize
from joyjax.storage.quantize import quantize_array

pytestmark = pytest.mark.jax

HALF = 2.0**-4  # of a value, the most that rounding to three bits behind the first changes
FLOAT8_MAPS = sorted(
    f"blocks.{n}.{stream}.{name}.kernel"
    for n in range(CONFIG.num_layers)
    for stream in ("img", "txt")
    for name in ("qkv", "out", "up", "down")
)
SHAPES = [((64,), (3, 4, 16), ()), ((64,), (3, 4, 16), (1,)), ((64,), (3, 4, 16), (0, 1)), ((4, 16), (96,), ())]


def make_linear(features_in, features_out, dtype=jnp.float32, bias=True) -> Linear:
    axes = {"axes_in": (None,) * len(features_in), "axes_out": (None,) * len(features_out)}
    linear = Linear(features_in, features_out, **axes, bias=bias, storable=True, dtype=dtype, rngs=nnx.Rngs(0))
    if bias:
        linear.bias = linear.bias.replace(draw(1, *features_out).astype(dtype))
    return linear


def in_float8(linear: Linear) -> Linear:
    return quantized(Weights.of(linear), "float8").module()


def dequantized(leaf: Float8) -> np.ndarray:
    """Return the kernel `[*in, *out]` that a leaf stands for, in float32."""
    q, scale = np.asarray(leaf.q, np.float32), np.asarray(leaf.scale)
    kernel = q * scale.reshape(scale.shape + (1,) * (q.ndim - scale.ndim))
    return kernel.transpose(*range(scale.ndim, q.ndim), *range(scale.ndim))


# The leaf


def check_values_and_scale_give_the_array_back():
    x = draw(0, 5, 64) * jnp.asarray([1e-6, 1.0, 1e4, 0.0, 1e-30])[:, None]
    q, scale = quantize(x, 1)
    assert (q.dtype, scale.shape) == (jnp.float8_e4m3fn, (5, 1))
    assert np.isfinite(np.asarray(q, np.float32)).all()
    back = np.asarray(q, np.float32) * np.asarray(scale)
    smallest = np.abs(np.asarray(x)).max(1, keepdims=True) / 448 * 2.0**-9
    assert (np.abs(back - x) <= HALF * np.abs(np.asarray(x)) + smallest).all()
    assert (np.abs(np.asarray(q, np.float32)).max(1)[[0, 1, 2, 4]] == 448).all()


def test_values_and_scale_give_the_array_back():
    check_values_and_scale_give_the_array_back()


@pytest.mark.parametrize(("features_in", "features_out", "part"), SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_linear_map_is_near_the_exact_one(features_in, features_out, part, dtype):
    linear = make_linear(features_in, features_out, dtype)
    x = draw(2, 2, 7, *features_in).astype(dtype)
    exact = np.asarray(linear(x, *part), np.float32)
    got = in_float8(linear)(x, *part)
    assert (got.dtype, got.shape) == (jnp.dtype(dtype), exact.shape)
    error = np.linalg.norm(np.asarray(got, np.float32) - exact) / np.linalg.norm(exact)
    assert 0.005 < error < 0.05


def check_channels_and_rows_of_any_size_have_their_own_scale():
    linear = make_linear((64,), (8,), bias=False)
    sizes = 10.0 ** jnp.arange(-4.0, 4.0)
    linear.kernel = linear.kernel.replace(linear.kernel[...] * sizes)
    x = draw(3, 8, 64) * sizes[::-1, None]
    exact, got = np.asarray(linear(x)), np.asarray(in_float8(linear)(x))
    size = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(linear.kernel[...], axis=0)
    assert (np.abs(got - exact) < 0.02 * size).all()


def test_channels_and_rows_of_any_size_have_their_own_scale():
    check_channels_and_rows_of_any_size_have_their_own_scale()


def scale_of_the_whole(rows, count):
    """Quantize with the scale of the other axes: one for a column, in place of one for a row."""
    q, scale = quantize(jnp.moveaxis(rows, 0, -1), 1)
    scale = jnp.max(scale) * jnp.ones(rows.shape[: rows.ndim - count])
    return {"q": jnp.clip(rows / jnp.max(scale), -448, 448).astype(q.dtype), "scale": scale}


@pytest.mark.parametrize(
    ("owner", "name", "value", "check"),
    [
        (Float8, "quantize", scale_of_the_whole, check_channels_and_rows_of_any_size_have_their_own_scale),
        (float8, "LARGEST", 480.0, check_values_and_scale_give_the_array_back),
    ],
    ids=["scale of another axis", "past 448, which is NaN"],
)
def test_a_planted_mistake_is_noticed(owner, name, value, check, monkeypatch):
    monkeypatch.setattr(owner, name, value)
    jax.clear_caches()  # the quantizing program would be the right one's
    try:
        with pytest.raises(AssertionError):
            check()
    finally:
        jax.clear_caches()


@pytest.mark.parametrize(("features_in", "features_out", "part"), SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_the_gradient_is_that_of_the_dequantized_product(features_in, features_out, part, dtype, size):
    """Differentiated as it is written, float8 rounds cotangents of 1e-4 to zero."""
    leaf = in_float8(make_linear(features_in, features_out, dtype)).kernel.get_value()
    count, x = len(features_in), draw(2, 2, 7, *features_in).astype(dtype)
    kernel = jnp.asarray(dequantized(leaf))

    def gradient(leaf, x):
        y, backward = jax.vjp(lambda x: forms.contract(x, leaf, count, *part), x)
        cotangent = (size * draw(4, *y.shape)).astype(y.dtype)
        return np.asarray(backward(cotangent)[0], np.float32)

    expected = gradient(kernel, x.astype(jnp.float32)) if dtype == "float32" else gradient(kernel.astype(dtype), x)
    got = gradient(leaf, x)
    assert np.linalg.norm(got - expected) < (1e-5 if dtype == "float32" else 1e-2) * np.linalg.norm(expected)


def test_the_gradient_on_a_mesh():
    leaf = jax.tree.map(np.asarray, in_float8(make_linear((64,), (3, 4, 16))).kernel.get_value())

    def loss(x, leaf):
        return jnp.sum(forms.contract(x, leaf, 1) ** 2)

    alone = jax.jit(jax.grad(loss))(draw(2, 2, 7, 64), leaf)
    with jax.set_mesh(mesh_of(data=2)):
        np.testing.assert_allclose(jax.jit(jax.grad(loss))(draw(2, 2, 7, 64), leaf), alone, rtol=1e-3, atol=1e-3)


# Adapters beside a kernel


def adapted(base, features_in, features_out, ranks=4, dtype=jnp.float32) -> Adapted:
    a, b = draw(5, ranks, *features_in) / 8, draw(6, *features_out, ranks) / 2
    return Adapted(base, a.astype(dtype), b.astype(dtype), jnp.linspace(0.25, 1.0, ranks).astype(dtype))


@pytest.mark.parametrize(("features_in", "features_out", "part"), SHAPES)
@pytest.mark.parametrize("form", ["array", "float8"])
def test_an_adapted_kernel_is_its_base_and_the_low_rank_part(features_in, features_out, part, form):
    linear, count = make_linear(features_in, features_out), len(features_in)
    leaf = (linear if form == "array" else in_float8(linear)).kernel.get_value()
    both, x = adapted(leaf, features_in, features_out), draw(2, 2, 7, *features_in)
    delta = np.einsum("nr,r,rm->mn", *(np.asarray(y) for y in (
        both.b.reshape(-1, 4), both.scale, both.a.reshape(4, -1))))  # fmt: skip
    delta = jnp.asarray(delta.reshape(*features_in, *features_out))
    expected = forms.contract(x, leaf, count, *part) + forms.contract(x, delta, count, *part)
    np.testing.assert_allclose(forms.contract(x, both, count, *part), expected, rtol=1e-4, atol=1e-5)
    assert (both.shape, both.size) == (leaf.shape, leaf.size)


def test_an_adapted_kernel_in_a_network():
    """It stands where the array was, trains by its own arrays, and another scale compiles nothing."""
    weights = quantized(Weights.of(make_linear((64,), (96,))), "float8")
    base = leaves(weights.state)["kernel"].get_value()
    bias = leaves(weights.state)["bias"].get_value()

    @jax.jit
    def apply(weights, x):
        return weights.module()(x)

    one = adapted(base, (64,), (96,))
    other = dataclasses.replace(one, scale=-one.scale, a=2 * one.a)
    x = draw(2, 7, 64)
    with counting() as counts:
        y, z = (apply(weights.filled({"kernel": leaf, "bias": bias}), x) for leaf in (one, other))
    assert counts["apply"] == 1
    assert float(jnp.abs(y - z).max()) > 0.1
    own = array_leaves(weights.filled({"kernel": one, "bias": bias}).state)
    assert {path: array.axes for path, array in own.items()} == {
        "kernel.base.q": (None, None),
        "kernel.base.scale": (None,),
        "kernel.a": (None, None),
        "kernel.b": (None, None),
        "kernel.scale": (None,),
        "bias": (None,),
    }

    def loss(a, b):
        return jnp.sum(forms.contract(x, dataclasses.replace(one, a=a, b=b), 1) ** 2)

    for gradient in jax.grad(loss, argnums=(0, 1))(one.a, one.b):
        assert float(jnp.abs(gradient).max()) > 0


# A network


@functools.cache
def networks():
    exact = make_weights()
    return exact, quantized(exact, "float8")


@jax.jit
def predict(weights, latents, condition):
    return weights.module()(latents, jnp.full((latents.shape[0],), 500.0), condition)


def test_the_transformer_in_eight_bits(error):
    exact, small = networks()
    condition = make_condition(2, 1, (16, 48, 24), ragged=True)
    both = [predict(weights, draw(4, 2, 48, 16), condition) for weights in (exact, small)]
    assert 0.005 < error(both[1], both[0]) < 0.2
    kinds = {path: array.value.dtype for path, array in array_leaves(small.state).items()}
    eight = sorted(path for path, kind in kinds.items() if kind == jnp.float8_e4m3fn)
    assert eight == [f"{path}.q" for path in FLOAT8_MAPS]
    # An edit of a batch does not depend on its neighbour. In another batch a last bit may round an eight-bit input to
    # its neighbour, which moves one number by 1e-4 of the largest; one scale for all rows would move the norm by 0.03.
    own = jax.tree.map(lambda rows: rows[1:], condition)
    alone = predict(small, draw(4, 2, 48, 16)[1:], own)
    together, alone = np.asarray(both[1][1:, :45]), np.asarray(alone[:, :45])
    assert np.linalg.norm(together - alone) < 1e-3 * np.linalg.norm(alone)  # measured: 1e-7 to 1e-4


def test_the_network_says_what_may_be_stored():
    abstract = TRANSFORMER.abstract(CONFIG, jnp.bfloat16)
    assert sorted(storable(abstract.state)) == FLOAT8_MAPS
    small = TRANSFORMER.abstract(CONFIG, jnp.bfloat16, "float8")
    assert small.graph == abstract.graph
    assert count_parameters(small.state) == count_parameters(abstract.state)
    kept = set(leaves(abstract.state)) - set(FLOAT8_MAPS)
    assert set(array_leaves(small.state)) == kept | {
        f"{path}.{name}" for path in FLOAT8_MAPS for name in ("q", "scale")
    }
    halves = sum(leaves(abstract.state)[path].size for path in FLOAT8_MAPS)
    scales = sum(leaf.get_value().scale.size for path, leaf in leaves(small.state).items() if path in FLOAT8_MAPS)
    assert nbytes(abstract.state) - nbytes(small.state) == halves - 4 * scales
    assert [component.folder for component in EDIT.components if _storable(component)] == ["transformer"]


def _storable(component) -> list[str]:
    folder = model_folder(None)
    return storable(component.abstract(component.read_config(folder), "float32").state)


def test_storage_of_what_is_not_there():
    state = TRANSFORMER.abstract(CONFIG, jnp.bfloat16).state
    assert storage_faults(state, {FLOAT8_MAPS[0]: "float8"}) == storage_faults(state, None) == []
    [fault] = storage_faults(state, {FLOAT8_MAPS[0]: "int3"})
    assert fault == f"parameter {FLOAT8_MAPS[0]} has the form 'int3'; this joyjax knows float8"
    for path in ("out.kernel", "blocks.0.img.q_norm", "nowhere"):
        [fault] = storage_faults(state, {path: "float8"})
        assert fault.startswith(f"parameter {path} has the form 'float8'; the network has no kernel there")
    with pytest.raises(ValueError, match="form 'int3' is unknown; known: float8"):
        TRANSFORMER.abstract(CONFIG, jnp.bfloat16, "int3")


def test_one_program_a_form():
    exact, small = networks()
    condition = make_condition(1, 1, (16, 16, 8), ragged=False)
    others = [jax.tree.map(lambda x: x * jnp.asarray(2, x.dtype), weights) for weights in (exact, small)]
    with counting() as counts:
        for weights in (exact, small, *others, exact, small):
            predict(weights, draw(4, 1, 16, 16), condition)
    assert counts["predict"] == 2


def test_on_a_mesh():
    _, small = networks()
    mesh = mesh_of(cfg=2, sequence=2, tensor=2)
    spread = quantized(make_weights(CONFIG, mesh), "float8", mesh)
    down = leaves(spread.state)["blocks.0.img.down.kernel"].get_value()
    assert down.q.addressable_shards[0].data.shape == (64, 128)
    assert down.scale.sharding.is_fully_replicated  # the kernel is split along its inputs, which the scale has not
    qkv = leaves(spread.state)["blocks.0.img.qkv.kernel"].get_value()
    assert qkv.q.addressable_shards[0].data.shape == (3, 2, 16, 64)
    assert qkv.scale.addressable_shards[0].data.shape == (3, 2, 16)
    for path, array in array_leaves(spread.state).items():
        assert np.asarray(array.value).tobytes() == np.asarray(array_leaves(small.state)[path].value).tobytes(), path
    condition = make_condition(2, 1, (16, 48, 24), ragged=False)
    alone = np.asarray(predict(small, draw(4, 2, 48, 16), condition))
    with jax.set_mesh(mesh):
        found = np.asarray(predict(spread, draw(4, 2, 48, 16), condition))
    # a sum in another order may round an eight-bit input to its neighbour
    assert np.linalg.norm(found - alone) / np.linalg.norm(alone) < 0.02


@pytest.mark.parametrize("piece", [100, 1000, 2**24])
@pytest.mark.parametrize("host", [False, True])
def test_pieces_of_a_kernel_are_quantized_as_the_whole(piece, host, monkeypatch):
    monkeypatch.setattr("joyjax.storage.quantize.PIECE_BYTES", piece)
    kernel = draw(7, 4, 5, 7, 9)  # [*in, *out], two of each
    leaf = Float8.abstract(kernel.shape, 2, jnp.float32)
    places = dict.fromkeys(("q", "scale"), kernel.sharding)
    got = quantize_array(leaf, 2, places, np.asarray(kernel) if host else kernel)
    q, scale = quantize(kernel.transpose(2, 3, 0, 1), 2)
    np.testing.assert_array_equal(np.asarray(got.q, np.float32), np.asarray(q, np.float32))
    np.testing.assert_array_equal(got.scale, scale[..., 0, 0])
    assert not kernel.is_deleted()


# What is asked for


class Device:
    platform, compute_capability, device_kind = "gpu", "8.6", "NVIDIA A40"


def test_what_is_refused():
    folder = model_folder(None)
    configs = {component.folder: component.read_config(folder) for component in EDIT.components}
    with pytest.raises(RequestError, match="linear is 'int4'; choose one of: exact, float8"):
        check_options(None, "int4")
    with pytest.raises(RequestError, match="quantize is 3; choose one of: exact, float8"):
        check_options(3)
    other = dataclasses.replace(EDIT, name="Other", components=(EDIT.components[0], EDIT.components[2]))
    with pytest.raises(RequestError, match="linear is 'float8', but Other has no such form; leave it out"):
        check_form("float8", folder, other, configs, jax.devices()[0], "linear")
    with pytest.raises(JoyJaxError, match=r"NVIDIA A40 has compute capability 8.6 and eight-bit floats need 8.9"):
        check_form("float8", folder, EDIT, configs, Device())
    newer = Device()
    newer.compute_capability = "9.0"
    check_form("float8", folder, EDIT, configs, newer)


@pytest.mark.parametrize(
    ("quantize", "linear", "form"),
    [
        (None, AS_STORED, None),
        (None, "exact", "exact"),
        ("float8", AS_STORED, "float8"),
        (None, "float8", "float8"),
        ("float8", "float8", "float8"),
        ("exact", "exact", "exact"),
    ],
)
def test_two_names_of_one_option(quantize, linear, form):
    assert check_options(quantize, linear) == form


@pytest.mark.parametrize(("quantize", "linear"), [("float8", "exact"), ("exact", "float8")])
def test_two_names_that_say_different_things(quantize, linear):
    with pytest.raises(RequestError, match=f"quantize is '{quantize}' and linear is '{linear}', .*; give one"):
        joyjax.load(quantize=quantize, linear=linear)


@pytest.mark.filterwarnings("ignore::joyjax.AdviceWarning")
def test_an_edit_in_eight_bits():
    exact, small = (joyjax.load(quantize=quantize) for quantize in (None, "float8"))
    kernels = {
        name: sum(
            array.nbytes
            for path, array in array_leaves(pipeline.weights["transformer"].state).items()
            if path.startswith("blocks.") and path.endswith(ending)
        )
        for name, pipeline, ending in (("exact", exact, ".kernel"), ("small", small, ".kernel.q"))
    }
    assert kernels["exact"] == 2 * kernels["small"]
    picture = Image.new("RGB", (128, 128), "white")
    one, two = (joyjax.edit(pipeline, picture, "add a small red star", steps=2) for pipeline in (exact, small))
    assert (one.settings["linear"], two.settings["linear"]) == ("exact", "float8")
    difference = np.asarray(one.image, np.float64) - np.asarray(two.image)
    assert 25 < 10 * np.log10(255**2 / np.mean(difference**2)) < 60


@pytest.mark.skipif(gpu_compile.missing_packages() is not None, reason=str(gpu_compile.missing_packages()))
def test_a_gpu_multiplies_eight_bits():
    """Each of the sixteen maps but those that no output needs is one call of cuBLASLt in eight bits."""
    small = TRANSFORMER.abstract(CONFIG, jnp.bfloat16, "float8")
    condition = make_condition(2, 1, (16, 64, 32), ragged=False)
    flat, tree_of_all = jax.tree.flatten((small, draw(4, 2, 64, 16), condition))
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in flat]
    compiled = gpu_compile.compile_for_gpu(lambda *flat: predict(*tree_of_all.unflatten(flat)), *shapes)
    calls = gpu_compile.custom_calls(compiled)
    # of the last block: two parts of the image's first map, keys and values of the text's, and the image's other three
    assert calls["__cublas$lt$matmul$f8"] == 8 + 6, calls


def test_what_takes_the_place_of_an_array_keeps_the_network():
    abstract = TRANSFORMER.abstract(CONFIG, jnp.float32)
    small = with_storage(abstract, {FLOAT8_MAPS[3]: "float8"})
    changed = {path for path, leaf in leaves(small.state).items() if isinstance(leaf.get_value(), Float8)}
    assert changed == {FLOAT8_MAPS[3]}
    leaf = leaves(small.state)[FLOAT8_MAPS[3]]
    assert (leaf.shape, jnp.dtype(leaf.dtype)) == (leaves(abstract.state)[FLOAT8_MAPS[3]].shape, jnp.float32)
