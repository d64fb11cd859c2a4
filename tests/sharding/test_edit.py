"""The tiny edit on meshes of simulated devices: the same latents as on one device."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from PIL import Image

import joyjax
from joyjax.errors import MeshError
from joyjax.families.joyimage import EDIT
from joyjax.inputs.files import read_json
from joyjax.layers.weights import leaves
from joyjax.sharding.mesh import check_mesh, parse_mesh
from joyjax.sharding.place import constrain, parameter_sharding
from joyjax.sharding.rules import RULES

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8))


def mesh_of(**sizes: int) -> Mesh:
    count = int(np.prod(list(sizes.values())))
    return Mesh(np.asarray(jax.devices()[:count]).reshape(tuple(sizes.values())), tuple(sizes))


def final_latents(pipeline: joyjax.Pipeline) -> np.ndarray:
    kept = []
    options = {"steps": 2, "height": 64, "width": 96, "exact_size": True}
    joyjax.edit(pipeline, PICTURE, "make the sky red", callback=lambda event: kept.append(event.latents), **options)
    return np.asarray(kept[-1])


@pytest.fixture(scope="module")
def alone(loaded) -> np.ndarray:
    return final_latents(loaded)


@pytest.mark.parity
@pytest.mark.parametrize(
    "sizes",
    [{"tensor": 2}, {"cfg": 2}, {"data": 2}, {"sequence": 2}, {"cfg": 2, "sequence": 2, "tensor": 2}],
    ids=lambda sizes: "-".join(f"{name}{size}" for name, size in sizes.items()),
)
def test_every_mesh_gives_the_same_latents(sizes, checkpoint, alone, error):
    pipeline = joyjax.load(checkpoint, dtype="float32", mesh=mesh_of(**sizes))
    assert error(final_latents(pipeline), alone) < 1e-4
    kernel = leaves(pipeline.weights["transformer"].state)["blocks.0.img.up.kernel"][...]
    assert kernel.addressable_shards[0].data.size == kernel.size // sizes.get("tensor", 1)


@pytest.mark.parity
def test_a_mesh_that_does_not_divide_a_network(checkpoint):
    with pytest.raises(MeshError, match=r"0\.k\.kernel has 2 kv_heads, which 4 devices .*sizes that fit: 1, 2$"):
        joyjax.load(checkpoint, mesh=mesh_of(tensor=4))


@pytest.mark.parity
@pytest.mark.parametrize("component", EDIT.components, ids=lambda component: component.folder)
def test_every_dimension_of_every_parameter_has_a_rule(component, checkpoint):
    for path, leaf in leaves(component.abstract(component.read_config(checkpoint), "bfloat16").state).items():
        assert len(leaf.axes) == leaf.ndim, path
        assert set(leaf.axes) <= {None, *RULES}, path


@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("component", EDIT.components, ids=lambda component: component.folder)
def test_the_real_networks_divide(component, devices, reference_files):
    config = component.configure(read_json(reference_files / component.folder / "config.json"))
    shares = []
    for path, leaf in leaves(component.abstract(config, "bfloat16").state).items():
        sharding = parameter_sharding(path, leaf.shape, leaf.axes, mesh_of(tensor=devices))
        shares.append((leaf.size, np.prod(sharding.shard_shape(leaf.shape))))
    whole, share = np.sum(shares, axis=0, dtype=np.int64)
    expected = {"transformer": 1 / devices, "text_encoder": 1 / devices, "vae": 1}[component.folder]
    assert expected <= share / whole < expected + 0.1  # norms, modulation and the vocabulary stay whole


def test_explicit_axes_are_made_automatic():
    mesh = check_mesh(jax.make_mesh((2,), ("tensor",)))
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)


def test_unknown_axis():
    with pytest.raises(MeshError, match="('model',).*data, cfg, sequence, tensor"):
        check_mesh(mesh_of(model=2))


def test_a_mesh_from_its_description():
    mesh = parse_mesh("tensor=2, cfg=2")
    assert dict(mesh.shape) == {"tensor": 2, "cfg": 2}


@pytest.mark.parametrize(
    "text",
    ["", "tensor", "tensor=", "tensor=0", "tensor=-2", "tensor=2,tensor=2", "model=2", "tensor=x", "tensor=2;cfg=2"],
)
def test_a_description_that_cannot_be_read(text):
    with pytest.raises(MeshError, match="tensor=4,sequence=2"):
        parse_mesh(text)


def test_more_devices_than_there_are():
    with pytest.raises(MeshError, match="needs 16 devices and 8 are here"):
        parse_mesh("tensor=8,cfg=2")


def test_a_parameter_that_does_not_divide():
    with pytest.raises(MeshError, match="blocks.0.k.kernel has 6 kv_heads.*sizes that fit: 1, 2, 3"):
        parameter_sharding("blocks.0.k.kernel", (16, 6), ("embed", "kv_heads"), mesh_of(tensor=4))


def test_constrain_checks_its_names_with_and_without_a_mesh():
    x = jax.numpy.zeros((3, 4))
    assert constrain(x, "batch", "embed") is x
    with pytest.raises(MeshError, match="'colour' has no rule"):
        constrain(x, "batch", "colour")
    with pytest.raises(ValueError, match="3 axis names"):
        constrain(x, "batch", "embed", None)
    with jax.set_mesh(mesh_of(cfg=2, tensor=2)):
        placed = jax.jit(lambda x: constrain(x, "batch", "mlp"))(x)
    # three rows are not cut in two; four columns are
    assert placed.addressable_shards[0].data.shape == (3, 2)
