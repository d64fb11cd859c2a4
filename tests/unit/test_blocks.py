"""Reading parts of arrays into place, in blocks made so small that every array has many."""

import os
import queue
import sys
import threading
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from joyjax.convert import blocks
from joyjax.convert.blocks import Source, aligned, reading_threads
from joyjax.reading import stamp

BF16 = np.dtype(ml_dtypes.bfloat16)
BEFORE = 10  # bytes of the file before the array: not a multiple of its entries


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    for name, value in {"BLOCK_BYTES": 64, "TASK_BYTES": 128, "SHORT_RUN": 8, "LONG_ROW": 16, "VECTORS": 3}.items():
        monkeypatch.setattr(blocks, name, value)


def written(folder: Path, array: np.ndarray) -> Source:
    file = folder / "data"
    file.write_bytes(bytes(BEFORE) + array.tobytes() + b"after")
    return Source(file, BEFORE, array.dtype, array.shape, stamp(file))


def values(shape, dtype=np.float32) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


@given(st.data())
def test_any_part_in_any_order_and_dtype(tmp_path_factory, data):
    shape = tuple(data.draw(st.lists(st.integers(1, 9), max_size=4)))
    stored, wanted = (np.dtype(data.draw(st.sampled_from(["float32", "float16", BF16]))) for _ in range(2))
    array = values(shape, stored)
    ranges = [range(*sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size))))) for size in shape]
    order = data.draw(st.permutations(range(len(shape))))
    out = aligned([len(ranges[axis]) for axis in order], wanted)
    with reading_threads() as pool:
        source = written(tmp_path_factory.mktemp("any"), array)
        assert source.fill(out.transpose(np.argsort(order)), ranges, pool=data.draw(st.sampled_from([None, pool])))
    part = array[tuple(slice(each.start, each.stop) for each in ranges)]
    np.testing.assert_array_equal(out, part.astype(wanted).transpose(order))


@pytest.mark.parametrize("dtype", ["float32", "float16", BF16])
@pytest.mark.parametrize("cast", [False, True], ids=["as stored", "cast"])
@pytest.mark.parametrize("turned", [False, True], ids=["in order", "transposed"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_value_that_is_not_finite_is_found_in_every_block(tmp_path, dtype, cast, turned, value):
    shape = (7, 30)
    for place in range(0, 210, 13):
        array = values(shape, dtype)
        array.reshape(-1)[place] = value
        out = np.empty(shape[::-1] if turned else shape, np.float32 if cast else dtype)
        source, target = written(tmp_path, array), out.T if turned else out
        assert not source.fill(target, [*map(range, shape)])
        assert source.fill(target, [*map(range, shape)], check=False)


def test_scattered_entries_are_read_with_what_lies_between(tmp_path, monkeypatch):
    """Of a causal convolution, only the last temporal tap is used: runs of nine entries."""
    array = values((6, 5, 3, 3, 3), BF16)
    calls, plain = [], os.readv
    monkeypatch.setattr(blocks, "SHORT_RUN", 64)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 512)
    monkeypatch.setattr(os, "readv", lambda file, buffers: calls.append(file) or plain(file, buffers))
    out = np.empty((6, 5, 1, 3, 3), BF16)
    source, ranges = written(tmp_path, array), [range(6), range(5), range(2, 3), range(3), range(3)]
    assert source.fill(out, ranges)
    np.testing.assert_array_equal(out, array[:, :, 2:])
    assert len(calls) <= 6  # not 30
    array[2, 3, 0, 0, 0] = np.nan  # in a tap that is not used, but read
    assert not written(tmp_path, array).fill(out, ranges)


@pytest.mark.parametrize("how", ["few bytes a call", "no vectors of buffers"])
def test_systems_that_read_less_at_a_time(tmp_path, monkeypatch, how):
    plain = os.readv
    if how == "no vectors of buffers":
        monkeypatch.delattr(os, "readv")
    else:
        monkeypatch.setattr(os, "readv", lambda file, buffers: plain(file, [buffers[0][:5]]))
    array = values((9, 33))
    out = np.empty((33, 9), np.float32)
    written(tmp_path, array).fill(out.T, [range(9), range(33)])
    np.testing.assert_array_equal(out, array.T)


def test_a_file_that_is_cut_or_changed(tmp_path, monkeypatch):
    array, out = values((40, 16)), np.empty((40, 16), np.float32)
    ranges = [range(40), range(16)]
    with reading_threads() as pool:
        source = written(tmp_path, array)
        with source.file.open("ab") as opened:
            opened.write(b"more")
        with pytest.raises(OSError, match="changed since it was opened"):
            source.fill(out, ranges, pool=pool)
        source.file.write_bytes(source.file.read_bytes()[:-300])
        cut = Source(source.file, BEFORE, array.dtype, array.shape, stamp(source.file))
        with pytest.raises(OSError, match="ends too early"):
            cut.fill(out, ranges, pool=pool)
        source = written(tmp_path, array)
        found = [source.stamp, (0, 0, 0, 0)]
        monkeypatch.setattr(blocks, "stamp", lambda file: found[isinstance(file, int)])
        with pytest.raises(OSError, match="changed while it was read"):
            source.fill(out, ranges, pool=pool)


@pytest.mark.parametrize("size", [1, 5000, blocks.HUGE_BYTES + 6], ids=["small", "larger", "in pages of its own"])
def test_jax_takes_an_aligned_array_as_it_is(size):
    array = aligned((size // 2 + 1,), BF16)
    array[...] = 1
    assert array.ctypes.data % blocks.ALIGNMENT == 0
    taken = jax.device_put(array, jax.devices("cpu")[0])
    assert taken.unsafe_buffer_pointer() == array.ctypes.data
    del array
    assert float(taken[-1]) == 1  # the memory is the new array's


def test_an_array_without_entries():
    assert aligned((3, 0), BF16).shape == (3, 0)


def test_memory_is_used_again():
    memory = blocks.ReusedMemory(4000)
    first = memory.take((10, 10), np.dtype("float32"))
    address = first.ctypes.data
    memory.give(first)
    assert memory.take((50,), np.dtype("float32")).ctypes.data != address  # of another size
    again = memory.take((5, 20, 2), np.dtype("uint16"))
    assert again.ctypes.data == address
    assert again.shape == (5, 20, 2)
    assert again.ctypes.data % 64 == 0
    assert memory.take((10, 10), np.dtype("float32")).ctypes.data != address  # it is taken


def test_little_memory_is_kept():
    memory = blocks.ReusedMemory(1000)
    arrays = [memory.take((100,), np.dtype("float32")) for _ in range(4)]
    addresses = [array.ctypes.data for array in arrays]
    while arrays:
        memory.give(arrays.pop(0))
    found = [memory.take((100,), np.dtype("float32")) for _ in range(2)]
    assert {array.ctypes.data for array in found} == set(addresses[2:])  # the last two


def test_memory_that_is_in_use_is_never_handed_out():
    """One thread takes, as that which reads does, while another gives, as that which checks does."""
    memory, given, taken = blocks.ReusedMemory(8 * 64), queue.SimpleQueue(), 5000
    live, twice, interval = set(), [], sys.getswitchinterval()

    def give() -> None:
        while (array := given.get()) is not None:
            live.discard(array.ctypes.data)
            memory.give(array)
            del array

    giver = threading.Thread(target=give)
    sys.setswitchinterval(1e-6)
    try:
        giver.start()
        for _ in range(taken):
            array = memory.take((64,), np.dtype("uint8"))
            if array.ctypes.data in live:
                twice.append(array.ctypes.data)
            live.add(array.ctypes.data)
            given.put(array)
            del array
    finally:
        given.put(None)
        giver.join()
        sys.setswitchinterval(interval)
    assert not twice


def test_memory_of_jax_is_not_used_again():
    """Arrays of JAX never change: a buffer may be a constant, or another array's."""
    memory = blocks.ReusedMemory(4000)
    theirs = np.asarray(jax.device_put(np.ones(100, np.float32)))
    memory.give(theirs)
    assert memory.take((100,), np.dtype("float32")).ctypes.data != theirs.ctypes.data
