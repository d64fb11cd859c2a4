"""The converted folder: whole or not there, the same numbers, and readable without joyjax."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import types
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
import toy
from jax.sharding import Mesh, PartitionSpec
from safetensors.numpy import save_file

from joyjax.convert import checkpoint, orbax_part, stream
from joyjax.convert.conversion import convert_checkpoint
from joyjax.convert.export import export
from joyjax.convert.generation_defaults import GenerationDefaults
from joyjax.convert.journal import open_journal
from joyjax.convert.manifest import Manifest, parts
from joyjax.convert.rules import Rule, last_frame
from joyjax.convert.safetensors import Tensors
from joyjax.errors import CheckpointError, MeshError, RequestError
from joyjax.layers.conv import Conv
from joyjax.layers.stored import array_leaves
from joyjax.layers.weights import leaves
from joyjax.storage import forms
from joyjax.storage.float8 import Float8
from joyjax.storage.product import contract_last
from joyjax.storage.quantize import quantize_array

pytestmark = pytest.mark.jax

CONFIG = toy.ToyConfig()
BOTH = (toy.TOY, toy.OTHER)


@pytest.fixture
def source(tmp_path):
    return toy.save_model(tmp_path / "source", *BOTH)


@pytest.fixture
def target(tmp_path):
    return tmp_path / "models" / "target"


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr("joyjax.convert.manifest.PART_BYTES", 2000)


def same(ours, theirs) -> None:
    ours, theirs = leaves(ours.state), leaves(theirs.state)
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        assert leaf.dtype == theirs[path].dtype
        assert np.asarray(leaf[...]).tobytes() == np.asarray(theirs[path][...]).tobytes(), path


def files(folder) -> set[str]:
    """Return the files of a folder, those inside the parts left out."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and "part-" not in str(p)}


WHOLE = {
    *("joyjax.json", "model_index.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"),
    *("toy/config.json", "other/config.json"),
}


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_the_converted_folder_is_loading_the_source(tmp_path, target, stored, dtype, small_parts):
    source = toy.save_model(tmp_path / "source", *BOTH, dtype=stored)
    convert_checkpoint(source, target, BOTH)
    assert files(target) == WHOLE
    for component in BOTH:
        ours = checkpoint.restore(target, component, CONFIG, jnp.dtype(dtype))
        same(ours, stream.fill(component, CONFIG, Tensors.open(source / component.folder), jnp.dtype(dtype)))
        kinds = {stored.dtype for stored in Manifest.read(target).components[component.folder].parameters.values()}
        assert kinds == {stored}


def test_a_dtype_asked_for_leaves_what_the_network_holds_in_float32(source, target):
    manifest = convert_checkpoint(source, target, BOTH, dtype="bfloat16")
    for path, stored in manifest.components["toy"].parameters.items():
        assert stored.dtype == ("float32" if path.endswith("norm.scale") else "bfloat16")
    theirs = stream.fill(toy.TOY, CONFIG, Tensors.open(source / "toy"), jnp.bfloat16)
    same(checkpoint.restore(target, toy.TOY, CONFIG, jnp.bfloat16), theirs)


def test_the_manifest_is_read_as_it_was_written(source, target):
    (source / "joyjax.json").write_text('{"base_size": 256, "guidance_scale": 1.5}')
    manifest = convert_checkpoint(source, target, BOTH)
    assert Manifest.read(target) == manifest
    assert (
        manifest.generation_defaults
        == GenerationDefaults.read(target)
        == GenerationDefaults(base_size=256, guidance_scale=1.5)
    )
    raw = json.loads((target / "joyjax.json").read_text())
    assert (raw["format"], raw["version"]) == ("joyjax-orbax", 2)
    entry = raw["components"]["toy"]["parameters"]["blocks.1.qkv.kernel"]
    theirs = leaves(stream.fill(toy.TOY, CONFIG, Tensors.open(source / "toy"), jnp.float32).state)
    sha256 = hashlib.sha256(np.asarray(theirs["blocks.1.qkv.kernel"][...]).tobytes()).hexdigest()
    piece = {"part": "part-00000", "start": 0, "stop": 12, "sha256": sha256}
    assert entry == {"shape": [12, 3, 8, 2], "dtype": "float32", "pieces": [piece]}


def test_parts_are_small_and_in_order(source, target, small_parts):
    convert_checkpoint(source, target, BOTH)
    stored = Manifest.read(target).components["toy"].parameters
    held_in = parts(stored)
    assert list(held_in) == [f"part-{n:05}" for n in range(len(held_in))]
    assert sorted(p.name for p in (target / "toy").iterdir()) == ["config.json", *held_in]
    assert list(dict.fromkeys(path for held in held_in.values() for path in held)) == list(stored)
    for held in held_in.values():
        rows = {path: (piece.stop - piece.start) / stored[path].shape[0] for path, piece in held.items()}
        assert sum(stored[path].nbytes * share for path, share in rows.items()) <= 2000


def test_what_is_larger_than_a_part_lies_in_several(source, target, monkeypatch):
    monkeypatch.setattr("joyjax.convert.manifest.PART_BYTES", 500)
    convert_checkpoint(source, target, BOTH)
    stored = Manifest.read(target).components["toy"].parameters["blocks.1.qkv.kernel"]
    assert len(stored.pieces) > 4
    assert [piece.start for piece in stored.pieces] == [0, *(piece.stop for piece in stored.pieces[:-1])]
    assert stored.pieces[-1].stop == 12
    rows = []
    for piece in stored.pieces:
        with ocp.StandardCheckpointer() as checkpointer:
            rows.append(checkpointer.restore(target / "toy" / piece.part)["blocks.1.qkv.kernel"])
    theirs = leaves(stream.fill(toy.TOY, CONFIG, Tensors.open(source / "toy"), jnp.float32).state)
    np.testing.assert_array_equal(np.concatenate(rows), theirs["blocks.1.qkv.kernel"][...])


ORBAX_ALONE = """
import sys
from pathlib import Path
import numpy as np
import orbax.checkpoint as ocp

with ocp.StandardCheckpointer() as checkpointer:
    arrays = checkpointer.restore(Path(sys.argv[1]))
assert "joyjax" not in sys.modules
np.savez(sys.argv[2], **{path: np.asarray(array, np.float32) for path, array in arrays.items()})
print(sorted({str(array.dtype) for array in arrays.values()}))
"""


def test_another_program_opens_a_part_with_orbax_alone(tmp_path, source, target):
    convert_checkpoint(source, target, BOTH, dtype="bfloat16")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-P", "-c", ORBAX_ALONE, str(target / "toy" / "part-00000"), str(tmp_path / "read.npz")]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout == "['bfloat16', 'float32']\n"
    theirs = leaves(stream.fill(toy.TOY, CONFIG, Tensors.open(source / "toy"), jnp.bfloat16).state)
    with np.load(tmp_path / "read.npz") as read:
        assert set(read) == theirs.keys()
        for path in read:
            np.testing.assert_array_equal(read[path], np.asarray(theirs[path][...], np.float32))


def test_a_mesh_places_restored_parameters_by_their_logical_axes(source, target, small_parts):
    convert_checkpoint(source, target, BOTH)
    mesh = Mesh(np.array(jax.devices()), ("tensor",))
    restored = checkpoint.restore(target, toy.TOY, CONFIG, jnp.bfloat16, mesh)
    kernel = leaves(restored.state)["blocks.0.out.kernel"][...]
    assert kernel.sharding.spec == PartitionSpec("tensor", None, None)
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(1, 2, 12)}
    same(restored, stream.fill(toy.TOY, CONFIG, Tensors.open(source / "toy"), jnp.bfloat16))
    with pytest.raises(MeshError, match="blocks.0.out.kernel"):
        checkpoint.restore(target, toy.TOY, CONFIG, jnp.bfloat16, Mesh(np.array(jax.devices()[:3]), ("tensor",)))


def test_progress_ends_at_the_whole(source, target, small_parts):
    for run in (
        lambda progress: convert_checkpoint(source, target, BOTH, progress=progress),
        lambda progress: checkpoint.restore(target, toy.TOY, CONFIG, jnp.float32, progress=progress),
    ):
        calls = []
        run(lambda done, total, calls=calls: calls.append((done, total)))
        assert calls == sorted(calls)
        assert calls[-1][0] == calls[-1][1] > 0


# What is already there


def test_an_existing_target_survives(source, target):
    target.mkdir(parents=True)
    (target / "notes.txt").write_text("mine")
    with pytest.raises(RequestError, match="--overwrite"):
        convert_checkpoint(source, target, BOTH)
    assert files(target) == {"notes.txt"}
    convert_checkpoint(source, target, BOTH, overwrite=True)
    assert files(target) == {"notes.txt", *WHOLE}


def test_overwrite_replaces_what_was_converted_before(tmp_path, source, target):
    convert_checkpoint(source, target, BOTH, dtype="bfloat16")
    with pytest.raises(RequestError, match="--overwrite"):
        convert_checkpoint(source, target, BOTH)
    assert Manifest.read(target).components["toy"].parameters["first.kernel"].dtype == "bfloat16"
    convert_checkpoint(source, target, BOTH, overwrite=True)
    theirs = stream.fill(toy.OTHER, CONFIG, Tensors.open(source / "other"), jnp.float32)
    same(checkpoint.restore(target, toy.OTHER, CONFIG, jnp.float32), theirs)
    assert os.listdir(target.parent) == [target.name]


def test_an_empty_target_is_as_good_as_none(source, target):
    target.mkdir(parents=True)
    convert_checkpoint(source, target, BOTH)
    assert files(target) == WHOLE


def test_components_may_come_one_by_one(source, target):
    convert_checkpoint(source, target, BOTH, component="toy")
    assert files(target) == WHOLE - {"other/config.json"}
    with pytest.raises(CheckpointError, match="no component other, only toy: add it with .* --component other"):
        checkpoint.restore(target, toy.OTHER, CONFIG, jnp.float32)
    with pytest.raises(RequestError, match="has toy already, .* in another dtype; .* --overwrite"):
        convert_checkpoint(source, target, BOTH, component="toy", dtype="bfloat16")
    convert_checkpoint(source, target, BOTH, component="other")
    assert files(target) == WHOLE
    convert_checkpoint(source, target, BOTH, component="toy", dtype="bfloat16", overwrite=True)
    assert files(target) == WHOLE
    theirs = stream.fill(toy.OTHER, CONFIG, Tensors.open(source / "other"), jnp.float32)
    same(checkpoint.restore(target, toy.OTHER, CONFIG, jnp.float32), theirs)
    theirs = stream.fill(toy.TOY, CONFIG, Tensors.open(source / "toy"), jnp.bfloat16)
    same(checkpoint.restore(target, toy.TOY, CONFIG, jnp.bfloat16), theirs)


def test_a_component_does_not_join_another_model(tmp_path, source, target):
    convert_checkpoint(toy.save_model(tmp_path / "another", toy.TOY), target, (toy.TOY,))
    with pytest.raises(RequestError, match="holds files already"):
        convert_checkpoint(source, target, BOTH, component="other")
    assert "other" not in Manifest.read(target).components


def test_an_unknown_component(source, target):
    with pytest.raises(RequestError, match="component 'unet' is not in this model; it has toy, other"):
        convert_checkpoint(source, target, BOTH, component="unet")


def test_a_target_that_is_a_file(source, target):
    target.parent.mkdir()
    target.write_text("mine")
    with pytest.raises(RequestError, match="is a file"):
        convert_checkpoint(source, target, BOTH, overwrite=True)
    assert target.read_text() == "mine"


@pytest.mark.parametrize("where", [".", ".."])
def test_a_target_that_holds_the_source(source, where):
    before = files(source)
    with pytest.raises(RequestError, match="holds the source"):
        convert_checkpoint(source, source / where, BOTH, overwrite=True)
    assert files(source) == before


def test_a_component_that_is_there_is_not_written_twice(source, target, monkeypatch):
    convert_checkpoint(source, target, BOTH, component="toy")
    before = {path: path.stat().st_ino for path in (target / "toy").rglob("*")}
    written = spy_on_parts(monkeypatch)
    for component in (None, "toy", None):  # the second and third find all there
        convert_checkpoint(source, target, BOTH, component=component)
    assert {folder.parent.name for folder in written} == {"other"}
    assert {path: path.stat().st_ino for path in (target / "toy").rglob("*")} == before
    assert os.listdir(target.parent) == [target.name]


def test_equal_parts_are_shared_with_another_folder(tmp_path, source, target, small_parts, monkeypatch):
    convert_checkpoint(source, target, BOTH)
    named = toy.tensors(CONFIG, seed=1)
    named["layers.1.out.bias"] = named["layers.1.out.bias"] + 1
    toy.save_sharded(source / "other", named, 2)
    (source / "other" / "diffusion_pytorch_model.safetensors").unlink()
    written = spy_on_parts(monkeypatch)
    second = tmp_path / "second"
    convert_checkpoint(source, second, BOTH, share=target)
    bias = Manifest.read(second).components["other"].parameters["blocks.1.out.bias"]
    assert [(folder.parent.name, folder.name) for folder in written] == [("other", bias.pieces[0].part)]
    for component in BOTH:
        theirs = stream.fill(component, CONFIG, Tensors.open(source / component.folder), jnp.float32)
        same(checkpoint.restore(second, component, CONFIG, jnp.float32), theirs)
    first, linked = ({path.stat().st_ino for path in (f / "toy").glob("part-*/_METADATA")} for f in (target, second))
    assert first == linked
    shutil.rmtree(target)  # each stands alone
    theirs = stream.fill(toy.TOY, CONFIG, Tensors.open(source / "toy"), jnp.float32)
    same(checkpoint.restore(second, toy.TOY, CONFIG, jnp.float32), theirs)


# Failures


def spy_on_parts(monkeypatch, fail: Exception | type[BaseException] | None = None, at: int = -1) -> list:
    """Note every part that is written; raise at one of them."""
    written, write = [], orbax_part.write_part

    def write_part(folder, arrays, axes):
        if len(written) == at:
            raise fail
        written.append(folder)
        write(folder, arrays, axes)

    monkeypatch.setattr(orbax_part, "write_part", write_part)
    return written


@pytest.mark.parametrize("fail", [OSError(28, "No space left on device"), CheckpointError("part x"), KeyboardInterrupt])
def test_a_conversion_that_failed_goes_on_where_it_stopped(source, target, small_parts, monkeypatch, fail):
    first = spy_on_parts(monkeypatch, fail, at=3)
    with pytest.raises((CheckpointError, KeyboardInterrupt)) as raised:
        convert_checkpoint(source, target, BOTH)
    assert fail is KeyboardInterrupt or "the same command goes on from there" in str(raised.value)
    assert len(first) == 3
    assert os.listdir(target.parent) == [f".{target.name}.unfinished"]
    monkeypatch.undo()
    monkeypatch.setattr("joyjax.convert.manifest.PART_BYTES", 2000)
    second = spy_on_parts(monkeypatch)
    convert_checkpoint(source, target, BOTH)
    assert not set(first) & set(second)
    assert os.listdir(target.parent) == [target.name]
    for component in BOTH:
        theirs = stream.fill(component, CONFIG, Tensors.open(source / component.folder), jnp.float32)
        same(checkpoint.restore(target, component, CONFIG, jnp.float32), theirs)


def test_another_command_does_not_go_on_from_there(source, target, small_parts, monkeypatch):
    spy_on_parts(monkeypatch, KeyboardInterrupt, at=3)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, target, BOTH, dtype="bfloat16")
    monkeypatch.undo()
    monkeypatch.setattr("joyjax.convert.manifest.PART_BYTES", 2000)
    convert_checkpoint(source, target, BOTH)
    kinds = {stored.dtype for stored in Manifest.read(target).components["toy"].parameters.values()}
    assert kinds == {"float32"}


def test_a_part_that_reads_back_otherwise_is_refused(source, target, monkeypatch):
    write = orbax_part.write_part

    def damaged(folder, arrays, axes):
        path = next(iter(arrays))
        write(folder, {**arrays, path: arrays[path] + 1}, axes)

    monkeypatch.setattr(orbax_part, "write_part", damaged)
    with pytest.raises(CheckpointError, match="is not what was written"):
        convert_checkpoint(source, target, BOTH)
    assert not target.exists()


def test_two_programs_do_not_write_to_one_target(source, target):
    message = "is being written by another program"
    with open_journal(target, "another job"), pytest.raises(CheckpointError, match=message):
        convert_checkpoint(source, target, BOTH)


def test_an_interrupted_overwrite_leaves_the_old_target(source, target, monkeypatch):
    convert_checkpoint(source, target, BOTH, dtype="bfloat16")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(orbax_part, "write_part", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, target, BOTH, overwrite=True)
    theirs = stream.fill(toy.TOY, CONFIG, Tensors.open(source / "toy"), jnp.bfloat16)
    same(checkpoint.restore(target, toy.TOY, CONFIG, jnp.bfloat16), theirs)


def test_a_part_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="part-00000 cannot be written"):
        orbax_part.write_part(tmp_path / "file" / "part-00000", {"x": np.zeros(3)}, {"x": 0})


def test_too_little_space_is_seen_before_anything_is_written(source, target, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    monkeypatch.setattr(orbax_part, "write_part", lambda *_: pytest.fail("written"))
    with pytest.raises(CheckpointError, match="GiB free"):
        convert_checkpoint(source, target, BOTH)
    assert os.listdir(target.parent) == []


@pytest.mark.parametrize("fault", ["tensor", "config", "class", "tokenizer", "converted", "missing"])
def test_a_source_that_is_not_whole_is_refused_before_anything_is_written(tmp_path, source, target, fault, monkeypatch):
    name, folder = fault, source
    index = source / "model_index.json"
    if fault == "tensor":
        name, named = "layers.1.qkv.bias", toy.tensors(CONFIG)
        del named[name]
        save_file(named, source / "other" / "diffusion_pytorch_model.safetensors")
    elif fault == "config":
        name = str(source / "toy" / "config.json")
        os.unlink(name)
    elif fault == "class":
        name = "model_index.json: toy is 'Other'; expected ToyModel"
        index.write_text(index.read_text().replace('"toy": ["diffusers", "ToyModel"]', '"toy": ["diffusers", "Other"]'))
    elif fault == "tokenizer":
        shutil.rmtree(source / "tokenizer")
    elif fault == "converted":
        folder = tmp_path / "converted"
        convert_checkpoint(source, folder, BOTH)
    elif fault == "missing":
        name, folder = "model_index.json is missing", tmp_path / "nowhere"
    monkeypatch.setattr(orbax_part, "write_part", lambda *_: pytest.fail("written"))
    with pytest.raises(CheckpointError) as raised:
        convert_checkpoint(folder, target, BOTH)
    assert name in str(raised.value)
    assert not target.exists()


@pytest.mark.parametrize("name", ["..", "", "a/b", "/etc"])
def test_an_index_that_names_a_folder_elsewhere(source, target, name):
    index = json.loads((source / "model_index.json").read_text())
    (source / "model_index.json").write_text(json.dumps({**index, name: ["library", "Class"]}))
    with pytest.raises(CheckpointError, match="no such folder"):
        convert_checkpoint(source, target, BOTH)
    assert not target.exists()


def edit_manifest(folder, edit) -> None:
    raw = json.loads((folder / "joyjax.json").read_text())
    edit(raw)
    (folder / "joyjax.json").write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda raw: raw.update(format="other"), "format is 'other'"),
        (lambda raw: raw.update(version=1), "version 1; this joyjax reads 'joyjax-orbax', version 2"),
        (lambda raw: raw.pop("components"), "is damaged"),
        (lambda raw: raw.update(components=[]), "is damaged"),
        (lambda raw: raw.update(components={"toy": None}), "is damaged"),
        (lambda raw: raw.update(base_size="256"), "base_size is '256'"),
        (lambda raw: first(raw).update(shape=[12, -1]), "shape"),
        (lambda raw: first(raw).update(shape="12"), "shape"),
        (lambda raw: first(raw).update(dtype="int8"), "dtype 'int8'"),
        (lambda raw: first(raw).update(dtype=[]), "dtype"),
        (lambda raw: first(raw)["pieces"][0].update(part="part-00009"), "part-00009 is missing"),
        (lambda raw: first(raw)["pieces"][0].update(part=3), "part 3"),
        (lambda raw: first(raw)["pieces"][0].update(part=f"part-{'0' * 300}"), "part 'part-000"),
        (lambda raw: first(raw)["pieces"][0].update(part="../part-00000"), "part '../part-00000'"),
        (lambda raw: first(raw)["pieces"][0].update(start=1), "rows 1 to"),
        (lambda raw: first(raw)["pieces"][0].update(stop=-1), "rows 0 to -1"),
        (lambda raw: first(raw)["pieces"][0].update(sha256=7), "sha256 7"),
        (lambda raw: first(raw).update(pieces=[]), "pieces of 0 rows"),
        (lambda raw: first(raw).update(pieces=[3]), "is damaged"),
        (lambda raw: first(raw).pop("shape"), "shape"),
        (lambda raw: first(raw).update(shape=[5, 13]), r"first.kernel has shape \[5, 13\], expected \[5, 12\]"),
        (lambda raw: raw["components"]["toy"]["parameters"].pop("first.bias"), r"first.bias \[12\] is missing"),
        (lambda raw: raw["components"]["toy"]["parameters"].update({"x": first(raw)}), "x .* is not part"),
    ],
)
def test_a_damaged_manifest(source, target, edit, message):
    convert_checkpoint(source, target, BOTH)
    edit_manifest(target, edit)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.restore(target, toy.TOY, CONFIG, jnp.float32)


def first(raw) -> dict:
    return raw["components"]["toy"]["parameters"]["first.kernel"]


@pytest.mark.parametrize(
    ("part_bytes", "value"),  # in one piece, in several
    [(2**20, np.nan), (2**20, -np.inf), (100, -np.inf), pytest.param(100, np.nan, marks=pytest.mark.nightly)],
)
def test_a_part_with_what_is_no_number(source, target, monkeypatch, value, part_bytes):
    monkeypatch.setattr("joyjax.convert.manifest.PART_BYTES", part_bytes)
    convert_checkpoint(source, target, BOTH)
    piece = Manifest.read(target).components["toy"].parameters["first.kernel"].pieces[-1]
    part = target / "toy" / piece.part
    held = ocp.StandardCheckpointer().restore(part)
    arrays = {path: np.array(array) for path, array in held.items()}
    arrays["first.kernel"][-1, -1] = value
    shutil.rmtree(part)
    orbax_part.write_part(part, arrays, dict.fromkeys(arrays, 0))
    with pytest.raises(CheckpointError, match="first.kernel holds NaN or infinity.*convert the model again"):
        checkpoint.restore(target, toy.TOY, CONFIG, jnp.bfloat16)


@pytest.mark.parametrize(
    "change",
    [
        {"chunks": [10**6, 10**6]},
        {"chunks": [12]},
        {"chunks": "all"},
        {"chunks": [0, 12]},
        {"compressor": {"id": "zlib"}},
    ],
    ids=str,
)
def test_chunks_that_claim_more_than_there_is(source, target, change):
    """TensorStore takes the memory that chunks claim, and ends the process where there is less."""
    convert_checkpoint(source, target, BOTH)
    part = target / "toy" / "part-00000"
    store = ts.KvStore.open({"driver": "ocdbt", "base": {"driver": "file", "path": f"{part}/"}}).result()
    raw = json.loads(store.read("first.kernel/.zarray").result().value)
    assert raw["chunks"] == [5, 12]
    store.write("first.kernel/.zarray", json.dumps({**raw, **change}).encode()).result()
    with pytest.raises(CheckpointError, match="part-00000 cannot be read; .*first.kernel is stored in chunks of"):
        checkpoint.restore(target, toy.TOY, CONFIG, jnp.float32)


def test_a_missing_part(source, target, small_parts):
    convert_checkpoint(source, target, BOTH)
    shutil.rmtree(target / "toy" / "part-00001")
    with pytest.raises(CheckpointError, match="part-00001 is missing"):
        checkpoint.restore(target, toy.TOY, CONFIG, jnp.float32)


def test_a_part_of_other_arrays(source, target):
    convert_checkpoint(source, target, BOTH)
    part = target / "toy" / "part-00000"
    shutil.rmtree(part)
    orbax_part.write_part(part, {"first.kernel": np.zeros((5, 12), np.float32)}, {"first.kernel": 0})
    with pytest.raises(CheckpointError, match="part-00000 cannot be read; convert the model again"):
        checkpoint.restore(target, toy.TOY, CONFIG, jnp.float32)


def test_a_damaged_part(source, target):
    convert_checkpoint(source, target, BOTH)
    (target / "toy" / "part-00000" / "_METADATA").write_text("{")
    with pytest.raises(CheckpointError, match="part-00000 cannot be read; convert the model again"):
        checkpoint.restore(target, toy.TOY, CONFIG, jnp.float32)


# Kernels in another form than an array

KERNEL = "blocks.1.out.kernel"


def same_arrays(ours, theirs) -> None:
    ours, theirs = array_leaves(ours.state), array_leaves(theirs.state)
    assert ours.keys() == theirs.keys()
    for path, array in ours.items():
        assert array.value.dtype == theirs[path].value.dtype
        assert np.asarray(array.value).tobytes() == np.asarray(theirs[path].value).tobytes(), path


def in_float8(source, dtype="bfloat16", mesh=None):
    return stream.fill(toy.TOY, CONFIG, Tensors.open(source / "toy"), jnp.dtype(dtype), mesh, storage="float8")


@pytest.fixture
def quantized(tmp_path, target):
    """A Diffusers folder in bfloat16 and what is converted of it in float8."""
    source = toy.save_model(tmp_path / "source8", *BOTH, dtype="bfloat16")
    convert_checkpoint(source, target, BOTH, quantize="float8")
    return source, target


@pytest.mark.parametrize("part_bytes", [2**27, 2000, 300])  # one part, kernels in a part each, in several pieces
@pytest.mark.parametrize("sizes", [{}, {"tensor": 4}], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float8_is_the_same_from_every_folder(tmp_path, part_bytes, sizes, dtype, monkeypatch):
    source = toy.save_model(tmp_path / "source", *BOTH, dtype="bfloat16")
    monkeypatch.setattr("joyjax.convert.manifest.PART_BYTES", part_bytes)
    convert_checkpoint(source, tmp_path / "exact", BOTH)
    convert_checkpoint(source, tmp_path / "float8", BOTH, quantize="float8")
    mesh = Mesh(np.array(jax.devices()[:4]), ("tensor",)) if sizes else None
    expected = in_float8(source, dtype, mesh)
    for folder, storage in (("exact", "float8"), ("float8", None), ("float8", "float8")):
        ours = checkpoint.restore(tmp_path / folder, toy.TOY, CONFIG, jnp.dtype(dtype), mesh, storage=storage)
        same_arrays(ours, expected)
        for path, array in array_leaves(ours.state).items():
            assert array.value.sharding == array_leaves(expected.state)[path].value.sharding, path


def test_a_dtype_is_had_before_the_form(source, target):
    """Of float32 tensors: what bfloat16 makes of them is quantized, where that is asked for."""
    convert_checkpoint(source, target, BOTH, dtype="bfloat16", quantize="float8")
    same_arrays(checkpoint.restore(target, toy.TOY, CONFIG, jnp.bfloat16), in_float8(source))
    kept = target.with_name("kept")
    convert_checkpoint(source, kept, BOTH, quantize="float8")
    same_arrays(checkpoint.restore(kept, toy.TOY, CONFIG, jnp.float32), in_float8(source, "float32"))


def test_the_manifest_names_the_form(quantized):
    source, target = quantized
    raw = json.loads((target / "joyjax.json").read_text())
    assert raw["version"] == 3
    assert raw["components"]["toy"]["forms"] == {
        f"blocks.{n}.{name}.kernel": "float8" for n in (0, 1) for name in ("out", "qkv")
    }
    entries = raw["components"]["toy"]["parameters"]
    assert KERNEL not in entries
    q, scale = entries[f"{KERNEL}.q"], entries[f"{KERNEL}.scale"]
    assert (q["shape"], q["dtype"]) == ([12, 8, 2], "float8_e4m3fn")
    assert (scale["shape"], scale["dtype"]) == ([12], "float32")
    theirs = array_leaves(in_float8(source).state)[f"{KERNEL}.q"].value
    assert q["pieces"][0]["sha256"] == hashlib.sha256(np.asarray(theirs).tobytes()).hexdigest()
    assert Manifest.read(target).components["toy"].forms == raw["components"]["toy"]["forms"]


def test_a_quantized_part_is_opened_by_orbax_alone(quantized):
    source, target = quantized
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(target / "toy" / "part-00000")
    theirs = array_leaves(in_float8(source).state)
    for name in (f"{KERNEL}.q", f"{KERNEL}.scale"):
        assert np.asarray(found[name]).tobytes() == np.asarray(theirs[name].value).tobytes()


def test_a_stopped_quantized_conversion_goes_on(tmp_path, target, small_parts, monkeypatch):
    source = toy.save_model(tmp_path / "source8", *BOTH, dtype="bfloat16")
    first = spy_on_parts(monkeypatch, KeyboardInterrupt, at=3)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, target, BOTH, quantize="float8")
    assert not target.exists()
    monkeypatch.undo()
    monkeypatch.setattr("joyjax.convert.manifest.PART_BYTES", 2000)
    second, calls = spy_on_parts(monkeypatch), []
    convert_checkpoint(source, target, BOTH, quantize="float8", progress=lambda *counts: calls.append(counts))
    assert not set(first) & set(second)
    assert calls[-1][0] == calls[-1][1] > 0
    same_arrays(checkpoint.restore(target, toy.TOY, CONFIG, jnp.bfloat16), in_float8(source))


def test_another_form_is_another_conversion(quantized, target):
    source, _ = quantized
    assert convert_checkpoint(source, target, BOTH, quantize="float8") == Manifest.read(target)  # nothing to do
    with pytest.raises(RequestError, match="has toy, other already, .* in another form"):
        convert_checkpoint(source, target, BOTH)
    convert_checkpoint(source, target, BOTH, overwrite=True)
    assert json.loads((target / "joyjax.json").read_text())["version"] == 2


def test_a_component_without_such_kernels_is_refused(tmp_path, source, target):
    plain = dataclasses.replace(toy.TOY, build=lambda config, *, dtype, rngs: Conv(2, 3, 3, dtype=dtype, rngs=rngs))
    named = {"conv.weight": np.zeros((3, 2, 3, 3, 3), np.float32), "conv.bias": np.zeros(3, np.float32)}
    save_file(named, source / "toy" / "diffusion_pytorch_model.safetensors")
    rules = (Rule("conv.weight", "kernel", last_frame(3)), Rule("conv.bias", "bias"))
    plain = dataclasses.replace(plain, rules=lambda config: rules)
    with pytest.raises(RequestError, match="quantize is 'float8', but toy has no kernels that may be stored so"):
        convert_checkpoint(source, target, (plain, toy.OTHER), quantize="float8", component="toy")
    assert not target.exists()


def test_what_is_quantized_is_never_quantized_again(quantized, monkeypatch):
    _, target = quantized
    monkeypatch.setattr(checkpoint, "quantize_array", lambda *_: pytest.fail("quantized again"))
    for storage in (None, "float8"):
        checkpoint.restore(target, toy.TOY, CONFIG, jnp.bfloat16, storage=storage)


def test_quantizing_twice_would_be_noticed(quantized):
    """The mistake made on purpose: `q` is taken for the kernel, and its scale is lost."""
    source, target = quantized
    ours = checkpoint.restore(target, toy.TOY, CONFIG, jnp.bfloat16)
    leaf = leaves(ours.state)[KERNEL].get_value()
    kernel = leaf.q.astype(jnp.bfloat16).transpose(1, 2, 0)
    places = {name: array.sharding for name, array in forms.arrays(leaf).items()}
    again = quantize_array(Float8.abstract(kernel.shape, 2, jnp.bfloat16), 2, places, kernel)
    values = {path: parameter.get_value() for path, parameter in leaves(ours.state).items()}
    with pytest.raises(AssertionError, match=f"{KERNEL}.scale"):
        same_arrays(ours.filled({**values, KERNEL: again}), in_float8(source))


def test_another_form_than_the_folder_has_is_refused(quantized, monkeypatch):
    _, target = quantized

    class Other(Float8):
        name = "other"

    monkeypatch.setattr(forms, "FORMS", {"float8": Float8, "other": Other})
    with pytest.raises(
        CheckpointError, match="never quantized a second time.*\n.*kernel has the form float8, not other"
    ):
        checkpoint.restore(target, toy.TOY, CONFIG, jnp.bfloat16, storage="other")


def test_export_refuses_what_is_quantized(quantized, tmp_path):
    _, target = quantized
    weights = checkpoint.restore(target, toy.TOY, CONFIG, jnp.bfloat16)
    parameters = {path: leaf.get_value() for path, leaf in leaves(weights.state).items()}
    with pytest.raises(CheckpointError, match="blocks.0.out.kernel is quantized, and 3 more: .* must be exact"):
        export(toy.TOY, CONFIG, parameters, tmp_path / "exported", jnp.bfloat16)
    assert not (tmp_path / "exported").exists()


def entry(raw, name) -> dict:
    return raw["components"]["toy"]["parameters"][f"{KERNEL}.{name}"]


def the_forms(raw) -> dict:
    return raw["components"]["toy"]["forms"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda raw: entry(raw, "q").update(shape=[12, 16]),
            rf"{KERNEL}.q has shape \[12, 16\], expected \[12, 8, 2\]",
        ),
        (lambda raw: entry(raw, "q").update(dtype="bfloat16"), f"{KERNEL}.q is bfloat16, expected float8_e4m3fn"),
        (lambda raw: entry(raw, "scale").update(dtype="bfloat16"), f"{KERNEL}.scale is bfloat16, expected float32"),
        (
            lambda raw: raw["components"]["toy"]["parameters"].pop(f"{KERNEL}.scale"),
            rf"{KERNEL}.scale \[12\] is missing",
        ),
        (lambda raw: first(raw).update(dtype="float8_e4m3fn"), "first.kernel is float8_e4m3fn, expected bfloat16 or"),
        (
            lambda raw: the_forms(raw).update({KERNEL: "int3"}),
            f"{KERNEL} has the form 'int3'; this joyjax knows float8",
        ),
        (
            lambda raw: the_forms(raw).update({"first.kernel": "float8"}),
            "first.kernel has the form 'float8'; .* no kernel",
        ),
        (lambda raw: the_forms(raw).update({"nowhere": "float8"}), "nowhere has the form 'float8'; .* no kernel"),
        (lambda raw: the_forms(raw).pop(KERNEL), rf"{KERNEL} \[8, 2, 12\] is missing"),
        (lambda raw: the_forms(raw).update({KERNEL: 3}), "is damaged.*forms"),
        (lambda raw: raw["components"]["toy"].update(forms=["float8"]), "is damaged.*forms"),
        (lambda raw: raw.update(version=5), "version 5; this joyjax reads 'joyjax-orbax', version 2 to 4"),
    ],
)
def test_a_hostile_manifest_of_forms(quantized, edit, message):
    _, target = quantized
    edit_manifest(target, edit)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.restore(target, toy.TOY, CONFIG, jnp.bfloat16)


def rewrite_part(target, edit) -> None:
    part = target / "toy" / "part-00000"
    held = {path: np.array(array) for path, array in ocp.StandardCheckpointer().restore(part).items()}
    edit(held)
    shutil.rmtree(part)
    orbax_part.write_part(part, held, dict.fromkeys(held, 0))


def set_last(name, value):
    def edit(held):
        held[f"{KERNEL}.{name}"].flat[-1] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_last("scale", np.nan), f"{KERNEL}.scale holds NaN or infinity"),
        (set_last("scale", np.inf), f"{KERNEL}.scale holds NaN or infinity"),
        (set_last("q", np.nan), f"{KERNEL}.q holds NaN or infinity"),
        (lambda held: held.pop(f"{KERNEL}.scale"), "part-00000 cannot be read"),
        (
            lambda held: held.update({f"{KERNEL}.q": held[f"{KERNEL}.q"][:6]}),
            rf"{KERNEL}.q is stored with .* \[6, 8, 2\]",
        ),
        (
            lambda held: held.update({f"{KERNEL}.q": np.ones((13, 8, 2), held[f"{KERNEL}.q"].dtype)}),
            rf"{KERNEL}.q is stored with the shape \[13, 8, 2\]; expected \[12, 8, 2\]",
        ),
    ],
)
@pytest.mark.parametrize("sizes", [0, 4])
def test_a_hostile_part_of_forms(quantized, edit, message, sizes):
    _, target = quantized
    rewrite_part(target, edit)
    mesh = Mesh(np.array(jax.devices()[:sizes]), ("tensor",)) if sizes else None
    with pytest.raises(CheckpointError, match=message):
        checkpoint.restore(target, toy.TOY, CONFIG, jnp.bfloat16, mesh)


@dataclasses.dataclass(frozen=True)
class Rounded:
    """A form as another would add one: whole numbers of eight bits, one scale for each output channel."""

    q: Any
    scale: Any
    shape: tuple[int, ...]
    dtype: str
    name: ClassVar[str] = "rounded"
    dtypes: ClassVar[tuple[str, ...]] = ("int8", "float32")
    size = Float8.size
    array_axes = Float8.array_axes

    @classmethod
    def abstract(cls, shape, inputs, dtype):
        out = shape[inputs:]
        q = jax.ShapeDtypeStruct((*out, *shape[:inputs]), jnp.int8)
        return cls(q, jax.ShapeDtypeStruct(out, jnp.float32), shape, jnp.dtype(dtype).name)

    @classmethod
    def quantize(cls, rows, inputs):
        wide = rows.astype(jnp.float32)
        scale = jnp.max(jnp.abs(wide), tuple(range(rows.ndim - inputs, rows.ndim)), keepdims=True) / 127
        return {"q": jnp.round(wide / scale).astype(jnp.int8), "scale": scale.reshape(rows.shape[:-inputs])}

    @staticmethod
    def check_device(device, cause):
        pass

    def contract(self, x, count, start, stop):
        kernel = self.q[start:stop].astype(self.dtype)
        return contract_last(x.astype(self.dtype), kernel, count, self.dtype) * self.scale[start:stop].astype(
            self.dtype
        )


jax.tree_util.register_dataclass(Rounded, ["q", "scale"], ["shape", "dtype"])


def test_another_form_is_a_class_and_a_line(source, target, monkeypatch):
    """Reading, converting, placing and a linear map take one that they have never heard of."""
    monkeypatch.setitem(forms.FORMS, "rounded", Rounded)
    convert_checkpoint(source, target, BOTH, quantize="rounded")
    mesh = Mesh(np.array(jax.devices()[:4]), ("tensor",))
    exact, read, converted, spread = (
        fill(mesh_)
        for fill, mesh_ in (
            (lambda mesh: stream.fill(toy.TOY, CONFIG, Tensors.open(source / "toy"), jnp.float32), None),
            (
                lambda mesh: stream.fill(toy.TOY, CONFIG, Tensors.open(source / "toy"), jnp.float32, storage="rounded"),
                None,
            ),
            (lambda mesh: checkpoint.restore(target, toy.TOY, CONFIG, jnp.float32), None),
            (lambda mesh: checkpoint.restore(target, toy.TOY, CONFIG, jnp.float32, mesh), mesh),
        )
    )
    same_arrays(read, converted)
    same_arrays(read, spread)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((7, 12)), jnp.float32)
    one, other = (weights.module().blocks[1].qkv(x) for weights in (exact, read))
    assert 1e-4 < np.linalg.norm(one - other) / np.linalg.norm(one) < 0.02
