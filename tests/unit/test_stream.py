"""Filling a network from safetensors: dtypes, forms, places, and that nothing is read before all is known to fit."""

import threading
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from joyjax.convert import stream
from joyjax.convert.finite import all_finite
from joyjax.convert.rules import match
from joyjax.convert.safetensors import Tensors
from joyjax.errors import CheckpointError, MeshError
from joyjax.layers.stored import array_leaves, quantized
from joyjax.layers.weights import leaves
from joyjax.sharding.build import BUILDERS, Transfers

CONFIG = toy.ToyConfig()


@pytest.fixture
def folder(tmp_path):
    toy.save_sharded(tmp_path, toy.tensors(CONFIG), 3)
    return tmp_path


def expected(named) -> dict[str, np.ndarray]:
    """Return the parameters made of these tensors, in the tensors' dtype."""
    shapes = {path: leaf.shape for path, leaf in leaves(toy.TOY.abstract(CONFIG, jnp.float32).state).items()}
    found = match(toy.rules(CONFIG), toy.TOY.ignored, {k: v.shape for k, v in named.items()}, shapes, where="test")
    return {m.target: m.parameter(named[m.source]) for m in found}


def test_every_parameter_gets_its_values(folder):
    weights = stream.fill(toy.TOY, CONFIG, Tensors.open(folder), jnp.float32)
    filled, wanted = leaves(weights.state), expected(toy.tensors(CONFIG))
    assert filled.keys() == wanted.keys()
    for path, leaf in filled.items():
        np.testing.assert_array_equal(leaf[...], wanted[path])
    assert isinstance(weights.module(), toy.Toy)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_are_cast_to_the_networks_dtypes(tmp_path, stored, dtype):
    named = toy.tensors(CONFIG, stored)
    save_file(named, tmp_path / "model.safetensors")
    filled = leaves(stream.fill(toy.TOY, CONFIG, Tensors.open(tmp_path), jnp.dtype(dtype)).state)
    for path, value in expected(named).items():
        wanted = "float32" if path.endswith("norm.scale") else dtype
        assert filled[path].dtype == wanted, path
        np.testing.assert_array_equal(np.asarray(filled[path][...]), value.astype(wanted))


def test_a_mesh_places_parameters_by_their_logical_axes(folder):
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("cfg", "tensor"))
    filled = leaves(stream.fill(toy.TOY, CONFIG, Tensors.open(folder), jnp.float32, mesh).state)
    kernel = filled["blocks.1.qkv.kernel"][...]
    assert kernel.sharding.spec == PartitionSpec(None, None, "tensor", None)
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(12, 3, 2, 2)}
    assert len(kernel.addressable_shards) == 8
    assert filled["first.kernel"][...].sharding.is_fully_replicated
    for path, value in expected(toy.tensors(CONFIG)).items():
        np.testing.assert_array_equal(filled[path][...], value)


def device_with_its_own_memory(monkeypatch):
    for module in ("joyjax.sharding.build", "joyjax.convert.stream"):
        monkeypatch.setattr(f"{module}.shares_memory", lambda device: False)


@pytest.mark.parametrize("split", [False, True])
def test_another_device_gets_kernels_as_they_are_in_the_file(folder, monkeypatch, split):
    """It transposes them itself; to the network the result is the same."""
    device_with_its_own_memory(monkeypatch)
    monkeypatch.setattr("joyjax.sharding.build.AHEAD_BYTES", 1)
    orders, plain = {}, stream.ReadPlan.read

    def seen(self, found, dtype, part=None, *, order=None, pool=None):
        value = plain(self, found, dtype, part, order=order, pool=pool)
        assert value.flags.c_contiguous
        orders[found.target] = order
        return value

    monkeypatch.setattr(stream.ReadPlan, "read", seen)
    mesh = Mesh(np.array(jax.devices()[:2]), ("tensor",)) if split else None
    filled = leaves(stream.fill(toy.TOY, CONFIG, Tensors.open(folder), jnp.bfloat16, mesh).state)
    for path, value in expected(toy.tensors(CONFIG)).items():
        held = filled[path][...]
        np.testing.assert_array_equal(held, value.astype(held.dtype), err_msg=path)
    assert orders["first.kernel"] == (1, 0)
    assert orders["blocks.1.qkv.kernel"] == (1, 2, 3, 0)
    assert orders["first.bias"] is None


def test_another_devices_arrays_are_built_side_by_side(folder, monkeypatch):
    device_with_its_own_memory(monkeypatch)
    together, plain = threading.Barrier(2, timeout=10), stream.ReadPlan.read
    first = iter([True] * 2)

    def seen(self, *arguments, **options):
        if next(first, False):
            together.wait()  # a second thread must come
        return plain(self, *arguments, **options)

    monkeypatch.setattr(stream.ReadPlan, "read", seen)
    done = []
    weights = stream.fill(toy.TOY, CONFIG, Tensors.open(folder), jnp.float32, progress=lambda *each: done.append(each))
    filled = leaves(weights.state)
    for path, value in expected(toy.tensors(CONFIG)).items():
        np.testing.assert_array_equal(filled[path][...], value)
    assert done == sorted(done)
    assert done[-1][0] == done[-1][1]


def test_a_fault_ends_the_building_of_the_others(folder, monkeypatch):
    device_with_its_own_memory(monkeypatch)
    read, plain = [], stream.ReadPlan.read

    def faulty(self, found, *arguments, **options):
        read.append(found.target)
        if len(read) > 1:
            time.sleep(0.05)
            return plain(self, found, *arguments, **options)
        raise CheckpointError("damaged")

    monkeypatch.setattr(stream.ReadPlan, "read", faulty)
    with pytest.raises(CheckpointError, match="damaged"):
        stream.fill(toy.TOY, CONFIG, Tensors.open(folder), jnp.float32)
    assert len(read) <= BUILDERS + 1 < len(expected(toy.tensors(CONFIG)))


@pytest.mark.parametrize("split", [False, True])
def test_a_large_tensor_is_read_in_pieces(folder, monkeypatch, split):
    """On a device with a memory of its own."""
    monkeypatch.setattr("joyjax.sharding.build.PIECE_BYTES", 200)
    device_with_its_own_memory(monkeypatch)
    sizes, plain = [], Tensors.fill

    def measured(self, name, view, ranges, target, **options):
        sizes.append(target.nbytes)
        return plain(self, name, view, ranges, target, **options)

    monkeypatch.setattr(Tensors, "fill", measured)
    mesh = Mesh(np.array(jax.devices()[:2]), ("tensor",)) if split else None
    filled = leaves(stream.fill(toy.TOY, CONFIG, Tensors.open(folder), jnp.float32, mesh).state)
    for path, value in expected(toy.tensors(CONFIG)).items():
        np.testing.assert_array_equal(filled[path][...], value, err_msg=path)
    largest = max(leaf.size * 4 for leaf in filled.values())
    assert largest > 2000
    assert max(sizes) <= 768  # queries, keys or values: what lies in one run in the file
    assert len(sizes) > 1.5 * len(filled)


def test_a_mesh_that_does_not_fit_is_refused_before_reading(folder, monkeypatch):
    monkeypatch.setattr(Tensors, "fill", lambda *_, **__: pytest.fail("read"))
    mesh = Mesh(np.array(jax.devices()[:3]), ("tensor",))
    with pytest.raises(MeshError, match="blocks.0.out.kernel"):
        stream.fill(toy.TOY, CONFIG, Tensors.open(folder), jnp.float32, mesh)


def test_tensors_that_do_not_fit_are_refused_before_reading(tmp_path, monkeypatch):
    named = toy.tensors(CONFIG)
    named["first.weight"] = named["first.weight"].T.copy()
    del named["layers.1.out.bias"]
    save_file(named, tmp_path / "model.safetensors")
    monkeypatch.setattr(Tensors, "fill", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(CheckpointError) as raised:
        stream.fill(toy.TOY, CONFIG, Tensors.open(tmp_path), jnp.float32)
    assert all(part in str(raised.value) for part in (str(tmp_path), "first.weight", "layers.1.out.bias"))


@pytest.mark.parametrize("dtype", ["int8", "float64", "float8_e4m3fn"])
def test_parameters_of_another_kind_are_refused(tmp_path, dtype):
    named = toy.tensors(CONFIG)
    named["first.weight"] = named["first.weight"].astype(dtype)
    save_file(named, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"tensor first.weight is {dtype}"):
        stream.fill(toy.TOY, CONFIG, Tensors.open(tmp_path), jnp.float32)


def test_an_ignored_tensor_may_be_of_any_kind(tmp_path):
    named = toy.tensors(CONFIG)
    save_file({**named, "unused.7": np.ones(4, np.int64)}, tmp_path / "model.safetensors")
    stream.fill(toy.TOY, CONFIG, Tensors.open(tmp_path), jnp.float32)


def test_progress_counts_the_bytes_that_are_used(folder):
    calls = []
    plan = stream.plan(toy.TOY, CONFIG, Tensors.open(folder), jnp.bfloat16)
    plan.fill(progress=lambda done, total: calls.append((done, total)))
    used = sum(array.nbytes for name, array in toy.tensors(CONFIG).items() if name != "unused.7")
    assert calls[-1] == (used, used) == (plan.nbytes, plan.nbytes)
    assert calls == sorted(calls)
    assert len(calls) == len(plan.matches)


# Quantized while it is read


def same_arrays(ours, theirs) -> None:
    ours, theirs = array_leaves(ours.state), array_leaves(theirs.state)
    assert ours.keys() == theirs.keys()
    for path, array in ours.items():
        assert array.value.dtype == theirs[path].value.dtype
        assert np.asarray(array.value).tobytes() == np.asarray(theirs[path].value).tobytes(), path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("piece", [200, 2**24])
def test_reading_quantizes_as_the_loaded_network_would_be(folder, dtype, piece, monkeypatch):
    monkeypatch.setattr("joyjax.storage.quantize.PIECE_BYTES", piece)
    exact = stream.fill(toy.TOY, CONFIG, Tensors.open(folder), jnp.dtype(dtype))
    small = stream.fill(toy.TOY, CONFIG, Tensors.open(folder), jnp.dtype(dtype), storage="float8")
    monkeypatch.undo()
    same_arrays(small, quantized(exact, "float8"))
    assert array_leaves(small.state)["blocks.0.out.kernel.q"].value.dtype == jnp.float8_e4m3fn
    assert array_leaves(small.state)["first.kernel"].value.dtype == dtype


@pytest.mark.parametrize("piece", [200, 2**24])
@pytest.mark.parametrize("devices", [4, 8])
def test_a_mesh_places_what_is_quantized_by_the_axes_of_the_kernel(folder, piece, devices, monkeypatch):
    monkeypatch.setattr("joyjax.storage.quantize.PIECE_BYTES", piece)
    mesh = Mesh(np.array(jax.devices()[:devices]), ("tensor",))
    small = stream.fill(toy.TOY, CONFIG, Tensors.open(folder), jnp.float32, mesh, storage="float8")
    own = {path: array.value for path, array in array_leaves(small.state).items()}
    for path, spec in (
        ("qkv.kernel.q", PartitionSpec(None, "tensor", None, None)),
        ("qkv.kernel.scale", PartitionSpec(None, "tensor", None)),
        ("out.kernel.q", PartitionSpec(None, "tensor", None)),
    ):
        array = own[f"blocks.1.{path}"]
        assert array.sharding.is_equivalent_to(NamedSharding(mesh, spec), array.ndim)
    assert own["blocks.1.out.kernel.scale"].sharding.is_fully_replicated  # it has no axis that the kernel is split by
    same_arrays(small, stream.fill(toy.TOY, CONFIG, Tensors.open(folder), jnp.float32, storage="float8"))
    mesh = Mesh(np.array(jax.devices()[:3]), ("tensor",))
    with pytest.raises(MeshError, match="blocks.0.out.kernel has 8 heads, which 3 devices"):
        stream.fill(toy.TOY, CONFIG, Tensors.open(folder), jnp.float32, mesh, storage="float8")


def test_one_kernel_at_a_time_is_there_before_it_is_quantized(folder, monkeypatch):
    """What was read of a kernel is freed before the next is read: the peak is one leaf above the result."""
    monkeypatch.setattr("joyjax.storage.quantize.PIECE_BYTES", 200)
    read, most, plain = [], [], stream.build

    def spied(shape, *arguments):
        most.append(sum(reference() is not None for reference in read))
        array = plain(shape, *arguments)
        if len(shape) == 4 and shape[-1] == CONFIG.width:  # a kernel of queries, keys and values, outputs first
            read.append(weakref.ref(array))
        return array

    monkeypatch.setattr(stream, "build", spied)
    stream.fill(toy.TOY, CONFIG, Tensors.open(folder), jnp.float32, storage="float8")
    assert len(read) == 6  # two kernels in three pieces each
    assert max(most) == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_value_that_is_not_finite_is_found_in_any_dtype(dtype, value):
    array = np.linspace(-400, 400, 2**18 + 7, dtype=np.float32).astype(dtype).reshape(-1, 1)
    assert all_finite(array)
    assert all_finite(array.T[:, ::2])
    array[-3] = value  # infinity is NaN in float8_e4m3fn
    assert not all_finite(array)
    assert all_finite(np.arange(9, dtype=np.int8))


def test_what_is_on_its_way_to_a_device_is_bounded(monkeypatch):
    waited = []
    monkeypatch.setattr("joyjax.sharding.build.AHEAD_BYTES", 100)
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    transfers, arrays = Transfers(), [np.full(10, n, np.float32) for n in range(5)]  # of 40 bytes
    for array in arrays:
        assert transfers.add({"kernel": array})["kernel"] is array
    assert [each["kernel"] for each in waited] == arrays[:3]  # the oldest first
