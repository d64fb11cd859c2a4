"""Opening a component's folder: what is read, and what is refused by name."""

import json

import ml_dtypes
import numpy as np
import pytest
import toy
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from joyjax.convert.safetensors import Tensors
from joyjax.errors import CheckpointError

NAMED = {
    "a.weight": np.arange(24, dtype=np.float32).reshape(4, 6),
    "b.weight": np.linspace(-3, 3, 10).reshape(5, 2).astype(ml_dtypes.bfloat16),
    "c.count": np.array(7, np.int64),
}


@pytest.mark.parametrize("stem", ["diffusion_pytorch_model", "model"])
@pytest.mark.parametrize("shards", [None, 1, 2])
def test_one_file_or_shards_under_the_names_of_either_library(tmp_path, stem, shards):
    if shards is None:
        save_file(NAMED, tmp_path / f"{stem}.safetensors")
    else:
        toy.save_sharded(tmp_path, NAMED, shards, stem)
    tensors = Tensors.open(tmp_path)
    assert tensors.shapes == {"a.weight": (4, 6), "b.weight": (5, 2), "c.count": ()}
    assert {name: header.dtype for name, header in tensors.headers.items()} == {
        "a.weight": "float32",
        "b.weight": "bfloat16",
        "c.count": "int64",
    }
    assert {name: header.nbytes for name, header in tensors.headers.items()} == {
        name: array.nbytes for name, array in NAMED.items()
    }
    for name, array in NAMED.items():
        read = tensors.read(name)
        assert read.dtype == array.dtype
        np.testing.assert_array_equal(read, array)
    assert len({header.file for header in tensors.headers.values()}) == (shards or 1)


def test_some_rows_of_a_tensor(tmp_path):
    save_file(NAMED, tmp_path / "model.safetensors")
    rows = Tensors.open(tmp_path).read("b.weight", part=(slice(1, 3), slice(0, 2)))
    assert rows.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(rows, NAMED["b.weight"][1:3])


@given(st.data())
def test_any_part_of_any_view(tmp_path_factory, data):
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    array = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    folder = tmp_path_factory.mktemp("view")
    save_file({"before": np.zeros(3, np.int8), "x": array, "y": np.zeros(2)}, folder / "model.safetensors")
    view = data.draw(st.sampled_from([tuple(shape), (array.size,), (1, shape[0], array.size // shape[0])]))
    part = [slice(*sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size))))) for size in view]
    read = Tensors.open(folder).read("x", view, part)
    np.testing.assert_array_equal(read, array.reshape(view)[tuple(part)])


def test_opening_reads_no_data(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(NAMED, file)
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    file.write_bytes(file.read_bytes()[:header] + b"\xff" * (file.stat().st_size - header))
    tensor = Tensors.open(tmp_path).headers["a.weight"]
    assert (tensor.shape, tensor.dtype, tensor.file) == ((4, 6), "float32", file)


def refused(folder, *parts: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        Tensors.open(folder)
    assert all(part in str(raised.value) for part in (str(folder), *parts)), raised.value


def test_a_missing_folder(tmp_path):
    refused(tmp_path / "vae", "is missing", "diffusion_pytorch_model.safetensors")


def test_a_folder_without_weights(tmp_path):
    refused(tmp_path, "holds no weights")


def test_pickled_weights(tmp_path):
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"\x80")
    refused(tmp_path, "diffusion_pytorch_model.bin", "joyjax reads safetensors only")


def test_a_variant_does_not_count(tmp_path):
    save_file(NAMED, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    refused(tmp_path, "diffusion_pytorch_model.fp16.safetensors", "default names")
    save_file({"x": np.zeros(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    assert list(Tensors.open(tmp_path).headers) == ["x"]


def test_two_sets_of_weights(tmp_path):
    toy.save_sharded(tmp_path, NAMED, 2)
    save_file(NAMED, tmp_path / "model.safetensors")
    refused(tmp_path, "model.safetensors and model.safetensors.index.json")


def test_a_damaged_file(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"not a header")
    refused(tmp_path, "model.safetensors is not a readable safetensors file")


def test_a_file_cut_short(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(NAMED, file)
    file.write_bytes(file.read_bytes()[:-1])
    refused(tmp_path, "model.safetensors is not a readable safetensors file")


def test_a_dtype_that_no_network_has(tmp_path):
    header = json.dumps({"x": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    refused(tmp_path, "tensor x is stored as F8_E8M0; expected bfloat16, float16, float32")


@pytest.mark.parametrize("weight_map", [None, [], {}, {"a": 1}, "x"])
def test_an_index_without_a_map(tmp_path, weight_map):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(tmp_path, "model.safetensors.index.json", "weight_map")


def edit_index(folder, edit) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    edit(index["weight_map"])
    file.write_text(json.dumps(index))


def test_a_missing_shard(tmp_path):
    toy.save_sharded(tmp_path, NAMED, 2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    refused(tmp_path, "model-00002-of-00002.safetensors is missing")


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "..", ""])
def test_an_index_that_leaves_its_folder(tmp_path, file):
    toy.save_sharded(tmp_path, NAMED, 2)
    edit_index(tmp_path, lambda where: where.update({"a.weight": file}))
    refused(tmp_path, repr(file))


def test_a_tensor_that_is_missing_in_its_file(tmp_path):
    toy.save_sharded(tmp_path, NAMED, 2)
    edit_index(tmp_path, lambda where: where.update({"d.weight": "model-00001-of-00002.safetensors"}))
    refused(tmp_path, "tensor d.weight should be in model-00001-of-00002.safetensors, which does not hold it")


def test_a_tensor_in_another_file_than_the_index_says(tmp_path):
    toy.save_sharded(tmp_path, NAMED, 2)
    edit_index(tmp_path, lambda where: where.update({"a.weight": "model-00002-of-00002.safetensors"}))
    refused(tmp_path, "tensor a.weight is in model-00001-of-00002.safetensors; the index has it in model-00002")


def test_a_tensor_that_the_index_leaves_out(tmp_path):
    toy.save_sharded(tmp_path, NAMED, 2)
    edit_index(tmp_path, lambda where: where.pop("c.count"))
    refused(tmp_path, "tensor c.count is in model-00001-of-00002.safetensors; the index has it nowhere")


def test_a_tensor_in_two_files(tmp_path):
    toy.save_sharded(tmp_path, NAMED, 2)
    second = tmp_path / "model-00002-of-00002.safetensors"
    save_file({"a.weight": NAMED["a.weight"], "b.weight": NAMED["b.weight"]}, second)
    refused(tmp_path, "tensor a.weight is in both model-00001-of-00002.safetensors and", second.name)


def test_a_file_that_went_away(tmp_path):
    save_file(NAMED, tmp_path / "model.safetensors")
    tensors = Tensors.open(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model.safetensors: tensor a.weight cannot be read"):
        tensors.read("a.weight")
