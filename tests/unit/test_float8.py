"""Linear maps in eight bits: how near they come, what they take, on a mesh, and that a GPU multiplies eight bits."""

import functools

import gpu_compile
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from meshes import CONFIG, draw, make_condition, make_weights, mesh_of
from PIL import Image

import joyjax
from joyjax.convert.joyimage import TRANSFORMER
from joyjax.errors import JoyJaxError, RequestError
from joyjax.families.joyimage import FLOAT8
from joyjax.layers.linear import Linear
from joyjax.layers.weights import leaves
from joyjax.storage.float8 import Float8Linear, check_linear, quantize, quantize_linears

pytestmark = pytest.mark.jax

HALF = 2.0**-4  # of a number, the most that rounding to three bits behind the first changes


def make_linear(features_in, features_out, dtype=jnp.float32, bias=True) -> Linear:
    axes = {"axes_in": (None,) * len(features_in), "axes_out": (None,) * len(features_out)}
    linear = Linear(features_in, features_out, **axes, bias=bias, dtype=dtype, rngs=nnx.Rngs(0))
    if bias:
        linear.bias = nnx.Param(draw(1, *features_out).astype(dtype), axes=axes["axes_out"])
    return linear


def test_numbers_and_scale_give_the_array_back():
    x = draw(0, 5, 64) * jnp.asarray([1e-6, 1.0, 1e4, 0.0, 1e-30])[:, None]
    numbers, scale = quantize(x, 1)
    assert (numbers.dtype, scale.shape) == (jnp.float8_e4m3fn, (5, 1))
    assert np.isfinite(np.asarray(numbers, np.float32)).all()
    back = np.asarray(numbers, np.float32) * np.asarray(scale)
    smallest = np.abs(np.asarray(x)).max(1, keepdims=True) / 448 * 2.0**-9
    assert (np.abs(back - x) <= HALF * np.abs(np.asarray(x)) + smallest).all()
    assert (np.abs(np.asarray(numbers, np.float32)).max(1)[[0, 1, 2, 4]] == 448).all()


@pytest.mark.parametrize(
    ("features_in", "features_out", "part"),
    [((64,), (3, 4, 16), ()), ((64,), (3, 4, 16), (1,)), ((64,), (3, 4, 16), (0, 1)), ((4, 16), (96,), ())],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_linear_map_is_near_the_exact_one(features_in, features_out, part, dtype):
    linear = make_linear(features_in, features_out, dtype)
    x = draw(2, 2, 7, *features_in).astype(dtype)
    exact = np.asarray(linear(x, *part), np.float32)
    got = Float8Linear(linear, None, "x")(x, *part)
    assert (got.dtype, got.shape) == (jnp.dtype(dtype), exact.shape)
    error = np.linalg.norm(np.asarray(got, np.float32) - exact) / np.linalg.norm(exact)
    assert 0.005 < error < 0.05


def test_channels_and_rows_of_any_size_have_their_own_scale():
    linear = make_linear((64,), (8,), bias=False)
    sizes = 10.0 ** jnp.arange(-4.0, 4.0)
    linear.kernel = nnx.Param(linear.kernel[...] * sizes, axes=(None, None))
    x = draw(3, 8, 64) * sizes[::-1, None]
    exact, got = np.asarray(linear(x)), np.asarray(Float8Linear(linear, None, "x")(x))
    size = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(linear.kernel[...], axis=0)
    assert (np.abs(got - exact) < 0.02 * size).all()


@functools.cache
def networks():
    exact = make_weights()
    return exact, quantize_linears(exact, FLOAT8, None)


@jax.jit
def predict(weights, latents, condition):
    return weights.module()(latents, jnp.full((latents.shape[0],), 500.0), condition)


def test_the_transformer_in_eight_bits(error):
    exact, small = networks()
    condition = make_condition(2, 1, (16, 48, 24), ragged=True)
    both = [predict(weights, draw(4, 2, 48, 16), condition) for weights in (exact, small)]
    assert 0.005 < error(both[1], both[0]) < 0.2
    kinds = {path: leaf.dtype for path, leaf in leaves(small.state).items()}
    eight = sorted(path for path, kind in kinds.items() if kind == jnp.float8_e4m3fn)
    assert eight == sorted(
        f"blocks.{n}.{stream}.{name}.kernel"
        for n in range(2)
        for stream in ("img", "txt")
        for name in ("qkv", "out", "up", "down")
    )
    # An edit of a batch does not depend on its neighbour. In another batch a last bit may round an eight-bit input to
    # its neighbour, which moves one number by 1e-4 of the largest; one scale for all rows would move the norm by 0.03.
    own = jax.tree.map(lambda rows: rows[1:], condition)
    alone = predict(small, draw(4, 2, 48, 16)[1:], own)
    together, alone = np.asarray(both[1][1:, :45]), np.asarray(alone[:, :45])
    assert np.linalg.norm(together - alone) < 1e-3 * np.linalg.norm(alone)  # measured: 1e-7 to 1e-4


def test_on_a_mesh():
    _, small = networks()
    mesh = mesh_of(cfg=2, sequence=2, tensor=2)
    spread = quantize_linears(make_weights(CONFIG, mesh), FLOAT8, mesh)
    kernel = leaves(spread.state)["blocks.0.img.down.kernel"][...]
    assert kernel.addressable_shards[0].data.shape == (64, 128)
    condition = make_condition(2, 1, (16, 48, 24), ragged=False)
    alone = np.asarray(predict(small, draw(4, 2, 48, 16), condition))
    with jax.set_mesh(mesh):
        found = np.asarray(predict(spread, draw(4, 2, 48, 16), condition))
    # a sum in another order may round an eight-bit input to its neighbour
    assert np.linalg.norm(found - alone) / np.linalg.norm(alone) < 0.02


def test_what_is_refused():
    with pytest.raises(RequestError, match="linear is 'int4'; choose one of: exact, float8"):
        check_linear("int4", FLOAT8, "JoyImage-Edit", jax.devices()[0])
    with pytest.raises(RequestError, match="linear is 'float8', but Other has no such form; leave it out"):
        check_linear("float8", (), "Other", jax.devices()[0])

    class Ampere:
        platform, compute_capability, device_kind = "gpu", "8.6", "NVIDIA A40"

    with pytest.raises(JoyJaxError, match=r"NVIDIA A40 has compute capability 8.6 and eight-bit floats need 8.9"):
        check_linear("float8", FLOAT8, "JoyImage-Edit", Ampere())
    Ampere.compute_capability = "9.0"
    assert check_linear("float8", FLOAT8, "JoyImage-Edit", Ampere())


@pytest.mark.filterwarnings("ignore::joyjax.AdviceWarning")
def test_an_edit_in_eight_bits():
    exact, small = (joyjax.load(linear=linear) for linear in ("exact", "float8"))
    kernels = {
        path: sum(
            leaf.nbytes
            for name, leaf in leaves(pipeline.weights["transformer"].state).items()
            if name.startswith("blocks.") and name.endswith(".kernel")
        )
        for path, pipeline in (("exact", exact), ("small", small))
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
    abstract = TRANSFORMER.abstract(CONFIG, jnp.bfloat16)
    state, tree = jax.tree.flatten(abstract)
    small = jax.eval_shape(lambda *flat: quantize_linears(tree.unflatten(flat), FLOAT8, None), *state)
    condition = make_condition(2, 1, (16, 64, 32), ragged=False)
    flat, tree_of_all = jax.tree.flatten((small, draw(4, 2, 64, 16), condition))
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in flat]
    compiled = gpu_compile.compile_for_gpu(lambda *flat: predict(*tree_of_all.unflatten(flat)), *shapes)
    calls = gpu_compile.custom_calls(compiled)
    # of the last block: two parts of the image's first map, keys and values of the text's, and the image's other three
    assert calls["__cublas$lt$matmul$f8"] == 8 + 6, calls
