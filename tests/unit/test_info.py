"""What `info` says of a checkpoint, against what its files and networks are."""

import dataclasses
import json
import math
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from safetensors import safe_open

from joyjax.convert import stream
from joyjax.convert.conversion import convert_checkpoint
from joyjax.convert.safetensors import Tensors
from joyjax.errors import CheckpointError, MeshError
from joyjax.families.registry import FAMILIES
from joyjax.runtime import info
from joyjax.sharding.mesh import check_mesh

pytestmark = pytest.mark.parity  # the checkpoint is the reference's


@pytest.fixture(scope="module")
def converted(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "tiny"
    family = FAMILIES["JoyImageEditPipeline"]
    convert_checkpoint(checkpoint, folder, family.components, dtype="bfloat16")
    return folder


def test_a_diffusers_folder(checkpoint):
    found = info.describe(checkpoint)
    assert (found.family, found.class_name, found.format) == ("JoyImage-Edit", "JoyImageEditPipeline", "diffusers")
    assert {component.folder for component in found.components} == {"transformer", "text_encoder", "vae"}
    for component in found.components:
        shapes = {}
        for file in (checkpoint / component.folder).glob("*.safetensors"):
            with safe_open(file, framework="numpy") as opened:
                shapes |= {name: opened.get_slice(name).get_shape() for name in opened.keys()}
        assert component.tensors == len(shapes)
        assert component.parameters == sum(math.prod(shape) for shape in shapes.values())
        assert component.bytes == 4 * component.parameters
        assert component.dtypes == ("float32",)
    assert found.tensors == sum(component.tensors for component in found.components)
    assert found.parameters == sum(component.parameters for component in found.components)
    assert found.bytes == sum(component.bytes for component in found.components)


def test_a_converted_folder(checkpoint, converted):
    found, source = info.describe(converted), info.describe(checkpoint)
    assert found.format == "converted"
    assert found.needs == source.needs
    assert found.parameters < source.parameters  # what no network uses is left behind
    transformer = found.components[1]
    assert transformer.folder == "transformer"
    assert transformer.dtypes == ("bfloat16", "float32")  # the time embedder stays
    assert transformer.parameters == source.components[1].parameters


def test_what_a_model_needs_is_what_its_networks_hold(checkpoint):
    found = info.describe(checkpoint)
    assert [need.dtype for need in found.needs] == ["bfloat16", "float32"]
    for need in found.needs:
        each = []
        for component in FAMILIES["JoyImageEditPipeline"].components:
            config, tensors = component.read_config(checkpoint), Tensors.open(checkpoint / component.folder)
            network = stream.fill(component, config, tensors, need.dtype)
            each.append(sum(array.nbytes for array in jax.tree.leaves(network.state)))
        assert (need.resident_bytes, need.staged_bytes) == (sum(each), max(each))


def test_what_a_model_needs_quantized_is_what_its_networks_hold_then(checkpoint):
    found = info.describe(checkpoint)
    assert [(need.dtype, need.linear) for need in found.needs_quantized] == [
        ("bfloat16", "float8"),
        ("float32", "float8"),
    ]
    for need, exact in zip(found.needs_quantized, found.needs, strict=True):
        each = []
        for component in FAMILIES["JoyImageEditPipeline"].components:
            config, tensors = component.read_config(checkpoint), Tensors.open(checkpoint / component.folder)
            network = stream.fill(component, config, tensors, need.dtype, storage="float8")
            each.append(sum(array.nbytes for array in jax.tree.leaves(network.state)))
        assert (need.resident_bytes, need.staged_bytes) == (sum(each), max(each))
        assert need.resident_bytes < exact.resident_bytes


def test_it_can_be_written_as_json(checkpoint):
    found = dataclasses.asdict(info.describe(checkpoint))
    assert json.loads(json.dumps(found))["components"][0]["folder"] == "text_encoder"


def test_no_array_is_read(checkpoint, converted, monkeypatch):
    monkeypatch.setattr(Tensors, "fill", lambda *_, **__: pytest.fail("read"))
    monkeypatch.setattr("orbax.checkpoint.StandardCheckpointer", lambda *_: pytest.fail("read"))
    info.describe(checkpoint)
    info.describe(converted)


def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="model_index.json is missing"):
        info.describe(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(CheckpointError, match="'FluxPipeline'; .* JoyImageEditPipeline"):
        info.describe(tmp_path)


def test_verify_reads_every_weight(checkpoint, converted, tmp_path):
    for folder in (checkpoint, converted):
        seen = []
        info.verify(folder, lambda done, total, seen=seen: seen.append((done, total)))
        assert seen[-1][0] == seen[-1][1] > 0
    folder = shutil.copytree(converted, tmp_path / "damaged")
    data = max((folder / "vae").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    held = bytearray(data.read_bytes())
    held[len(held) // 2] ^= 1  # one bit
    data.write_bytes(held)
    with pytest.raises(CheckpointError, match="vae/part-00000"):
        info.verify(folder)


def test_on_a_mesh(checkpoint):
    """The devices need not be here; what one holds is what its share of every parameter takes."""
    sizes = {"cfg": 2, "sequence": 6, "tensor": 4}
    held = info.on_mesh(checkpoint, sizes, "bfloat16")
    alone = info.on_mesh(checkpoint, {}, "bfloat16")
    assert (held.devices, held.heads, held.ring, held.ulysses) == (48, 1, 6, 1)
    assert held.image_tokens == 2 * -(-4096 // 6)
    assert alone.bytes == info.describe(checkpoint).needs[0].resident_bytes
    assert held.component_bytes["vae"] == alone.component_bytes["vae"]
    assert 1 / 4 < held.component_bytes["transformer"] / alone.component_bytes["transformer"] < 1 / 3
    with pytest.raises(MeshError, match="has 4 heads, which 8 devices"):
        info.on_mesh(checkpoint, {"tensor": 8}, "float32")


@pytest.mark.parametrize("sizes", [{"tensor": 4}, {"tensor": 2, "sequence": 2}], ids=str)
def test_a_form_on_a_mesh_is_what_a_device_holds(checkpoint, sizes):
    """`q` and `scale` go by the kernel's axes: counted without devices as they lie on them."""
    held = info.on_mesh(checkpoint, sizes, "bfloat16", "float8")
    component = FAMILIES["JoyImageEditPipeline"].components[1]
    devices = np.array(jax.devices()[: math.prod(sizes.values())]).reshape(tuple(sizes.values()))
    config, tensors = component.read_config(checkpoint), Tensors.open(checkpoint / component.folder)
    mesh = check_mesh(Mesh(devices, tuple(sizes)))
    network = stream.fill(component, config, tensors, "bfloat16", mesh, storage="float8")
    first = sum(array.addressable_shards[0].data.nbytes for array in jax.tree.leaves(network.state))
    assert (held.component_bytes["transformer"], held.linear) == (first, "float8")
    assert first < info.on_mesh(checkpoint, sizes, "bfloat16").component_bytes["transformer"]
