"""Converted folders whose large arrays are in files of their own; here everything from 100 bytes on is large."""

import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import toy
from jax.sharding import Mesh, PartitionSpec

from joyjax.convert import array_files, checkpoint, manifest, orbax_part, stream
from joyjax.convert.conversion import convert_checkpoint
from joyjax.convert.manifest import Manifest
from joyjax.convert.safetensors import Tensors
from joyjax.errors import CheckpointError
from joyjax.layers.stored import array_leaves
from joyjax.layers.weights import leaves

pytestmark = pytest.mark.jax

CONFIG = toy.ToyConfig()
KERNEL = "blocks.1.qkv.kernel"


@pytest.fixture(autouse=True)
def _large(monkeypatch):
    monkeypatch.setattr("joyjax.convert.array_files.LARGE", 100)


@pytest.fixture
def source(tmp_path):
    return toy.save_model(tmp_path / "source", toy.TOY)


@pytest.fixture
def target(source, tmp_path):
    """A converted folder; the kernels are in a part each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("joyjax.convert.manifest.PART_BYTES", 2400)
        convert_checkpoint(source, tmp_path / "target", (toy.TOY,))
    return tmp_path / "target"


def same(ours, theirs) -> None:
    ours, theirs = array_leaves(ours.state), array_leaves(theirs.state)
    assert ours.keys() == theirs.keys()
    for path, array in ours.items():
        assert array.value.dtype == theirs[path].value.dtype
        assert array.value.sharding.is_equivalent_to(theirs[path].value.sharding, array.value.ndim)
        assert np.asarray(array.value).tobytes() == np.asarray(theirs[path].value).tobytes(), path


def folder_of(target: Path, path: str = KERNEL) -> Path:
    (piece,) = Manifest.read(target).components["toy"].parameters[path].pieces
    assert piece.part.startswith("files-")
    return target / "toy" / piece.part / path


@pytest.mark.parametrize("part_bytes", [2**27, 2000, 300])  # one part, kernels in a part each, in several pieces
@pytest.mark.parametrize("sizes", [0, 4])
@pytest.mark.parametrize("own_memory", [False, True], ids=["CPU", "another device"])
@pytest.mark.parametrize("storage", [None, "float8"])
def test_loading_the_converted_folder_is_loading_the_source(
    source, tmp_path, part_bytes, sizes, own_memory, storage, monkeypatch
):
    monkeypatch.setattr("joyjax.convert.manifest.PART_BYTES", part_bytes)
    convert_checkpoint(source, tmp_path / "exact", (toy.TOY,))
    convert_checkpoint(source, tmp_path / "float8", (toy.TOY,), dtype="bfloat16", quantize="float8")
    if own_memory:
        for module in ("joyjax.sharding.build", "joyjax.convert.stream"):
            monkeypatch.setattr(f"{module}.shares_memory", lambda device: False)
    mesh = Mesh(np.array(jax.devices()[:sizes]), ("tensor",)) if sizes else None
    theirs = stream.fill(toy.TOY, CONFIG, Tensors.open(source / "toy"), jnp.bfloat16, mesh, storage=storage)
    same(checkpoint.restore(tmp_path / "exact", toy.TOY, CONFIG, jnp.bfloat16, mesh, storage=storage), theirs)
    if storage:
        same(checkpoint.restore(tmp_path / "float8", toy.TOY, CONFIG, jnp.bfloat16, mesh), theirs)


def test_large_arrays_and_small_ones(target):
    found = Manifest.read(target)
    for path, stored in found.components["toy"].parameters.items():
        assert all(piece.part.startswith("files-") == (stored.nbytes >= 100) for piece in stored.pieces), path
    assert json.loads((target / "joyjax.json").read_text())["version"] == 4  # 0.1.0 refuses it by name
    names = sorted(path.name for path in (target / "toy").iterdir() if path.is_dir())
    assert sorted(name.partition("-")[2] for name in names) == [f"{n:05}" for n in range(len(names))]


def test_an_array_of_a_part_is_its_bytes(target, source):
    theirs = leaves(stream.fill(toy.TOY, CONFIG, Tensors.open(source / "toy"), jnp.float32).state)
    data = (folder_of(target) / "0.0.0.0").read_bytes()
    assert data == np.asarray(theirs[KERNEL][...]).tobytes()


def test_another_program_opens_a_part_with_orbax_alone(target, source):
    theirs = leaves(stream.fill(toy.TOY, CONFIG, Tensors.open(source / "toy"), jnp.float32).state)
    for part in manifest.parts(Manifest.read(target).components["toy"].parameters):
        for path, array in ocp.StandardCheckpointer().restore(target / "toy" / part).items():
            np.testing.assert_array_equal(array, theirs[path][...])


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"dtype": "bfloat16", "quantize": "float8"}])
def test_orbax_reads_what_numpy_lacks(source, tmp_path, options):
    convert_checkpoint(source, tmp_path / "target", (toy.TOY,), **options)
    for part, held in manifest.expected(Manifest.read(tmp_path / "target").components["toy"].parameters).items():
        for path, array in ocp.StandardCheckpointer().restore(tmp_path / "target" / "toy" / part).items():
            array = np.asarray(array)
            assert (array.shape, str(array.dtype), orbax_part.digest(array)) == held[path]


@pytest.mark.parametrize("fault", ["changed", "cut short"])
def test_a_file_that_reads_back_otherwise_is_refused(source, tmp_path, monkeypatch, fault):
    write = array_files.write

    def damaged(folder, arrays):
        write(folder, arrays)
        if KERNEL in arrays:
            file = folder / KERNEL / "0.0.0.0"
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data if fault == "changed" else data[:-1])

    monkeypatch.setattr(array_files, "write", damaged)
    with pytest.raises(CheckpointError, match=f"{KERNEL} (is not what was written|has .* bytes; expected)"):
        convert_checkpoint(source, tmp_path / "target", (toy.TOY,))
    assert not (tmp_path / "target").exists()


def test_a_kernel_is_quantized_once(source, tmp_path, monkeypatch):
    """Its scales are small, and are stored with it."""
    calls, plain = [], stream.ReadPlan.build_leaf
    monkeypatch.setattr(
        stream.ReadPlan,
        "build_leaf",
        lambda self, found, *rest: calls.append(found.target) or plain(self, found, *rest),
    )
    monkeypatch.setattr("joyjax.convert.manifest.PART_BYTES", 700)
    convert_checkpoint(source, tmp_path / "float8", (toy.TOY,), dtype="bfloat16", quantize="float8")
    assert len(calls) == len(set(calls)) > 0


def test_a_device_reads_its_share_only(target, monkeypatch):
    sizes, plain = {}, array_files.fill

    def seen(where, goal, ranges, **options):
        sizes.setdefault(where.file.parent.name, []).append(goal.size)
        return plain(where, goal, ranges, **options)

    monkeypatch.setattr(array_files, "fill", seen)
    mesh = Mesh(np.array(jax.devices()[:8]), ("tensor",))
    filled = leaves(checkpoint.restore(target, toy.TOY, CONFIG, jnp.float32, mesh).state)
    assert filled[KERNEL][...].sharding.spec == PartitionSpec(None, None, "tensor", None)
    assert sizes[KERNEL] == [12 * 3 * 2] * 8
    assert sizes["first.kernel"] == [60]


def test_a_value_that_is_not_finite(target):
    file = folder_of(target) / "0.0.0.0"
    data = np.frombuffer(file.read_bytes(), np.float32).copy()
    data[-5] = np.nan
    file.write_bytes(data.tobytes())
    with pytest.raises(CheckpointError, match=f"{KERNEL} holds NaN or infinity.*convert the model again"):
        checkpoint.restore(target, toy.TOY, CONFIG, jnp.float32)


def test_a_changed_byte_is_found_by_its_digest(target):
    file = folder_of(target) / "0.0.0.0"
    data = bytearray(file.read_bytes())
    data[17] ^= 1
    file.write_bytes(data)
    part = file.parent.parent.name
    held = manifest.expected(Manifest.read(target).components["toy"].parameters)[part]
    with pytest.raises(CheckpointError, match=f"{KERNEL} is not what was written"):
        orbax_part.check_part(target / "toy" / part, held)


def change(**values):
    def edit(folder: Path) -> None:
        raw = json.loads((folder / ".zarray").read_text())
        (folder / ".zarray").write_text(json.dumps(raw | values))

    return edit


HOSTILE = {
    "no file": (lambda folder: (folder / "0.0.0.0").unlink(), "No such file"),
    "no .zarray": (lambda folder: (folder / ".zarray").unlink(), "zarray"),
    "not json": (lambda folder: (folder / ".zarray").write_text("{"), "zarray"),
    "cut": (lambda folder: os.truncate(folder / "0.0.0.0", 2300), "has 2300 bytes; expected 2304"),
    "longer": (lambda folder: (folder / "0.0.0.0").write_bytes(bytes(2305)), "has 2305 bytes; expected 2304"),
    "a pipe": (
        lambda folder: ((folder / "0.0.0.0").unlink(), os.mkfifo(folder / "0.0.0.0")),
        "not a regular file",
    ),
    "another shape": (change(shape=[12, 3, 4, 4]), r"shape \[12, 3, 4, 4\]; expected float32 \[12, 3, 8, 2\]"),
    "chunks": (change(chunks=[2**40, 3, 8, 2]), "in one chunk"),
    "compressed": (change(compressor={"id": "zstd"}), "in one chunk"),
    "turned": (change(order="F"), "in one chunk"),
    "another dtype": (change(dtype="<i4"), "dtype '<i4'"),
    "a dtype that is none": (change(dtype={"a": 1}), "dtype"),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_a_hostile_part(target, fault):
    edit, message = HOSTILE[fault]
    edit(folder_of(target))
    with pytest.raises(CheckpointError, match=message) as raised:
        checkpoint.restore(target, toy.TOY, CONFIG, jnp.float32)
    assert str(target) in str(raised.value)
    assert "convert the model again" in str(raised.value) or "zarray" in str(raised.value)


def test_a_file_that_changes_while_it_is_read(target, monkeypatch):
    plain = array_files.fill

    def changed(where, *rest, **options):
        os.utime(where.file, ns=(1, 1))
        return plain(where, *rest, **options)

    monkeypatch.setattr(array_files, "fill", changed)
    with pytest.raises(CheckpointError, match="changed since it was opened"):
        checkpoint.restore(target, toy.TOY, CONFIG, jnp.float32)


def test_a_part_that_is_gone(target):
    shutil.rmtree(folder_of(target).parent)
    with pytest.raises(CheckpointError, match="files-0.* is missing"):
        checkpoint.restore(target, toy.TOY, CONFIG, jnp.float32)
